"""A request handler as a server on loopback, for as long as a test needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler], **state: object) -> Iterator[str]:
    """`host:port` of a server whose handlers have `state` as attributes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), dict(state)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()

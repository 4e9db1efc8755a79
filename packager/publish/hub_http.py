"""The loopback hub's HTTP side: requests taken apart, answers sent, faults put in between.

Standard library only. Connections are kept alive, bodies may come chunked, contents are streamed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import parse_qs, quote, urlsplit

from packager.publish.hub_accounts import Account
from packager.publish.hub_store import HubError


@dataclass
class Request:
    """A request taken apart."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    """Names in lower case."""
    body: BinaryIO
    parts: dict[str, str] = field(default_factory=dict)
    """Named parts of the path, unquoted."""
    account: Account = field(default_factory=Account)
    """Who asks."""

    def json(self) -> Any:
        """The body as JSON. Raises HubError 400."""
        try:
            return json.loads(self.body.read())
        except ValueError:
            raise HubError(400, "the body is not JSON") from None


@dataclass
class Reply:
    """An answer: a JSON document, or `content` of `size` bytes from its current position."""

    status: int = 200
    document: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    content: BinaryIO | None = None
    size: int = 0


_Broken = Literal["reset", "stall", "lost-reply", "cut-reply", "short-reply", "altered-reply", "no-range"]
Fault = int | Reply | _Broken
"""A status or a whole answer to give instead; or: cut the connection before acting; never act nor answer; act
and send nothing; act and send half of the answer, then reset or close; act and change one byte; act as if no
range were asked."""
FaultHook = Callable[[str, str], Fault | None]
"""Asked at every request with its method and path; may keep it waiting."""


STALL_S = 60.0
"""Seconds after which a connection that is stalled is closed."""


class HubServer(ThreadingHTTPServer):
    """Hands every request to `answer`, unless `intercept` names a fault for it."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, port: int, answer: Callable[[Request], Reply], intercept: FaultHook) -> None:
        self.answer, self.intercept = answer, intercept
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Connections that clients keep alive would hold their threads for ever."""
        with self._guard:
            for connection in list(self._open):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is its own affair."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "loopback-hub"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; the hub keeps its own list of requests."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        fault = self.server.intercept(self.command, address.path)
        if fault == "reset":
            return self._reset()
        headers = {k.lower(): v for k, v in self.headers.items()}
        body = _Body(self.rfile, headers)
        if fault == "stall":
            return self._stall(body)
        if fault == "no-range":
            headers.pop("range", None)
        if isinstance(fault, int):
            reply = Reply(fault, {"error": f"fault {fault}, injected"})
        elif isinstance(fault, Reply):
            reply = fault
        else:
            reply = self.server.answer(
                Request(self.command, address.path, parse_qs(address.query), headers, cast(BinaryIO, body))
            )
        body.drain()
        if fault == "lost-reply":
            return self._reset()
        self._send(reply, fault)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _stall(self, body: _Body) -> None:
        """Wait until the client, or the hub, gives up."""
        body.drain()
        self.close_connection = True
        self.connection.settimeout(STALL_S)
        with contextlib.suppress(OSError):
            self.connection.recv(1)

    def _reset(self) -> None:
        """Close with RST: the peer sees a connection reset, not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        cut = fault in ("cut-reply", "short-reply")
        headers = dict(reply.headers)
        content, size = reply.content, reply.size
        if content is None:
            data = b"" if reply.document is None else json.dumps(reply.document).encode()
            content, size = BytesIO(data), len(data)
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        with content:
            self.send_response(reply.status)
            for name, value in headers.items():
                self.send_header(name, quote(value, safe=" !\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"))
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command == "HEAD":
                return
            left = size // 2 if cut else size
            if fault == "altered-reply" and left:
                first = content.read(1)[0]
                self.wfile.write(bytes([first ^ 1]))
                left -= 1
            while left and (chunk := content.read(min(left, 1 << 20))):
                self.wfile.write(chunk)
                left -= len(chunk)
        if cut:
            self.wfile.flush()
            self.close_connection = True
        if fault == "cut-reply":
            self._reset()


class _Body:
    """The body of a request as a stream: by Content-Length or in chunks."""

    def __init__(self, stream: Any, headers: dict[str, str]) -> None:
        self._stream = stream
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = 0 if self._chunked else int(headers.get("content-length") or 0)
        self._ended = not self._chunked

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all of them for -1; empty at the end."""
        parts: list[bytes] = []
        while size != 0:
            if self._left == 0 and not self._next_chunk():
                break
            data = self._stream.read(self._left if size < 0 else min(size, self._left))
            if not data:
                raise ConnectionError("the client went away in the middle of its request")
            self._left -= len(data)
            size = size if size < 0 else size - len(data)
            parts.append(data)
            if self._chunked and self._left == 0:
                self._stream.readline()
        return b"".join(parts)

    def drain(self) -> None:
        """Read what nobody asked for: the next request on the connection begins after it."""
        while self.read(1 << 20):
            pass

    def _next_chunk(self) -> bool:
        if self._ended:
            return False
        self._left = int(self._stream.readline().split(b";")[0], 16)
        if self._left == 0:
            self._ended = True
            self._stream.readline()
        return self._left > 0

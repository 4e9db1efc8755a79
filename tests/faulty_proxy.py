"""A loopback HTTP proxy in front of one server that spoils the requests it is told to, to see what breaks."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import ClassVar, Literal, get_args

from loopback_http import answering

Fault = Literal["error 500", "reset", "truncated", "after"]
"""Answer 500 without asking the server; close the connection without an answer; send half of the server's
answer; let the server act on the request and close the connection instead of telling."""
FAULTS: tuple[Fault, ...] = get_args(Fault)


class FaultyProxy:
    """Passes requests on to `upstream` (`host:port`), but for those whose number has a fault."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: dict[int, Fault] = {}
        self.seen: list[tuple[str, str, int]] = []
        """Method, path and bytes of the body of every request."""
        self._lock = threading.Lock()

    def begin(self, method: str, path: str, size: int) -> Fault | None:
        """Count a request; the fault it is to meet."""
        with self._lock:
            self.seen.append((method, path, size))
            return self.faults.pop(len(self.seen) - 1, None)

    def forget(self) -> None:
        """Count from the beginning."""
        self.seen.clear()
        self.faults.clear()

    def running(self) -> AbstractContextManager[str]:
        """`host:port` of the proxy while it runs."""
        return answering(_Handler, proxy=self)


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultyProxy]
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.begin(self.command, self.path, len(body))
        if fault == "reset":
            self._hang_up()
            return
        if fault == "error 500":
            self._answer(500, {}, b"{}")
            return
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
        connection.request(self.command, self.path, body=body or None, headers=headers)
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        if fault == "after":
            self._hang_up()
            return
        if fault == "truncated":
            self._answer(reply.status, dict(reply.getheaders()), data, cut=True)
            return
        self._answer(reply.status, dict(reply.getheaders()), data)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        # A reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

"""HTTP connections that are kept open, one a thread, with a deadline on each whole exchange.

Built on `http.client`: at a thousand small answers a second a heavier client takes as much of the processor
as the server that is measured (httpx 0.28 spends three times as long on a request). A socket's own time-out
starts anew with each byte, so a server that drips would never run out of it; a watcher closes connections
that are over time, and all of them when a run is broken off.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from urllib.parse import urlsplit

from validation.errors import MeasurementError

CONNECT_TIMEOUT_S = 10.0
_WATCH_S = 0.25


class ConnectionFailed(Exception):
    """No whole answer came over this connection; the reason is the message."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    body: bytes
    retry_after_s: float | None
    """Seconds that the server asks to wait, from its Retry-After header."""

    @property
    def text(self) -> str:
        """The body on one line, its first 300 characters."""
        return " ".join(self.body.decode(errors="replace").split())[:300]


class Connections:
    """Connections to one server, opened as threads need them; a context manager.

    Args:
        base_url: `http://` or `https://`, with or without a path. Proxies of the environment are not used:
            one must not get between a client and a server on the same machine.
        timeout_s: seconds for one exchange as a whole, from sending to the last byte.
        headers: sent with each request.

    Raises:
        MeasurementError: the URL is not one of HTTP.
    """

    def __init__(self, base_url: str, *, timeout_s: float, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MeasurementError(f"{base_url!r} is not the URL of a server", "Give http://host:port.")
        self.base_url = base_url
        self.timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._prefix = parts.path.rstrip("/")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._own = threading.local()
        self._lock = threading.Lock()
        self._open: dict[_Connection, float] = {}
        """Every connection and the moment its exchange must be over; infinite between exchanges."""
        self._closed = threading.Event()

    def __enter__(self) -> Connections:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, once no thread uses them."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()

    def break_off(self) -> None:
        """End every exchange that is under way; from then on there is no other."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                connection.break_off("the run was broken off")

    def post(self, path: str, body: bytes) -> Reply:
        """One exchange. Raises ConnectionFailed."""
        return self._exchange("POST", path, body)

    def get(self, path: str) -> Reply:
        """One exchange. Raises ConnectionFailed."""
        return self._exchange("GET", path, None)

    def _exchange(self, method: str, path: str, body: bytes | None) -> Reply:
        if self._closed.is_set():
            raise ConnectionFailed("the run was broken off")
        kept: _Connection | None = getattr(self._own, "connection", None)
        if kept is not None:
            try:
                return self._over(kept, method, path, body)
            except _Stale:  # closed by the server between two requests: this one never reached it
                pass
        try:
            connection = _Connection(self._secure, self._host, self._port, self.timeout_s)
        except OSError as err:
            raise ConnectionFailed(f"cannot connect: {err}") from None
        try:
            return self._over(connection, method, path, body)
        except _Stale as err:
            raise ConnectionFailed(str(err)) from None

    def _over(self, connection: _Connection, method: str, path: str, body: bytes | None) -> Reply:
        with self._lock:
            self._open[connection] = time.monotonic() + self.timeout_s
        self._own.connection = None
        try:
            reply, keep = connection.exchange(method, self._prefix + path, body, self._headers)
        except BaseException:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()
            raise
        with self._lock:
            if keep:
                self._open[connection] = float("inf")
            else:
                del self._open[connection]
        if keep:
            self._own.connection = connection
        else:
            connection.close()
        return reply

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S):
            now = time.monotonic()
            with self._lock:
                for connection, deadline in self._open.items():
                    if now > deadline:
                        connection.break_off(f"no whole answer in {self.timeout_s:g} s")


class _Stale(Exception):
    """A kept connection turned out closed before a byte of the answer came."""


class _Connection:
    def __init__(self, secure: bool, host: str, port: int | None, timeout_s: float) -> None:
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._http = kind(host, port, timeout=min(CONNECT_TIMEOUT_S, timeout_s))
        self._http.connect()
        self._socket: socket.socket = self._http.sock
        self._socket.settimeout(timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._used = False
        self._broken_off = ""

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[Reply, bool]:
        """The reply, and whether the connection can be used again."""
        try:
            self._http.request(method, path, body, headers)
            response = self._http.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as err:
            if self._used and not self._broken_off:
                raise _Stale from None
            raise self._failure(err) from None
        except (OSError, http.client.HTTPException) as err:
            raise self._failure(err) from None
        try:
            content = response.read()
        except (OSError, http.client.HTTPException) as err:
            raise self._failure(err) from None
        if self._broken_off:
            raise ConnectionFailed(self._broken_off)
        self._used = True
        reply = Reply(response.status, content, retry_after(response.headers.get("Retry-After")))
        return reply, not response.will_close

    def break_off(self, reason: str) -> None:
        """Wake the thread that reads; called from another one."""
        self._broken_off = reason
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._http.close()

    def _failure(self, err: Exception) -> ConnectionFailed:
        if isinstance(err, TimeoutError):
            return ConnectionFailed("no answer in time (TimeoutError)")
        return ConnectionFailed(self._broken_off or f"{type(err).__name__}: {err}".rstrip(": "))


def retry_after(header: str | None) -> float | None:
    """Seconds from now; None without such a header, or if it is neither a number nor a date (RFC 9110)."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

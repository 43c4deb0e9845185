"""A TCP proxy before an HTTP server that loses or replaces replies after the server has done its work."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

Fault = Callable[[str], bytes | None]
LOST = b""


class FaultProxy:
    """Forwards every request upstream, and asks `fault(request line)` what to do with the reply.

    None lets it pass; bytes are sent in its place, and the connection is closed (`LOST`: closed at once).
    """

    def __init__(self, upstream: tuple[str, int], fault: Fault) -> None:
        self._upstream, self._fault = upstream, fault
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.faults = 0

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close(*self._sockets)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                self._sockets += [client, server]
                line = [""]
                for pump in (self._requests, self._replies):
                    threading.Thread(target=pump, args=(client, server, line), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, line: list[str]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                head = data.split(b"\r\n", 1)[0]
                if head.endswith(b" HTTP/1.1"):  # clients do not pipeline: a request begins a chunk
                    line[0] = head.decode("latin-1")
                server.sendall(data)
        self._close(client, server)

    def _replies(self, client: socket.socket, server: socket.socket, line: list[str]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
                    with self._lock:
                        instead = self._fault(line[0])
                        self.faults += instead is not None
                    if instead is not None:
                        client.sendall(instead)
                        break
                client.sendall(data)
        self._close(client, server)

    @staticmethod
    def _close(*sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

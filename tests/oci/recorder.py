"""A TCP forwarder before a storage server that keeps the requests that pass, and refuses on demand."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import urlsplit

_REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 7\r\nConnection: close\r\n\r\nExpired"


class Recorder:
    """Listens at `url`; what it forwards goes to `upstream`. Requests are known by the client's User-Agent."""

    def __init__(self, upstream: str, agent: str) -> None:
        """agent: how the User-Agent of the requests begins that are kept and refused; others pass."""
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._agent = f"User-Agent: {agent}".encode()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heads: list[bytes] = []
        self.refused_count = 0
        self._left = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self, count: int) -> None:
        """Answer the next `count` requests 403, as storage does once a signature has expired."""
        self._left = count

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                self._sockets += [client, server]
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if self._agent in data:
                    with self._lock:
                        self.heads.append(data)
                        is_refused = self._left > 0
                        self._left -= is_refused
                        self.refused_count += is_refused
                    if is_refused:
                        client.sendall(_REFUSAL)
                        break
                server.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 18):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        for end in self._sockets:
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

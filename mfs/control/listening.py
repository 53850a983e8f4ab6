"""Sockets as the daemon's doors: how they are made, accepted from, and who is on the other side."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from mfs.errors import ConfigError

log = logging.getLogger(__name__)
_BACKLOG = 4096
"""Who connects while the daemon is busy waits here. The kernel's own bound (net.core.somaxconn) is the same today."""


@contextmanager
def door(path: Path, mode: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[trio.socket.SocketType]:
    """A socket that listens at `path`. Leaving removes it, unless the next daemon's stands there by then.

    mode: permissions of the socket; they decide who may connect. Raises: ConfigError if it cannot be made.
    """
    sock = _listen(path, mode, kind)
    inode = path.stat().st_ino
    try:
        yield sock
    finally:
        with suppress(FileNotFoundError):
            if path.stat().st_ino == inode:  # ours: its number is nobody else's before it is closed
                path.unlink()
        sock.close()


def _listen(path: Path, mode: int, kind: socket.SocketKind) -> trio.socket.SocketType:
    """Under its final name only once it listens, so that nobody is refused in between."""
    temporary = path.with_name(f"{path.stem[:8]}.{os.getpid()}{path.suffix}")  # never longer than the name it gets
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        temporary.unlink(missing_ok=True)
        sock.bind(str(temporary))
        temporary.chmod(mode)
        sock.listen(_BACKLOG)
        temporary.replace(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"control socket {path} cannot be made: {error.strerror or error}") from error
    return trio.socket.from_stdlib_socket(sock)


@contextmanager
def tcp(host: str, port: int) -> Iterator[trio.socket.SocketType]:
    """A socket that listens at an address of this machine; port 0: one that is free. Raises: OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # what an earlier daemon's clients left is no hindrance
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    with trio.socket.from_stdlib_socket(sock) as listener:
        yield listener


async def accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next connection. Never raises for what clients do."""
    while True:
        try:
            return (await listener.accept())[0]
        except OSError as error:  # out of descriptors, or a client that left the queue: neither is a reason to stop
            log.warning("control socket: accept failed: %s", error)
            await trio.sleep(0.1)


def peer_uid(sock: trio.socket.SocketType) -> int:
    """Who connected, as the kernel says: unix(7), SO_PEERCRED."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])

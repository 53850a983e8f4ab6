"""Where clients come in: the socket at its path, and the lock beside it.

The lock tells a dead server's socket from a live one's without asking it, and without a race. Both may be a server's
before, whose clients wait in the socket meanwhile; those of a server that begins wait there as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from gpuload.errors import BusyError
from mfs.errors import ConfigError


@dataclass
class Door:
    sock: socket.socket
    lock: int
    path: str
    is_left: bool = False
    """Somebody goes on with it: its name stays."""

    def shut(self) -> None:
        """Give up the name and the lock, if nobody goes on with them."""
        if not self.is_left:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            fcntl.flock(self.lock, fcntl.LOCK_UN)


@contextlib.contextmanager
def opened(path: str, mode: int, backlog: int, given: tuple[int, int] | None = None) -> Iterator[Door]:
    """backlog: clients that wait to be accepted, from here on.
    given: descriptors of a socket and a lock that are there, ours from here on.
    Raises: ConfigError, BusyError.
    """
    sock, lock = _bound(path, mode, backlog) if given is None else (socket.socket(fileno=given[0]), given[1])
    door = Door(sock, lock, path)
    try:
        yield door
    finally:
        door.shut()
        sock.close()
        os.close(lock)


def leads_to(fd: int, path: str) -> bool:
    """Whether it is a socket that listens at that path."""
    try:
        with socket.socket(fileno=os.dup(fd)) as same:
            return bool(same.getsockname() == path and os.path.exists(path))
    except OSError:
        return False


def _bound(path: str, mode: int, backlog: int) -> tuple[socket.socket, int]:
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.stat(folder)
        if found.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{folder} belongs to user {found.st_uid}; the socket would not be safe there")
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise ConfigError(f"{folder} is writable for everybody; the socket would not be safe there")
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot make a socket at {path}: {error.strerror}") from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(
                f"a server is already running at {path}; `gpuload serve --take-over` goes on in its place"
            ) from None
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError(f"{path} is there and is no socket; give another path")
            os.unlink(path)  # a dead server's
        except FileNotFoundError:
            pass
        try:
            sock.bind(path)
            os.chmod(path, mode)
            sock.listen(backlog)
        except OSError as error:
            raise ConfigError(f"cannot make a socket at {path}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        os.close(lock)
        raise
    return sock, lock

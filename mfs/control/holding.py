"""The daemon's word to its holder (`mfs.holder`, which has the protocol). Nothing here fails if there is none."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence

_ANSWER_S = 10.0
_ANSWER_BYTES_MAX = 64
_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class HolderLink:
    """The connection to whoever holds the mount's descriptors."""

    def __init__(self, fd: int | None = None) -> None:
        """fd: our end of the pair, None without a holder."""
        self._socket = None if fd is None else socket.socket(fileno=fd)
        self.pid = 0 if fd is None else os.getppid()
        """Of the holder, 0 without one."""

    @property
    def socket(self) -> socket.socket | None:
        """Readable once the holder is gone."""
        return self._socket

    @property
    def is_there(self) -> bool:
        """Whether there is a holder, as far as we know."""
        return self._socket is not None

    def hold(self, device: int, lock: int, journal: int) -> None:
        """We serve from now on."""
        self._say(b"hold", [device, lock, journal])

    def hold_given(self, device: int, lock: int, journal: int, connection: int) -> bool | None:
        """We serve from now on, if the daemon at the other end of `connection` could be told so by the holder: whether
        it was. None: there is no holder, or none that answers. Blocks, for _ANSWER_S at most."""
        if not self._say(b"hold", [device, lock, journal, connection]):
            return None
        assert self._socket is not None
        self._socket.settimeout(_ANSWER_S)
        try:
            answer = self._socket.recv(_ANSWER_BYTES_MAX)
        except OSError:
            return None
        finally:
            self._socket.settimeout(None)
        return answer == b"held" if answer else None

    def giving(self, connection: int) -> bool:
        """The daemon at the other end of `connection` may say that the mount is its."""
        return self._say(b"giving", [connection])

    def end(self) -> None:
        """The mount ends."""
        self._say(b"end")

    def given(self) -> None:
        """The mount is another daemon's, and held by that one's holder."""
        self._say(b"given")

    def lost(self) -> None:
        """The holder is gone."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self.pid = None, 0

    def _say(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        if self._socket is None:
            return False
        try:
            socket.send_fds(self._socket, [message], fds)
        except OSError:
            self.lost()
            return False
        return True


def listen_to_signals() -> None:
    """What the holder has kept back until somebody listens comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)

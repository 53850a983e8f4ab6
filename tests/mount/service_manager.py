"""A stand-in for systemd with its real protocols: NOTIFY_SOCKET with descriptors, LISTEN_FDS, KillMode=mixed."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

DEADLINE_S = 60.0
_CREDENTIALS_BYTES = 12
_KCMP = {"x86_64": 312, "aarch64": 272}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)


class ServiceManager:
    """One service: started, watched, killed with its whole group, started again with what its store has."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._path = folder / "notify"
        self._socket.bind(str(self._path))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.store: list[tuple[str, int]] = []
        """(FDNAME, descriptor)."""
        self.said: list[tuple[int, str]] = []
        """(pid, message), in order."""
        self._main: subprocess.Popen[bytes] | None = None
        self._log = folder / "service.log"

    def start(self, argv: Sequence[str], env: Mapping[str, str], *, watchdog_s: float = 0.0) -> None:
        """As ExecStart=: the process becomes the service, with the store's descriptors as its 3, 4, …"""
        names = ":".join(name for name, _ in self.store)
        more = {"NOTIFY_SOCKET": str(self._path), "LISTEN_FDS": str(len(self.store)), "LISTEN_FDNAMES": names}
        if watchdog_s:
            more["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        # Descriptors are moved to their numbers by a shell: they may be in each other's way here.
        moves = " ".join(f"{100 + at}<&{fd} " for at, (_, fd) in enumerate(self.store))
        closes = " ".join(f"{fd}<&-" for _, fd in self.store)
        places = " ".join(f"{3 + at}<&{100 + at} {100 + at}<&-" for at in range(len(self.store)))
        script = f'exec {moves}; exec {closes}; exec {places}; LISTEN_PID=$$; export LISTEN_PID; exec "$@"'
        with self._log.open("ab") as log:
            self._main = subprocess.Popen(
                ["bash", "-c", script, "bash", *argv], env={**os.environ, **env, **more}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, pass_fds=[fd for _, fd in self.store], start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The main process."""
        assert self._main is not None
        return self._main.pid

    @property
    def environment(self) -> dict[str, str]:
        """Of another process of the service: ExecReload=, say."""
        return {**os.environ, "NOTIFY_SOCKET": str(self._path)}

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def wait_for(self, word: str, *, after: int = 0, within_s: float = DEADLINE_S) -> None:
        """Until some process has said `word`, not counting the first `after` messages."""
        until_s = time.monotonic() + within_s
        while not any(word in message for _, message in self.said[after:]):
            assert select.select([self._socket], [], [], max(0.0, until_s - time.monotonic()))[0], self.log[-4000:]
            self._receive()

    def take_all(self) -> None:
        """What has been said by now."""
        while select.select([self._socket], [], [], 0)[0]:
            self._receive()

    def kill_group(self) -> None:
        """What KillMode=mixed does once the main process was killed: SIGKILL for all that are left."""
        left = _family(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.wait_ended()
        self.take_all()

    def stop(self) -> int:
        """As `systemctl stop`. The main process's exit status."""
        os.kill(self.pid, signal.SIGTERM)
        status = self.wait_ended()
        self.take_all()
        return status

    def wait_ended(self) -> int:
        assert self._main is not None
        status = self._main.wait(DEADLINE_S)
        self._main = None
        return status

    def _receive(self) -> None:
        room = socket.CMSG_SPACE(_CREDENTIALS_BYTES) + socket.CMSG_SPACE(64)
        message, controls, _, _ = self._socket.recvmsg(1 << 16, room, socket.MSG_CMSG_CLOEXEC)
        fds, pid = list[int](), 0
        for _, kind, data in controls:
            if kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(data) // 4}i", data)
            elif kind == socket.SCM_CREDENTIALS:
                pid = struct.unpack("3i", data)[0]
        text = message.decode()
        self.said.append((pid, text))
        words = dict(line.partition("=")[::2] for line in text.splitlines())
        name = words.get("FDNAME", "")
        if words.get("FDSTORE") == "1":
            for fd in fds:
                if any(_same(fd, other) for _, other in self.store):  # as systemd: what it has it does not take twice
                    os.close(fd)
                else:
                    self.store.append((name, fd))
        else:
            for fd in fds:
                os.close(fd)
        if words.get("FDSTOREREMOVE") == "1":
            for stored in [stored for stored in self.store if stored[0] == name]:
                os.close(stored[1])
                self.store.remove(stored)

    def __enter__(self) -> ServiceManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._main is not None:
            self.kill_group()
        for _, fd in self.store:
            os.close(fd)
        self._socket.close()


def _same(one: int, other: int) -> bool:
    """Whether two descriptors are of one open file. Source: kcmp(2), KCMP_FILE."""
    pid = os.getpid()
    return bool(_libc.syscall(_KCMP, pid, pid, 0, one, other) == 0)


def _family(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *_family(int(child))]
    except OSError:
        pass
    return found

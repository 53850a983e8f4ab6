"""The process that outlives a server: it keeps the server's descriptors, and starts the next one if it is killed.

    python -m gpuload.holder ARGUMENTS OF gpuload

Where there is no service manager this is one, of one service, and speaks as systemd does (`mfs.manager`): the server is
started with NOTIFY_SOCKET and says READY=1, FDSTORE=1 and FDSTOREREMOVE=1 there; its successor gets what is kept as
LISTEN_FDS and LISTEN_FDNAMES. A stored connection whose other end is closed is dropped, as systemd drops it.

A server that ends well, or has said STOPPING=1, has meant to, and one that keeps nothing has nothing to be gone on
with: their status becomes ours. One that is killed, or fails, once it had said READY=1 is followed by another, which
the clients wait for in the listening socket; after too many in a short time no more. Signals go to the server, and none
follows it then. If this process is killed the server is told to end, by the kernel.

As little as a service manager, this process must fail: nothing is imported but small modules. Source: sd_notify(3),
sd_listen_fds(3).
"""

import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time

from mfs import children

CRASHES_MAX, WITHIN_S = 5, 60.0
"""So many servers may be killed in so short a time; then one more is too many."""
_FIRST_PAUSE_S = 0.1  # doubled with each further crash; after the first there is none
_FDS_MAX = 65536
_MESSAGE_BYTES_MAX = 4096
_FDS_PER_MESSAGE = 253
_FIRST_FD = 3
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_PR_SET_PDEATHSIG = 1


class Holder:
    """One server after the other, and what is kept for the next."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._kept: dict[int, str] = {}
        """Descriptor -> name, in the order of coming."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.bind("")  # the kernel finds it a name in the abstract namespace: unix(7), autobind
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._events = select.epoll()
        self._events.register(self._sock, select.EPOLLIN)
        self._child = 0
        self._pending: list[int] = []
        """Signals that came while there was no server."""
        self._is_ready = False
        self._was_told = False
        """A signal came: whatever the server says or dies of afterwards, it was to end."""

    def run(self) -> int:
        """Returns the wait status of the last server."""
        for number in _SIGNALS:
            signal.signal(number, self._forward)
        crashes: list[float] = []
        while True:
            pid, status = self._attend()
            if not status or self._was_told or not self._is_ready or "index" not in self._kept.values():
                return status
            how = f"the server (pid {pid}) {children.in_words(status)}"
            crashes = [at for at in crashes if time.monotonic() - at < WITHIN_S]
            if len(crashes) == CRASHES_MAX:
                _say(f"{how}, after {CRASHES_MAX} others that did no better: given up, with the weights")
                return status
            if crashes:
                time.sleep(_FIRST_PAUSE_S * 2 ** (len(crashes) - 1))
            crashes.append(time.monotonic())
            _say(f"{how}: starting the next one, clients wait")

    def _attend(self) -> tuple[int, int]:
        """Start a server with what is kept, and listen to it until it ends. Its pid and wait status."""
        self._is_ready = False
        self._start()
        process = os.pidfd_open(self._child)
        self._events.register(process, select.EPOLLIN)
        while True:
            for fd, event in self._events.poll():
                if fd == self._sock.fileno():
                    self._listen()
                elif fd == process:
                    while self._listen():  # what it had said by then
                        pass
                    os.close(process)
                    pid, self._child = self._child, 0  # from here on the number may be another process's
                    return pid, os.waitpid(pid, 0)[1]
                elif event & (select.EPOLLHUP | select.EPOLLERR):
                    self._drop(fd)

    def _start(self) -> None:
        names = ":".join(self._kept.values())
        told = {"NOTIFY_SOCKET": "@" + os.fsdecode(self._sock.getsockname()[1:]), "GPULOAD_HOLDER": str(os.getpid())}
        told |= {"LISTEN_FDS": str(len(self._kept)), "LISTEN_FDNAMES": names} if self._kept else {}
        command, parent = children.python("-m", "gpuload", *self._arguments), os.getpid()
        # Blocked until the server listens for them: none is lost, and none kills it on the way.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._child = os.fork()
        if not self._child:
            try:
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                os.setpgid(0, 0)  # what a terminal sends to all of them comes from us, once
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() == parent:
                    _move(list(self._kept))
                    os.execve(command[0], command, {**os.environ, **told, "LISTEN_PID": str(os.getpid())})
            finally:
                os._exit(127)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for pending in self._pending:
            os.kill(self._child, pending)
        self._pending.clear()

    def _listen(self) -> bool:
        """Do as the server says. Returns whether it had said something."""
        room = socket.CMSG_SPACE(_FDS_PER_MESSAGE * 4) + socket.CMSG_SPACE(12)
        try:
            flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            message, controls, _, _ = self._sock.recvmsg(_MESSAGE_BYTES_MAX, room, flags)
        except OSError:
            return False
        fds, pid = list[int](), 0
        for _, kind, data in controls:
            if kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
            elif kind == socket.SCM_CREDENTIALS:
                pid, _, _ = struct.unpack("3i", data)
        if pid == self._child:
            lines = message.decode(errors="replace").splitlines()
            words = dict(line.partition("=")[::2] for line in lines)
            if "READY" in words or "STOPPING" in words:
                self._is_ready = words.get("READY") == "1"
            name = words.get("FDNAME", "")
            if words.get("FDSTORE") == "1" and name and ":" not in name:
                while fds and len(self._kept) < _FDS_MAX:
                    self._keep(name, fds.pop(0), is_watched=words.get("FDPOLL") != "0")
            elif words.get("FDSTOREREMOVE") == "1":
                for fd in [fd for fd, called in self._kept.items() if called == name]:
                    self._drop(fd)
        for fd in fds:
            os.close(fd)
        return True

    def _keep(self, name: str, fd: int, *, is_watched: bool) -> None:
        self._kept[fd] = name
        if is_watched:
            try:
                self._events.register(fd, 0)  # that it hangs up is told whatever one asks for
            except OSError:  # files in memory have no such events
                pass

    def _drop(self, fd: int) -> None:
        if self._kept.pop(fd, None) is None:
            return
        try:
            self._events.unregister(fd)  # closing would not: the server has copies of the same open file
        except OSError:  # files in memory are not watched
            pass
        os.close(fd)

    def _forward(self, number: int, frame: object) -> None:
        self._was_told = True
        if self._child:
            os.kill(self._child, number)
        else:
            self._pending.append(number)


def _move(fds: list[int]) -> None:
    """Copies of these as 3, 4, … for the program that is started next; in the child."""
    import fcntl

    above = max([_FIRST_FD + len(fds), *(fd + 1 for fd in fds)])
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    for at, fd in enumerate(copies):
        os.dup2(fd, _FIRST_FD + at)


def _say(text: str) -> None:
    try:
        os.write(2, f"gpuload: {text}\n".encode())
    except OSError:
        pass


def main() -> None:
    """Hold one server for as long as there is one."""
    children.end_as(Holder(sys.argv[1:]).run())


if __name__ == "__main__":
    main()

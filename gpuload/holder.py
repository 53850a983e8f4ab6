"""The process that outlives a server: it keeps the server's descriptors, and starts the next one if it is killed.

    python -m gpuload.holder ARGUMENTS OF gpuload

Where there is no service manager this is one, of one service, and speaks as systemd does (`mfs.manager`): the server is
started with NOTIFY_SOCKET and says READY=1, FDSTORE=1 and FDSTOREREMOVE=1 there; its successor gets what is kept as
LISTEN_FDS and LISTEN_FDNAMES. A stored connection whose other end is closed is dropped, as systemd drops it.

A server that ends well, or has said STOPPING=1, has meant to, and one that keeps nothing has nothing to be gone on
with: their status becomes ours. One that says GIVING=HEX beside it, with a connection, gives its place to whoever is at
the other end: should it be killed over that, those bytes are sent there once more, and only an answer means that the
other one serves; once we have given up waiting for it the kernel refuses it. One that is killed, or fails, once it had
said READY=1 is followed by another, which the clients wait for in the listening socket; after too many in a short time
no more. Signals go to the server, and none follows it then. If this process is killed the server is told to end, by the
kernel.

As little as a service manager, this process must fail: nothing is imported but small modules. Source: sd_notify(3),
sd_listen_fds(3).
"""

import ctypes
import os
import resource
import select
import signal
import socket
import struct
import sys

from mfs import children
from mfs.one_child import CRASHES_MAX, SIGNALS, WITHIN_S, Crashes, OneChild

_ANSWER_S = 60.0
_FDS_MAX = 65536
_MESSAGE_BYTES_MAX = 4096
_FDS_PER_MESSAGE = 253
_FIRST_FD = 3
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
        self._child = OneChild()
        self._is_ready = False
        self._giving: tuple[socket.socket, bytes] | None = None
        """To whom it gives its place, and what says so."""

    def run(self) -> int:
        """Returns the wait status of the last server."""
        crashes = Crashes()
        while True:
            pid, status = self._attend()
            how = f"the server (pid {pid}) {children.in_words(status)}"
            if status and self._giving is not None:
                if self._is_anothers(*self._giving):
                    _say(f"{how}; the one that it gave its place to serves")
                    return 0
                self._is_ready = True
            if not status or self._child.was_told or not self._is_ready or "index" not in self._kept.values():
                return status
            if not crashes.may_go_on(has_served=True):
                _say(
                    f"{how}, the {CRASHES_MAX + 1}th within {WITHIN_S:.0f} s: given up, with the weights;"
                    " whoever starts it again starts it empty"
                )
                return status
            _say(f"{how}: starting the next one, clients wait")

    def _attend(self) -> tuple[int, int]:
        """Start a server with what is kept, and listen to it until it ends. Its pid and wait status."""
        self._is_ready = False
        self._let_go()
        process = self._start()
        self._events.register(process, select.EPOLLIN)
        while True:
            for fd, event in self._events.poll():
                if fd == self._sock.fileno():
                    self._listen()
                elif fd == process:
                    while self._listen():  # what it had said by then
                        pass
                    return self._child.reap(process)
                elif event & (select.EPOLLHUP | select.EPOLLERR):
                    self._drop(fd)

    def _start(self) -> int:
        names = ":".join(self._kept.values())
        told = {"NOTIFY_SOCKET": "@" + os.fsdecode(self._sock.getsockname()[1:]), "GPULOAD_HOLDER": str(os.getpid())}
        told |= {"LISTEN_FDS": str(len(self._kept)), "LISTEN_FDNAMES": names} if self._kept else {}
        environment, parent = {**os.environ, **told}, os.getpid()

        def prepare() -> None:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.setpgid(0, 0)  # what a terminal sends to all of them comes from us, once
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(127)
            _move(list(self._kept))
            environment["LISTEN_PID"] = str(os.getpid())

        return self._child.start(children.python("-m", "gpuload", *self._arguments), prepare, environment)

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
        if pid == self._child.pid:
            lines = message.decode(errors="replace").splitlines()
            words = dict(line.partition("=")[::2] for line in lines)
            if "READY" in words or "STOPPING" in words:
                self._is_ready = words.get("READY") == "1"
                self._let_go()
            if "GIVING" in words and fds:
                self._giving = socket.socket(fileno=fds.pop(0)), bytes.fromhex(words["GIVING"])
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

    def _let_go(self) -> None:
        if self._giving is not None:
            self._giving[0].close()
            self._giving = None

    def _is_anothers(self, connection: socket.socket, said: bytes) -> bool:
        """Our server was killed while it gave its place away; whether the other one has it."""
        connection.setblocking(True)  # the server's own loop wanted otherwise
        connection.settimeout(_ANSWER_S)
        try:
            connection.send(said)  # once more, should it not have come to that
        except OSError:  # it has closed; it may have answered before
            pass
        try:
            try:
                return bool(connection.recv(1))
            except TimeoutError:  # it lives, and might answer yet: the kernel lets it no more, or shows that it has
                connection.shutdown(socket.SHUT_RD)
                return bool(connection.recv(1))
        except OSError:
            return False


def _move(fds: list[int]) -> None:
    """Make these 3, 4, … for the program that is started next; in the child, whose own they are no more afterwards.

    One more is open meanwhile, not as many again: by its limit a process may have room for no more.
    """
    fds = list(fds)
    where = {fd: at for at, fd in enumerate(fds)}
    for at, target in enumerate(range(_FIRST_FD, _FIRST_FD + len(fds))):
        other = where.get(target)
        if other is not None and other > at:  # stands where this one is to go
            fds[other] = os.dup(target)
            where[fds[other]] = other
        if fds[at] == target:
            os.set_inheritable(target, True)
        else:
            os.dup2(fds[at], target)
            os.close(fds[at])


def _say(text: str) -> None:
    try:
        os.write(2, f"gpuload: {text}\n".encode())
    except OSError:
        pass


def main() -> None:
    """Hold one server for as long as there is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # what the server has open for others we have, too
    children.end_as(Holder(sys.argv[1:]).run())


if __name__ == "__main__":
    main()

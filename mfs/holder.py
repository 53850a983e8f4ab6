"""The process that outlives a daemon: it holds the mount's descriptors and starts the next daemon if one is killed.

    python -m mfs.holder [--store NAME] ARGUMENTS OF mfs.daemon

With --successor it begins where another holder was killed, with the descriptors that were kept under NAME. It starts
`mfs.daemon` with these arguments and one end of a SOCK_SEQPACKET pair (--holder-fd). This docstring is the only
reference of what is said there; descriptors travel as SCM_RIGHTS:

    hold [device, lock, journal]              the daemon serves; what it held before is replaced
    hold [device, lock, journal, connection]  ... what another daemon gave: that one is told, over `connection`; the
                                              answer is "held", or "kept" if it does not hear it any more: nothing is
                                              held then
    giving [connection]                       another daemon may say over `connection` that the mount is held by it
    given                                     the mount is another's: nothing is held any more
    end                                       the mount ends: nothing is held any more, here or by a service manager

A daemon that ends without `end`, while it is held and the mount stands, has crashed: its successor gets the
descriptors (--successor) and must say `hold` in time. Readers wait meanwhile, in the kernel. After too many crashes in
a short time, or too many successors that never served, the descriptors are closed, and readers get ENOTCONN. Signals
go to the daemon; its exit status becomes ours.

What is held is also given to the service manager (`mfs.manager`), should this process be killed; again each minute,
since that one may have been killed itself.

This process must not fail, and should cost little: nothing is imported but small modules.
"""

import os
import select
import signal
import socket
import sys
import time

from mfs import children, manager
from mfs.one_child import CRASHES_MAX, Crashes, OneChild

_SERVES_WITHIN_S = 60.0
_ANSWER_S = 30.0
_STORED_EVERY_S = 60.0  # a service manager, or a keeper, may have begun later than we, or again
_MESSAGE_BYTES_MAX = 1 << 16
_CONFIG_BYTES_MAX = 1 << 22
_OOM_SCORE = "-900"


class _Holder:
    def __init__(self, arguments: list[str]) -> None:
        self._config_fd = _memory_file(int(_taken(arguments, "--config-fd")))
        self._store = _taken(arguments, "--store") if "--store" in arguments else ""
        """As what the service manager keeps it, '' without one."""
        kept = _taken(list(arguments), "--successor") if "--successor" in arguments else ""
        self._held = [int(fd) for fd in kept.split(",") if fd]
        """device, lock, journal"""
        for fd in self._held:
            os.set_inheritable(fd, False)
        self._connection: socket.socket | None = None
        self._child, self._last = OneChild(), 0
        self._serves = self._ended = False
        self._is_kept = True
        """Whether the service manager, if there is one, took what is held."""
        self._arguments = arguments

    def run(self) -> int:
        """Returns the wait status of the last daemon."""
        ready = [int(_taken(list(self._arguments), "--ready-fd"))] if "--ready-fd" in self._arguments else []
        wait_s = _SERVES_WITHIN_S if self._held else None
        status = self._attend(self._arguments, self._held, ready, wait_s=wait_s)
        crashes = Crashes()
        while self._has_crashed():
            how = f"the daemon (pid {self._last}) {children.in_words(status)}"
            if not crashes.may_go_on(has_served=self._serves):
                self._say(f"{how}, after {CRASHES_MAX} others that did no better: the mount is given up")
                self._end()
                break
            self._say(f"{how}: starting the next one, readers wait")
            held = ",".join(map(str, self._held))
            status = self._attend(["--successor", held], self._held, [], wait_s=_SERVES_WITHIN_S)
        return status

    def _attend(self, arguments: list[str], fds: list[int], given: list[int], *, wait_s: float | None) -> int:
        """Start a daemon with these descriptors, and such as are its alone, and listen to it until it ends.

        Its wait status.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.lseek(self._config_fd, 0, os.SEEK_SET)
        own = ["--config-fd", str(self._config_fd), "--holder-fd", str(theirs.fileno())]
        self._serves = False
        inherited = [self._config_fd, theirs.fileno(), *fds, *given]

        def prepare() -> None:
            for fd in inherited:
                os.set_inheritable(fd, True)

        process = self._child.start(children.python("-m", "mfs.daemon", *own, *arguments), prepare)
        theirs.close()
        for fd in given:  # their end must be seen by whoever waits
            os.close(fd)
        until = None if wait_s is None else time.monotonic() + wait_s
        with ours:
            waiting: list[int | socket.socket] = [ours, process]
            while True:
                left = None if until is None or self._serves else max(0.0, until - time.monotonic())
                if self._serves and self._store and manager.is_named():
                    left = _STORED_EVERY_S
                ready = select.select(waiting, [], [], left)[0]
                if ours in ready:
                    if not self._listen(ours):
                        waiting.remove(ours)
                elif process in ready:
                    self._last, status = self._child.reap(process)
                    return status
                elif not ready and self._serves:
                    self._keep()
                elif not ready:
                    self._say(f"the daemon (pid {self._child.pid}) did not serve within {wait_s:g} s: it is killed")
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    until = None

    def _listen(self, sock: socket.socket) -> bool:
        """Do as the daemon says. Returns whether it may say more."""
        try:
            message, fds, _, _ = socket.recv_fds(sock, _MESSAGE_BYTES_MAX, 8, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return False
        is_ours = True
        if message == b"hold" and len(fds) == 4:
            with socket.socket(fileno=fds.pop()) as connection:
                is_ours = _tell(connection, b'{"ask": "held"}')
            _tell(sock, b"held" if is_ours else b"kept")
        if message == b"hold" and len(fds) == 3 and is_ours:
            self._let_go()
            self._held, self._serves = fds, True
            self._keep()
        elif message == b"giving" and len(fds) == 1:
            self._connection = socket.socket(fileno=fds[0])
        elif message == b"given":
            self._let_go()
            self._ended = True
        elif message == b"end":
            self._end()
        else:
            for fd in fds:
                os.close(fd)
        return bool(message)

    def _keep(self) -> None:
        """Give what is held to the service manager, if there is one."""
        if not (self._held and self._store and manager.is_named()):
            return
        was_kept, self._is_kept = self._is_kept, manager.store(self._store, self._held)
        if was_kept and not self._is_kept:
            self._say("NOTIFY_SOCKET does not take the mount's descriptors: should this process be killed, it is lost")
        elif self._is_kept and not was_kept:
            self._say("NOTIFY_SOCKET has the mount's descriptors now")

    def _has_crashed(self) -> bool:
        if self._ended or not self._held or not _is_connected(self._held[0]):
            return False
        if self._connection is not None and self._is_anothers(self._connection):
            self._let_go()
            return False
        return True

    def _is_anothers(self, connection: socket.socket) -> bool:
        """Our daemon was killed while it gave the mount away; whether the other one has it."""
        with connection:
            self._connection = None
            connection.settimeout(_ANSWER_S)
            _tell(connection, b'{"yours": true}')  # once more, should it not have come to that
            try:
                return bool(connection.recv(_MESSAGE_BYTES_MAX))
            except TimeoutError:  # it lives, and might answer yet: the kernel lets it no more, or shows that it has
                connection.shutdown(socket.SHUT_RD)
            except OSError:  # it has closed its end and not read our word: the kernel says that before what it said
                pass
            try:
                return bool(connection.recv(_MESSAGE_BYTES_MAX))
            except OSError:
                return False

    def _end(self) -> None:
        self._let_go()
        self._ended = True
        if self._store:
            manager.unstore(self._store)

    def _let_go(self) -> None:
        for fd in self._held:
            os.close(fd)
        self._held = []
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _say(self, text: str) -> None:
        """One line in the daemon's log, in its form (`mfs.logs`)."""
        import json  # only now: this process hardly ever says anything

        size = os.fstat(self._config_fd).st_size
        form = json.loads(os.pread(self._config_fd, size, 0)).get("log_format", "auto")
        now_s = time.time()
        millis = int(now_s % 1 * 1000)
        if form == "json" or (form == "auto" and not os.isatty(2)):
            at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s))
            said = {"time": f"{at}.{millis:03d}Z", "level": "WARNING", "process": "mfs", "pid": os.getpid(),
                    "logger": "mfs.holder", "message": text}  # fmt: skip
            line = json.dumps(said)
        else:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
            line = f"{at},{millis:03d} WARNING mfs[{os.getpid()}] mfs.holder: {text}"
        try:
            os.write(2, f"{line}\n".encode())
        except OSError:
            pass


def _taken(arguments: list[str], name: str) -> str:
    """The value of an argument, which is taken out of the list."""
    at = arguments.index(name)
    value = arguments[at + 1]
    del arguments[at : at + 2]
    return value


def _memory_file(fd: int) -> int:
    """What can be read from a descriptor, for every daemon to read: secrets in it never touch a disk."""
    found = os.memfd_create("mfs-config", os.MFD_CLOEXEC)
    with open(fd, "rb") as source, open(found, "wb", closefd=False) as file:
        file.write(source.read(_CONFIG_BYTES_MAX))
    if fd == 0:  # somebody else's file must not become standard input
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    return found


def _is_connected(device: int) -> bool:
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)


def _tell(connection: socket.socket, message: bytes) -> bool:
    """Whether it can hear that still."""
    try:
        connection.send(message)
    except OSError:
        return False
    return True


def main() -> None:
    """Hold one mount for as long as it stands."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # only root may lower it
            file.write(_OOM_SCORE)
    except OSError:
        pass
    children.end_as(_Holder(sys.argv[1:]).run())


if __name__ == "__main__":
    main()

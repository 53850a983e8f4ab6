"""A process that keeps mounts' descriptors for holders that may be killed with all around them: systemd's FD store,
where there is no systemd.

    python -m mfs.keeper SOCKET

In Kubernetes a driver's pod ends with every process in it. This one stands in another pod, which nobody has a reason to
replace, so the mounts outlive the driver: readers wait until the next one takes them up (`mfs.csi`). Root's alone.

    SOCKET        datagrams as a service manager gets them (`mfs.manager`): FDSTORE=1 and FDSTOREREMOVE=1 with a FDNAME;
                  descriptors with any other word are closed, which is what BARRIER=1 wants
    SOCKET.take   a SOCK_SEQPACKET connection: a name is asked, NAME.device, NAME.lock and NAME.journal are the answer,
                  as SCM_RIGHTS, or 'no' with none

What is kept of a mount goes when the mount does: its connection polls as an error. As little as the holder, this
process must fail; nothing is imported but small modules.
"""

import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

from mfs import manager

MOUNTS_MAX = 1024
_MESSAGE_BYTES_MAX = 4096
_FDS_MAX = 8
_NAME_BYTES_MAX = 255
_ANSWER_S = 5.0


class Keeper:
    """What is kept, and the two doors."""

    def __init__(self, path: str) -> None:
        """Raises: OSError if the sockets cannot be made."""
        self._kept: dict[str, dict[str, int]] = {}
        """Name of a mount -> kind -> descriptor."""
        self._store = _bound(socket.SOCK_DGRAM, path)
        self._store.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._take = _bound(socket.SOCK_SEQPACKET, os.path.splitext(path)[0] + ".take")
        self._take.listen(16)
        self._poll = select.poll()
        for sock in (self._store, self._take):
            self._poll.register(sock, select.POLLIN)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._store.fileno():
                    self._receive()
                elif fd == self._take.fileno():
                    with suppress(OSError):
                        self._give()
                else:  # the connection of a device has ended
                    for name in [name for name, kept in self._kept.items() if kept.get("device") == fd]:
                        self._drop(name)

    def _receive(self) -> None:
        try:
            message, controls, _, _ = self._store.recvmsg(
                _MESSAGE_BYTES_MAX, socket.CMSG_SPACE(_FDS_MAX * 4) + socket.CMSG_SPACE(12), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return
        fds, uid = list[int](), -1
        for _, kind, data in controls:
            if kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
            elif kind == socket.SCM_CREDENTIALS:
                _, uid, _ = struct.unpack("3i", data)
        words = dict(line.partition("=")[::2] for line in message.decode(errors="replace").splitlines())
        name, _, kind_of = words.get("FDNAME", "").rpartition(".")
        is_ours = uid == os.geteuid() and kind_of in manager.KINDS and 0 < len(name) <= _NAME_BYTES_MAX
        if is_ours and words.get("FDSTORE") == "1" and len(fds) == 1:
            self._keep(name, kind_of, fds.pop())
        elif is_ours and words.get("FDSTOREREMOVE") == "1":
            self._drop(name)
        for fd in fds:
            os.close(fd)

    def _keep(self, name: str, kind: str, fd: int) -> None:
        if name not in self._kept and len(self._kept) >= MOUNTS_MAX:
            os.close(fd)
            return
        kept = self._kept.setdefault(name, {})
        self._close(kept.pop(kind, -1))
        kept[kind] = fd
        if kind == "device":
            self._poll.register(fd, 0)  # an error is reported whatever one asks for

    def _drop(self, name: str) -> None:
        for fd in self._kept.pop(name, {}).values():
            self._close(fd)

    def _close(self, fd: int) -> None:
        if fd < 0:
            return
        with suppress(KeyError):
            self._poll.unregister(fd)
        os.close(fd)

    def _give(self) -> None:
        connection, _ = self._take.accept()
        with connection:
            connection.settimeout(_ANSWER_S)
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", peer)[1] != os.geteuid():
                return
            kept = self._kept.get(connection.recv(_NAME_BYTES_MAX).decode(errors="replace"), {})
            fds = [kept[kind] for kind in manager.KINDS if kind in kept]
            if len(fds) == len(manager.KINDS):
                socket.send_fds(connection, [b"yes"], fds)
            else:
                connection.send(b"no")


def _bound(kind: int, path: str) -> socket.socket:
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    return sock


def main() -> None:
    """Keep what is given, until told to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        keeper = Keeper(sys.argv[1])
    except OSError as error:
        sys.exit(f"mfs keep: {sys.argv[1]}: {error.strerror}")
    manager.notify("READY=1")
    keeper.run()


if __name__ == "__main__":
    main()

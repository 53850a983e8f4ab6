"""Files that the kernel reads by itself in place of asking us: FUSE passthrough, and which open nodes it is used for.

The kernel keeps one way of reading per node while anybody has it open: through its page cache of the node, which we
fill, or out of one backing file. To mix them is EIO from open(2). So a node that is open keeps its way; and a file that
has become whole while somebody reads it the old way gets another node for those who come (`NodeIds`), under the same
inode number for stat(2). Which node is read how is written down in `handles`.

Source: fs/fuse/passthrough.c, fs/fuse/backing.c, fs/fuse/iomode.c; struct fuse_backing_map. Since Linux 6.9.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Sequence

import trio

from mfs.fuse.device import Agreement
from mfs.tree.inodes import ROOT_INODE

_BACKING_OPEN, _BACKING_CLOSE = 0x4010E501, 0x4004E502  # _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t)
_BACKING_MAP = struct.Struct("<iIQ")
"""fuse_backing_map: fd, flags, padding"""
_NODE_ID = struct.Struct("<I")
logger = logging.getLogger(__name__)

_RENEWALS_MASK = 0xFF
_LINGER_S, _TOGETHER_S, _LINGERING_MAX = 10.0, 0.5, 1024
_CLOSING_MAX = 4  # threads that a disk which hangs may hold


class Passthrough:
    """What the kernel of one mount does by itself. Not possible until `connect` has tried."""

    def __init__(self) -> None:
        self._device = -1
        self._lingering: dict[int, tuple[int, float]] = {}
        """By node that is not open: its backing id, and time.monotonic() when that goes; the next to go first."""
        self._some = trio.Event()
        """Set while anything lingers, as far as was looked."""
        self._held: list[int] | None = None
        """Ids that were to be given back since `hold`."""
        self._limiter = trio.CapacityLimiter(_CLOSING_MAX)
        self.on_closed: Callable[[int], None] = lambda node: None
        """Told of a node whose lingering id is given back."""
        self.fault: str | None = "the mount is not connected"
        """Why whole files are read through us; None if the kernel reads them itself."""

    def connect(self, device: int, agreement: Agreement) -> None:
        """Find out whether it is possible. device: the caller's, for as long as this is used."""
        self._device = device
        if not agreement.has_passthrough:
            self.fault = f"Linux {os.uname().release} has none for this mount (6.9 and later have)"
            return
        fd = os.memfd_create("mfs-probe", os.MFD_CLOEXEC)
        try:
            self._close(self._open(fd))
            self.fault = None
        except OSError as error:
            is_right = error.errno == errno.EPERM
            why = "only root may ask for it (CAP_SYS_ADMIN)" if is_right else os.strerror(error.errno or 0)
            self.fault = f"the kernel refuses: {why}"
        finally:
            os.close(fd)

    def open(self, fd: int) -> int:
        """A backing id for a file that is open for reading; `fd` may be closed then. 0 where the kernel refuses it."""
        try:
            return self._open(fd)
        except OSError as error:
            if self.fault is None:
                stacked = error.errno == errno.ELOOP
                why = "the cache stands on an overlay" if stacked else os.strerror(error.errno or 0)
                self.fault = f"the kernel refuses its files: {why}"
                logger.warning("whole files are read through the daemon: %s", self.fault)
            return 0

    def _open(self, fd: int) -> int:
        request = bytearray(_BACKING_MAP.pack(fd, 0, 0))  # of bytes, fcntl would lose the id
        backing: int = fcntl.ioctl(self._device, _BACKING_OPEN, request, True)
        return backing

    def resume(self, node: int) -> int:
        """The backing id that a node had a moment ago, by which it is opened again; 0 if none is left."""
        return self._lingering.pop(node, (0, 0.0))[0]

    def linger(self, node: int, backing: int) -> None:
        """The last handle on a node has gone. Its id stays for a moment, since programs open a file more than once."""
        self.drop(node)
        self._lingering[node] = backing, time.monotonic() + _LINGER_S
        self._some.set()
        if len(self._lingering) > _LINGERING_MAX:
            self.drop(next(iter(self._lingering)))

    def drop(self, node: int) -> None:
        """Whatever lingers of a node is not to be used."""
        self._drop([node] if node in self._lingering else [])

    def hold(self) -> None:
        """Give no id back from now on: another daemon is told which there are."""
        self._held = []

    def go_on(self) -> None:
        """The mount stays ours: what was to be given back since `hold` is."""
        held, self._held = self._held, None
        self._close_soon(held or [])

    def let_go(self) -> None:
        """The mount is another daemon's, which finds in the journal what lingers. No id is given back any more."""
        self._lingering.clear()

    def drop_all(self) -> None:
        """Give back all that lingers."""
        self._drop(list(self._lingering))

    def _drop(self, nodes: Sequence[int]) -> None:
        self._close_soon([self._lingering.pop(node)[0] for node in nodes])
        for node in nodes:
            self.on_closed(node)

    async def run(self) -> None:
        """Give back the ids that nobody came back for, until cancelled."""
        while True:
            await self._some.wait()
            if self._lingering:
                first_s = next(iter(self._lingering.values()))[1]
                await trio.sleep(max(0.0, first_s - time.monotonic()) + _TOGETHER_S)
            now = time.monotonic()
            self._drop([node for node, (_, until_s) in self._lingering.items() if until_s <= now])
            if not self._lingering:
                self._some = trio.Event()

    def _close_soon(self, backings: Sequence[int]) -> None:
        """Give ids back; who has opened a file by one reads on. In a thread: where it was the last to hold a file
        without a name, the file system frees that now. One for all of them: several would contend for the interpreter.
        """
        if self._held is not None:
            self._held += backings
        elif backings:
            trio.lowlevel.spawn_system_task(self._close_all, backings)

    async def _close_all(self, backings: Sequence[int]) -> None:
        await trio.to_thread.run_sync(self._close_each, backings, abandon_on_cancel=True, limiter=self._limiter)

    def _close_each(self, backings: Sequence[int]) -> None:
        for backing in backings:
            try:
                self._close(backing)
            except OSError as error:  # the mount is gone, or another daemon's
                logger.info("backing id %d was not given back: %s", backing, error)

    def _close(self, backing: int) -> None:
        fcntl.ioctl(self._device, _BACKING_CLOSE, bytearray(_NODE_ID.pack(backing)), True)


class NodeIds:
    """How the kernel's nodes are numbered: by inode and, in its low byte, by how often it was renewed."""

    def __init__(self) -> None:
        self._renewals: dict[int, int] = {}

    @staticmethod
    def inode_of(node: int) -> int:
        """The inode that a node stands for."""
        return node & ~_RENEWALS_MASK if node != ROOT_INODE else ROOT_INODE

    def node_of(self, inode: int) -> int:
        """The node that whoever looks an inode up is told. A directory's is its inode."""
        return inode | self._renewals.get(inode, 0)

    def renew(self, inode: int) -> None:
        """Give an inode another node from now on. (Of 256; the first comes again after the last.)"""
        self._renewals[inode] = self._renewals.get(inode, 0) + 1 & _RENEWALS_MASK

    def renewals_of(self, inode: int) -> int:
        """How often an inode was given another node."""
        return self._renewals.get(inode, 0)

    def adopt(self, node: int, renewals: int) -> None:
        """Another daemon has told of a node, and had renewed its inode so often by then, or more often."""
        inode = self.inode_of(node)
        if renewals > self._renewals.get(inode, 0):
            self._renewals[inode] = renewals

    def forget(self, inode: int) -> None:
        """The kernel knows none of its nodes any more."""
        self._renewals.pop(inode, None)

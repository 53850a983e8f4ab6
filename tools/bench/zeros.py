"""A stub file system: one safetensors file whose header is real and whose weights are zeros. `zeros HEADER SIZE MNT`.

It answers at once, from memory, with no cache, no fetch and no bookkeeping: what is left is the price of FUSE and of
pyfuse3. The idea is mountpoint-s3's.
"""

from __future__ import annotations

import os
import stat
import sys

import pyfuse3
import trio

_NAME = b"model.safetensors"
_INODE = 2


class Zeros(pyfuse3.Operations):
    """Two inodes: the root and the file."""

    def __init__(self, header: bytes, size: int) -> None:
        super().__init__()
        self._header = header
        self._size = size
        self._zeros = memoryview(bytearray(1 << 20))

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = (stat.S_IFREG | 0o444) if inode == _INODE else (stat.S_IFDIR | 0o555)
        entry.st_size = self._size if inode == _INODE else 0
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name != _NAME:
            raise pyfuse3.FUSEError(2)
        return await self.getattr(_INODE)

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, _NAME, await self.getattr(_INODE), 1)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> memoryview | bytes:  # type: ignore[override]
        size = min(size, self._size - off)
        if off >= len(self._header):
            return self._zeros[:size]
        head = self._header[off : off + size]
        return head + bytes(size - len(head))


async def _serve() -> None:
    await pyfuse3.main()


def main() -> None:
    header_file, size, mountpoint = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with open(header_file, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(8 + length)
    pyfuse3.init(Zeros(header, size), mountpoint, {"ro", "fsname=zeros", "subtype=zeros"})
    try:
        trio.run(_serve)
    finally:
        pyfuse3.close(unmount=True)
        os._exit(0)


if __name__ == "__main__":
    main()

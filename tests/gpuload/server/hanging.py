"""A file system whose calls stop answering when told to: `python hanging.py MOUNTPOINT FILE`, the names on stdin.

It holds one file, "file", with FILE's bytes. A line "read getattr" on stdin makes those calls hang for ever, "read-on"
reads that are not of the beginning; each line is answered by one, as is the mount itself. Killing the process ends them
all, with errors.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio

_FILE = 2


class _Hanging(pyfuse3.Operations):  # type: ignore[misc]
    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content
        self.hangs: set[str] = set()

    async def _answer(self, name: str) -> None:
        if name in self.hangs:
            await trio.sleep_forever()

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        await self._answer("getattr")
        found = pyfuse3.EntryAttributes()
        found.st_ino, found.entry_timeout, found.attr_timeout = inode, 0, 0
        found.st_mode = 0o100444 if inode == _FILE else 0o40755
        found.st_size = len(self.content) if inode == _FILE else 0
        found.st_nlink = 1
        return found

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        await self._answer("lookup")
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_FILE)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._answer("read")
        if off:
            await self._answer("read-on")
        return self.content[off : off + size]

    async def flush(self, fh: int) -> None:
        await self._answer("flush")

    async def release(self, fh: int) -> None:
        await self._answer("release")

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        await self._answer("statfs")
        return pyfuse3.StatvfsData()

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        await self._answer("getxattr")
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)


async def _main(mountpoint: str, file: str) -> None:
    operations = _Hanging(Path(file).read_bytes())
    pyfuse3.init(operations, mountpoint, {"fsname=hanging"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("mounted", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            operations.hangs = set(line.split())
            print("told", flush=True)
        await trio.sleep_forever()


@contextmanager
def hanging_file(folder: Path, content: Path) -> Iterator[tuple[Path, Callable[[Sequence[str]], None]]]:
    """(the file, what makes calls on it hang); gone afterwards, and then those calls end."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(content)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def hang(names: Sequence[str]) -> None:
        print(*names, file=process.stdin, flush=True)
        assert process.stdout.readline() == "told\n"

    try:
        assert process.stdout.readline() == "mounted\n"
        yield folder / "file", hang
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["umount", "-l", str(folder)], check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    trio.run(_main, *sys.argv[1:])

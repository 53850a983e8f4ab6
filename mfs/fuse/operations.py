"""FUSE handlers: each says in the kernel's words what the namespace and the reader say in ours. No policy here.

Handlers may raise only FUSEError: `_translated` turns our errors into errno, logs what nobody foresaw, answers EIO.
pyfuse3 zero-fills a short reply, which would be silent corruption: `read` returns exactly what was asked for, clamped
to the end of the file, or raises.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import pyfuse3
import trio

from mfs.errors import MfsError, StoreError
from mfs.fuse.errnos import errno_of
from mfs.fuse.kernel import MAX_BACKGROUND
from mfs.fuse.repeats import FailedReads
from mfs.listing import Listing
from mfs.namespace import Namespace
from mfs.nodes import Directory, Node
from mfs.types import ByteRange, EntryKind
from mfs.workers.shares import Group, Shares, group_of_directory

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

_BLOCK_BYTES = 4096
_NAME_BYTES_MAX = 255
_MODES = {EntryKind.FILE: stat.S_IFREG | 0o444, EntryKind.DIRECTORY: stat.S_IFDIR | 0o555,
          EntryKind.SYMLINK: stat.S_IFLNK | 0o777}  # fmt: skip
_XATTR_PREFIX = "user.mfs."
_NAME_CACHE_S = 60.0
"""How long the kernel may believe a name without asking. A refresh tells it at once what changed; this bounds the harm
of a notification that gets lost."""
_INODE_CACHE_S = 3600.0
"""An inode never changes, so its attributes may be believed; directories change and are asked again after a second."""
_DIRECTORY_CACHE_S = 1.0
_ENTRIES_MAX = 256
"""Of one answer to readdir, about 2 ms: the kernel has room for thousands (10,000 took up to 148 ms) and asks again."""
_STORE_TIMEOUT_S = 2.0
_STORES_MAX = 4  # headers of one model on their way into the page cache, each in a thread


class OpenFile(Protocol):
    """An open object: what `Reader.open` returns."""

    size: int
    group: Group
    """Whose share of the handlers its readers use."""

    async def read(self, span: ByteRange) -> memoryview | bytes: ...

    async def settle(self) -> None: ...

    async def header(self) -> bytes | None: ...

    def export(self) -> list[Any]: ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Where bytes and attributes beyond the tree come from."""

    def open(self, node: Node) -> OpenFile: ...

    def reopen(self, exported: list[Any]) -> OpenFile:
        """A handle like the one that said this of itself with `OpenFile.export`."""
        ...

    async def attributes(self, node: Node) -> dict[str, str]: ...


@dataclass(frozen=True)
class OwnerConfig:
    """Who owns the files, as seen from outside."""

    uid: int
    gid: int
    umask: int = 0
    """Bits taken away from 0444 and 0555."""


@dataclass
class ReadCounters:
    """Reads answered to the kernel."""

    count: int = 0
    bytes: int = 0
    errors: int = 0
    waiting: int = 0


@dataclass
class _OpenDirectory:
    directory: Directory
    listing: Listing


def _translated(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    @functools.wraps(handler)
    async def wrapper(self: Operations, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except MfsError as error:
            opened = handler.__name__ == "read"
            logger.warning("%s: %s", handler.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error, opened=opened)) from None
        except Exception:
            logger.exception("unforeseen error in %s", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return cast("Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]", wrapper)


class Operations(pyfuse3.Operations):
    """One mounted tree."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, namespace: Namespace, reader: Reader, owner: OwnerConfig) -> None:
        super().__init__()
        self._namespace = namespace
        self._reader = reader
        self._owner = owner
        self._files: dict[int, OpenFile] = {}
        self._failed = FailedReads()
        self._open_directories: dict[int, _OpenDirectory] = {}
        self._handles_count = 0
        self._headed: set[int] = set()
        self._waiting = Shares(MAX_BACKGROUND)
        """Handlers that wait for a source: each holds a task, and reads ahead hold the kernel's queue as well."""
        self._storing = Shares(2 * _STORES_MAX)
        self._storing_limiter = trio.CapacityLimiter(4 * _STORES_MAX)
        self.counters = ReadCounters()

    @property
    def open_files_count(self) -> int:
        return len(self._files)

    # -- names

    @_translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        parent = self._directory(parent_inode)
        if len(name) > _NAME_BYTES_MAX:  # newer kernels send such names on (fs/fuse/dir.c, name_max)
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        if name == b".":
            node: Node | None = self._node(parent_inode)
        elif name == b"..":
            node = self._node(parent.parent.inode if parent.parent else parent_inode)
        else:
            with self._wait_for(group_of_directory(parent.source, parent.path)):
                node = await self._namespace.lookup(parent, name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self._namespace.remember(node.inode)
        return self._attributes(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self._namespace.forget(inode, count)
            self._headed.discard(inode)

    @_translated
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._node(inode))

    @_translated
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._node(inode).target.encode()

    @_translated
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return not mode & os.W_OK

    # -- directories

    @_translated
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        directory = self._directory(inode)
        with self._wait_for(group_of_directory(directory.source, directory.path)):
            listing = await self._namespace.listing(directory)
        handle = self._new_handle()
        self._open_directories[handle] = _OpenDirectory(directory, listing)
        return handle

    @_translated
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        opened = self._open_directories[fh]
        for index, name, node in self._namespace.nodes(opened.directory, opened.listing, start_id):
            if index == start_id + _ENTRIES_MAX:
                return
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), index + 1):
                return
            self._namespace.remember(node.inode)

    async def releasedir(self, fh: int) -> None:
        self._open_directories.pop(fh, None)

    # -- files

    @_translated
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        node = self._node(inode)
        if node.object is None:
            raise pyfuse3.FUSEError(errno.EISDIR if node.kind is EntryKind.DIRECTORY else errno.EINVAL)
        file = self._reader.open(node)
        try:
            with self._wait_for(file.group):
                await file.settle()
            if inode not in self._headed:
                self._headed.add(inode)
                await self._store_header(inode, file)
        except BaseException:  # the kernel will never hear of this handle
            file.close()
            raise
        handle = self._new_handle()
        self._files[handle] = file
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    async def _store_header(self, inode: int, file: OpenFile) -> None:
        """Put the file's header into the page cache before its first reader can fault on it.

        A fault on the first page would have the kernel read around it, 4 MiB for a header of some KiB: too much for a
        loader that opens all shards to look at their tables. Safe where `notify_store` otherwise deadlocks: it waits
        for pages that a READ in flight holds, but here nobody waits for it on this loop, so that READ gets its answer.
        Where that answer hangs, so does the thread; a model has no more of them than its share.
        """
        with self._wait_for(file.group):
            header = await file.header()
        if not header or not self._storing.may_take(file.group):
            return
        self._storing.take(file.group)
        ended = trio.Event()

        async def store() -> None:
            try:
                await trio.to_thread.run_sync(
                    pyfuse3.notify_store, inode, 0, header, abandon_on_cancel=True, limiter=self._storing_limiter
                )
            except Exception as error:  # the reader's own fault brings the bytes then
                logger.info("header not stored in the page cache: %s", error)
            finally:
                self._storing.give(file.group)
                ended.set()

        trio.lowlevel.spawn_system_task(store)  # it may outlive this handler
        with trio.move_on_after(_STORE_TIMEOUT_S):
            await ended.wait()

    @_translated
    async def read(self, fh: int, off: int, size: int) -> bytes:
        file = self._files[fh]
        span = ByteRange(min(off, file.size), min(off + size, file.size))
        if not len(span):
            return b""
        counters = self.counters
        counters.waiting += 1
        since_s = time.monotonic()
        try:
            self._failed.raise_if_repeated(fh, span)
            with self._wait_for(file.group):
                view = await file.read(span)
        except BaseException as error:
            counters.errors += 1
            self._failed.note(fh, span, error, since_s)
            raise
        finally:
            counters.waiting -= 1
        # no checkpoint from here to the reply: the view's slot may be recycled at the next one
        counters.count += 1
        counters.bytes += len(span)
        return cast(bytes, view)  # pyfuse3 replies from any contiguous buffer (handlers.pxi, PyObject_GetBuffer)

    async def release(self, fh: int) -> None:
        self._failed.forget(fh)
        file = self._files.pop(fh, None)
        if file is not None:
            file.close()

    async def flush(self, fh: int) -> None:
        """Closing a read-only file has nothing to write."""

    def _new_handle(self) -> int:
        self._handles_count += 1
        return self._handles_count

    def export(self) -> dict[str, Any]:
        """The handles that the kernel holds, for `restore` in another process."""
        return {
            "count": self._handles_count,
            "files": [[handle, file.export()] for handle, file in self._files.items()],
            "directories": [
                [handle, opened.directory.inode,
                 None if opened.listing is opened.directory.listing else opened.listing.export()]
                for handle, opened in self._open_directories.items()
            ],
            "headed": list(self._headed),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `export` described; the namespace is restored already."""
        self._handles_count = state["count"]
        self._files = {handle: self._reader.reopen(fields) for handle, fields in state["files"]}
        for handle, inode, fields in state["directories"]:
            directory = self._namespace.directory(inode)
            listing = Listing.restored(fields) if fields else directory.listing if directory else None
            if directory is not None and listing is not None:
                self._open_directories[handle] = _OpenDirectory(directory, listing)
        self._headed = set(state["headed"])

    def close_all(self) -> None:
        """Give back what the kernel will not release any more: the mount is gone."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._open_directories.clear()

    # -- the rest

    @_translated
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK_BYTES
        data.f_blocks = self._namespace.listed_bytes // _BLOCK_BYTES
        data.f_files = self._namespace.files_count
        data.f_namemax = _NAME_BYTES_MAX
        return data

    @_translated
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return [f"{_XATTR_PREFIX}{key}".encode() for key in await self._reader.attributes(self._node(inode))]

    @_translated
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        key = name.decode("utf-8", "replace")
        if not key.startswith(_XATTR_PREFIX):  # security.*, system.posix_acl_*: asked often, never there
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        value = (await self._reader.attributes(self._node(inode))).get(key.removeprefix(_XATTR_PREFIX))
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value.encode()

    # -- helpers

    @contextmanager
    def _wait_for(self, group: Group) -> Iterator[None]:
        """Hold a handler while a model may let it wait. Raises: StoreError where its share is used up."""
        if not self._waiting.may_take(group):
            raise StoreError(
                f"{self._waiting.held(group)} requests wait for this model already, more than its share of "
                f"{MAX_BACKGROUND}; the others go on"
            )
        self._waiting.take(group)
        try:
            yield
        finally:
            self._waiting.give(group)

    def _node(self, inode: int) -> Node:
        node = self._namespace.node(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return node

    def _directory(self, inode: int) -> Directory:
        directory = self._namespace.directory(inode)
        if directory is None:
            raise pyfuse3.FUSEError(errno.ENOTDIR if self._namespace.node(inode) else errno.ESTALE)
        return directory

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        directory = node.kind is EntryKind.DIRECTORY
        entry.st_ino = node.inode
        entry.st_mode = _MODES[node.kind] & ~self._owner.umask
        entry.st_nlink = 2 if directory else 1
        entry.st_size = node.size
        entry.st_blocks = -(-node.size // 512)
        entry.st_blksize = _BLOCK_BYTES
        entry.st_uid, entry.st_gid = self._owner.uid, self._owner.gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.mtime_ns
        entry.generation = 0
        entry.entry_timeout = _NAME_CACHE_S
        entry.attr_timeout = _DIRECTORY_CACHE_S if directory else _INODE_CACHE_S
        return entry

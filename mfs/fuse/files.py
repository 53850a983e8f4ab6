"""Handlers of files: open, read, release, and which files the kernel reads by itself.

The kernel takes a short answer to READ for the end of the file, which would be silent corruption: it is exactly what
was asked for, clamped to the end of the file, or an error.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import Any

from mfs.fuse import protocol
from mfs.fuse.backing import NodeIds, Passthrough
from mfs.fuse.handles import FileRow, OpenFiles
from mfs.fuse.headers import Headers
from mfs.fuse.journal import Journal
from mfs.fuse.loop import Beginning, Body, RefusedError, Waited
from mfs.fuse.patience import UnknownNodeError
from mfs.fuse.reader import OpenFile, Reader
from mfs.fuse.repeats import FailedReads
from mfs.fuse.waiting import Waiting
from mfs.tree.namespace import Namespace
from mfs.tree.nodes import Node
from mfs.types import ByteRange, EntryKind


@dataclass
class ReadCounters:
    """Reads answered to the kernel."""

    count: int = 0
    bytes: int = 0
    errors: int = 0
    waiting: int = 0


class FileOperations:
    """The files of one mounted tree."""

    def __init__(
        self, namespace: Namespace, reader: Reader, node_ids: NodeIds, journal: Journal, waiting: Waiting
    ) -> None:
        self._namespace = namespace
        self._reader = reader
        self._node_ids = node_ids
        self._waiting = waiting
        self.passthrough = Passthrough()
        self._open = OpenFiles(journal, reader.reopen, self._all_closed)
        self.passthrough.on_closed = self._open.forget_backing
        self._disowned: set[int] = set()
        """Open nodes whose backing file is not what it should be."""
        self._failed = FailedReads()
        self._headers = Headers()
        self._headed: set[int] = set()
        """Nodes whose header was stored, or tried to be."""
        self.counters = ReadCounters()

    @property
    def open_count(self) -> int:
        """Handles on files."""
        return len(self._open)

    @property
    def passed_through_count(self) -> int:
        """Handles that the kernel reads by itself."""
        return self._open.passed_through_count

    def entry(self, node: int) -> Node:
        """What a node stands for. Raises: UnknownNodeError."""
        found = self._namespace.node(self._node_ids.inode_of(node))
        if found is None:
            raise UnknownNodeError
        return found

    # -- open

    def open(self, node: int, body: memoryview) -> Body | Waited:
        """A handle on the object version that the node stands for."""
        (flags,) = protocol.OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise RefusedError(errno.EROFS)
        entry = self.entry(node)
        if entry.object is None:
            raise RefusedError(errno.EISDIR if entry.kind is EntryKind.DIRECTORY else errno.EINVAL)
        if node in self._disowned:
            raise RefusedError(errno.ESTALE)  # open(2) then looks the name up once more (fs/namei.c, do_filp_open)
        file = self._reader.open(entry)
        way = self._open.way_of(node)
        if file.settled:
            if way is None and file.is_whole and (backing := self.passthrough.resume(node)):
                return self._opened(node, entry, file, backing)
            is_headed = node in self._headed or not file.has_header
            if way or (is_headed and (way == 0 or not self._may_pass_through(file))):
                return self._opened(node, entry, file, way or 0)
        return self._open_unsettled(node, entry, file)

    def _may_pass_through(self, file: OpenFile) -> bool:
        return self.passthrough.fault is None and file.may_be_whole

    async def _open_unsettled(self, node: int, entry: Node, file: OpenFile) -> Body:
        whole: FileIO | None = None
        try:
            with self._waiting.for_(file.group):
                await file.settle()
                if self._may_pass_through(file) and self._open.way_of(node) is None:
                    whole = await file.whole()
                if whole is None:
                    await self._store_header(node, file)
            # no checkpoint from here to the answer: the way that a node is read is one for all who open it
            way = self._open.way_of(node)
            if way is None:
                self.passthrough.drop(node)
                way = self.passthrough.open(whole.fileno()) if whole is not None else 0
        except BaseException:  # the kernel will never hear of this handle
            file.close()
            raise
        finally:
            if whole is not None:
                whole.close()
        return self._opened(node, entry, file, way)

    async def _store_header(self, node: int, file: OpenFile) -> None:
        if node in self._headed:
            return
        self._headed.add(node)
        header = await file.header()
        if header:
            await self._headers.store(node, header, file.group)

    def _opened(self, node: int, entry: Node, file: OpenFile, backing: int) -> Body:
        """backing: the id of the file that the kernel is to read, 0 for us."""
        handle = self._open.add(node, entry, file, backing, self._node_ids.renewals_of(entry.inode))
        if backing:
            file.pass_through()
            return (protocol.open_answer(handle, protocol.PASSTHROUGH | protocol.NO_FLUSH, backing),)
        return (protocol.open_answer(handle, protocol.KEEP_CACHE | protocol.NO_FLUSH),)

    # -- read

    def read(self, node: int, body: memoryview) -> Body | Beginning:
        """Bytes of an open file."""
        handle, start, size = protocol.READ_IN.unpack_from(body)
        file = self._open.get(node, handle) or self._open.of_entry(node, self.entry(node))
        span = ByteRange(min(start, file.size), min(start + size, file.size))
        if not len(span):
            return ()
        answer = file.read_nowait(span)
        if answer is None:
            return partial(self._begin_missing, handle, file, span)
        self._count_read(span)
        return answer

    def _begin_missing(self, handle: int, file: OpenFile, span: ByteRange, unique: int | None) -> Waited:
        """Order what is missing now, not when its task runs; who brings it answers, and the books are the task's."""
        head = None if unique is None else protocol.answer_head(len(span), unique)
        try:
            self._failed.raise_if_repeated(handle, span)
            self._waiting.check(file.group)
            begun = file.begin(span, head)
        except BaseException:
            self.counters.errors += 1
            raise
        return self._read_missing(handle, file, span, begun)

    async def _read_missing(self, handle: int, file: OpenFile, span: ByteRange, begun: Any) -> Body:
        counters = self.counters
        counters.waiting += 1
        since_s = time.monotonic()
        try:
            with self._waiting.for_(file.group):
                answer = await file.read(span, begun)
        except BaseException as error:
            counters.errors += 1
            self._failed.note(handle, span, error, since_s)
            raise
        finally:
            counters.waiting -= 1
        # no checkpoint from here to the reply: the chunks may be given up at the next one
        self._count_read(span)
        return answer

    def _count_read(self, span: ByteRange) -> None:
        self.counters.count += 1
        self.counters.bytes += len(span)

    # -- the end of a handle

    def release(self, node: int, body: memoryview) -> Body:
        """The handle is closed, everywhere."""
        (handle,) = protocol.RELEASE_IN.unpack_from(body)
        self._failed.forget(handle)
        self._open.release(node, handle)
        return ()

    def flush(self, node: int, body: memoryview) -> Body:
        """Closing a read-only file has nothing to write."""
        return ()

    def forget(self, node: int) -> None:
        """The kernel knows an inode no more, as far as we know, of which this node was the last."""
        self._headed.discard(node)
        self._open.forget(node)
        inode = self._node_ids.inode_of(node)
        # What a daemon that was killed had told the kernel of is not counted: a node that nobody is given may be open.
        if not any(self._node_ids.inode_of(other) == inode for other in self._disowned):
            self._node_ids.forget(inode)

    def _all_closed(self, node: int, backing: int) -> None:
        if backing:
            self.passthrough.linger(node, backing)
        if node in self._disowned:
            self._disowned.discard(node)
            self.passthrough.drop(node)

    # -- files that become whole, and others

    def renew(self, state: object) -> list[tuple[int, str]]:
        """An object has become whole: whoever opens it from now on gets another node than who reads it through us.

        Returns the names to look up again: (inode of the directory, name).
        """
        return self._renew(node for node in self._open.nodes_of(state) if not self._open.way_of(node))

    def disown(self, state: object | None) -> list[tuple[int, str]]:
        """An object's whole file turned out damaged: nobody else is given it. Who has it open cannot be told.

        state: None if nobody has it open.

        Returns the names to look up again, as `renew` does.
        """
        self.passthrough.drop_all()
        if state is None:
            return []
        given = {node for node in self._open.nodes_of(state) if self._open.way_of(node)}
        self._disowned |= given
        return self._renew(given)

    def _renew(self, nodes: Iterable[int]) -> list[tuple[int, str]]:
        names = []
        for node in nodes:
            inode = self._node_ids.inode_of(node)
            if self._node_ids.node_of(inode) == node:
                self._node_ids.renew(inode)
                names += self._namespace.names_of(inode)
            renewals = self._node_ids.renewals_of(inode)
            self._open.note_renewal(node, renewals, is_disowned=node in self._disowned)
        return names

    # -- from one daemon to the next

    def export(self) -> list[int]:
        """What the journal does not say."""
        return list(self._headed)

    def restore(self, state: list[int]) -> None:
        """Go on with what `export` said."""
        self._headed = set(state)

    def inherit(self, journal: Journal) -> list[tuple[int, str]]:
        """Go on where the daemon stopped whose journal this is.

        Returns the names that lead to other nodes by now, as `renew` does: a daemon that was killed may not have come
        to tell the kernel, which would go on opening the old ones for as long as anybody has them open.
        """
        self._open = OpenFiles(journal, self._reader.reopen, self._all_closed)
        self.passthrough.on_closed = self._open.forget_backing
        for node, row in journal.rows():
            if row[0] == EntryKind.DIRECTORY:
                continue
            file = FileRow(*row)
            self._node_ids.adopt(node, file.renewals)
            if file.is_disowned:
                self._disowned.add(node)
            if file.handles_count:
                self._namespace.adopt_file(file.entry(node))
                self._open.inherit(node, file)
            else:
                self.passthrough.linger(node, file.backing)
        files = [(node, FileRow(*row)) for node, row in journal.rows() if row[0] != EntryKind.DIRECTORY]
        return [
            self._namespace.adopted_name(file.entry(node))
            for node, file in files
            if node != self._node_ids.node_of(self._node_ids.inode_of(node))
        ]

    def close_all(self) -> None:
        """Give back what the kernel will not release any more: the mount is gone."""
        self._open.close_all()

"""What goes with publishing a tree where there is an SSD tier: times are written down, small files are brought ahead.

The tree itself is `namespace`'s, looking again `refresh`'s; neither waits for anything here but `prepare`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import trio

from mfs.errors import MfsError
from mfs.tree.listing import Listing
from mfs.tree.namespace import Identity, Namespace
from mfs.tree.nodes import Changes, Directory
from mfs.tree.record import Row, Shown, TreeRecord
from mfs.tree.refresh import Next
from mfs.tree.small_files import SmallFiles, Wanted, small_files

logger = logging.getLogger(__name__)

_BATCH = 64  # small files brought together
_REVISIT_PARALLEL, _REVISITED_MAX = 4, 2000
_TURN_S = 0.005  # without giving way to readers


class Publication:
    """The company of one namespace."""

    def __init__(
        self, namespace: Namespace, identity: Identity, record: TreeRecord, files: SmallFiles, *, timeout_s: float
    ) -> None:
        """timeout_s: for the new small files of one model."""
        self._namespace = namespace
        self._identity = identity
        self._record = record
        self._small_files = files
        self._timeout_s = timeout_s
        self._new: dict[Directory, None] = {}
        """Published, and their small files not looked at yet."""
        self.writing = trio.Semaphore(1, max_value=1)
        """Held while the record is written. Whoever hands the mount over keeps it: times that the next daemon does not
        know of never reach the record, and its own are not overwritten."""
        self._unrecorded: dict[Directory, None] = {}
        """Published or removed, and that not yet written down, in that order."""
        self._gone: dict[tuple[int, str], None] = {}
        """(source, path) of those that went while nothing was mounted, and that not yet written down."""
        self._something_new = trio.Event()
        self._something_unrecorded = trio.Event()
        self._small_files_there = trio.Event()
        """Set once none are missing of what is shown first."""
        self._revisited = trio.Event()
        namespace.on_published = self._published

    async def recall(self, identities: Sequence[str]) -> None:
        """Before anything is listed: what directories of these sources showed when they were last mounted.

        Cancellation: they are not known; what a disk that hangs still says is dropped.
        """
        records, latest_ns = await trio.to_thread.run_sync(self._record.load, identities, abandon_on_cancel=True)
        self._namespace.adopt_records(records, latest_ns)

    async def show_last(self, top: Directory) -> bool:
        """Publish what a source's directories showed on the last mount, since the origin does not say. Whether there
        was anything. Cancellation: as much is shown as is known by then.
        """
        identity = self._identity(top.source)
        found = await trio.to_thread.run_sync(self._record.shown, identity, abandon_on_cancel=True)
        if "" not in found:
            return False
        for path, listing in found.items():
            directory = self._namespace.below(top, path)
            if directory is not None and directory.listing is None:
                self._namespace.publish(directory, listing, Changes())
            await trio.lowlevel.checkpoint()
        return True

    async def run(self) -> None:
        """Look after what is published, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._revisit)
            nursery.start_soon(self._keep_record)
            nursery.start_soon(self._bring_small_files)

    async def wait_settled(self) -> None:
        """Until what was looked into on the last mount is listed, and the small files shown first are here."""
        await self._revisited.wait()
        await self._small_files_there.wait()

    async def prepare(self, source: int, coming: Sequence[Next]) -> None:
        """Before a model is published: its new small files come first. Raises: MfsError if they do not."""
        wanted = chain.from_iterable(self._small(source, path, new, old) for path, new, old in coming)
        await self._small_files.bring_for_publication(wanted, timeout_s=self._timeout_s)

    async def write_record(self) -> None:
        """Write down what was published since the last time. What cannot be written now comes with the next.

        Cancellation: nothing is lost.
        """
        directories, self._unrecorded = self._unrecorded, {}
        gone, self._gone = self._gone, {}
        is_saved = False
        try:
            rows, shown = list[Row](), list[Shown]()
            absent = [(self._identity(source), path) for source, path in gone]
            turn_ends = time.monotonic() + _TURN_S
            for d in directories:
                if d.removed:
                    absent.append((self._identity(d.source), d.path))
                elif d.listing is not None:
                    times = d.listing.mtimes.tobytes()
                    rows.append((self._identity(d.source), d.path, d.mtime_ns, d.listing.fingerprint(), times))
                    shown.append((self._identity(d.source), d.path, d.listing.export()))
                if time.monotonic() > turn_ends:
                    await trio.lowlevel.checkpoint()
                    turn_ends = time.monotonic() + _TURN_S
            if rows or absent:
                is_saved = await trio.to_thread.run_sync(self._record.save, rows, absent, shown)
        finally:
            if not is_saved:
                self._unrecorded = directories | self._unrecorded
                self._gone = gone | self._gone

    def unrecorded(self) -> list[int]:
        """Inodes of directories that are still to be written down."""
        return [directory.inode for directory in self._unrecorded]

    def record_again(self, inodes: Sequence[int]) -> None:
        """Write down what another daemon did not come to."""
        for inode in inodes:
            if (directory := self._namespace.directory(inode)) is not None:
                self._published(directory)

    def _published(self, directory: Directory) -> None:
        """Told by the namespace; nothing may wait here."""
        self._unrecorded[directory] = self._new[directory] = None
        self._something_unrecorded.set()
        self._something_new.set()

    async def _keep_record(self) -> None:
        while True:
            await self._something_unrecorded.wait()
            self._something_unrecorded = trio.Event()  # here: nobody else may exchange what is waited for
            async with self.writing:
                await self.write_record()

    async def _revisit(self) -> None:
        """List what was looked into last time: what changed while nothing was mounted shows in its directory's time
        before somebody reads that. What is gone leaves the record.
        """
        places, left_count = deque(self._namespace.recorded()), _REVISITED_MAX
        tops = {top.source: top for top in self._namespace.tops()}

        async def work() -> None:
            nonlocal left_count
            while places and left_count:
                source, path = places.popleft()
                await trio.lowlevel.checkpoint()
                if self._is_gone(source, path):
                    continue
                left_count -= 1
                with contextlib.suppress(MfsError):  # whoever looks next hears of it
                    node = await self._namespace.resolve("/".join(filter(None, (tops[source].full_path, path))))
                    directory = self._namespace.directory(node.inode)
                    if directory is not None:
                        await self._namespace.listing(directory)
                self._is_gone(source, path)

        async with trio.open_nursery() as nursery:
            for _ in range(_REVISIT_PARALLEL):
                nursery.start_soon(work)
        self._revisited.set()

    def _is_gone(self, source: int, path: str) -> bool:
        is_gone = self._namespace.forget_record(source, path)
        if is_gone:
            self._gone[source, path] = None
            self._something_unrecorded.set()
        return is_gone

    async def _bring_small_files(self) -> None:
        """Those of directories that are listed for the first time; after a refresh there is nothing left to do."""
        while True:
            await self._something_new.wait()
            self._something_new = trio.Event()
            directories, self._new = self._new, {}
            batch, turn_ends = list[Wanted](), time.monotonic() + _TURN_S
            for directory in directories:
                coming = self._small(directory.source, directory.path, directory.listing or Listing())
                while self._small_files.has_allowance and (part := list(islice(coming, _BATCH))):
                    batch += part
                    if len(batch) >= _BATCH:
                        await self._bring_unasked(batch)
                        batch = []
                if time.monotonic() > turn_ends:
                    await trio.lowlevel.checkpoint()
                    turn_ends = time.monotonic() + _TURN_S
            await self._bring_unasked(batch)
            self._small_files_there.set()

    async def _bring_unasked(self, wanted: Sequence[Wanted]) -> None:
        try:
            await self._small_files.bring_unasked(wanted)
        except MfsError as error:
            logger.info("small files come when they are read: %s", error)

    def _small(self, source: int, path: str, new: Listing, old: Listing | None = None) -> Iterator[Wanted]:
        for index in small_files(new, old):
            yield new.entry(index).object_at(self._identity(source), path), source

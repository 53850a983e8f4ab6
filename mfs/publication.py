"""What goes with publishing a tree where there is an SSD tier: times are written down, small files are brought ahead.

The tree itself is `namespace`'s, looking again `refresh`'s; neither waits for anything here but `prepare`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import trio

from mfs.errors import MfsError
from mfs.listing import Listing
from mfs.namespace import Directory, Identity, Namespace
from mfs.refresh import Next
from mfs.small_files import SmallFiles, Wanted, small_files
from mfs.tree_record import TreeRecord

logger = logging.getLogger(__name__)

_BATCH = 64  # small files brought together
_REVISIT_PARALLEL, _REVISITED_MAX = 4, 2000


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
        self._unrecorded: dict[Directory, None] = {}
        """Published, and not yet written down, in that order."""
        self._something_new = trio.Event()
        self._something_unrecorded = trio.Event()
        self._small_files_there = trio.Event()
        """Set once none are missing of what is shown first."""
        self._revisited = trio.Event()
        namespace.on_published = self._published

    async def recall(self, identities: Sequence[str]) -> None:
        """Before anything is listed: what directories of these sources showed when they were last mounted."""
        records, latest_ns = await trio.to_thread.run_sync(self._record.load, identities)
        self._namespace.adopt_records(records, latest_ns)

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
        wanted = [item for path, new, old in coming for item in self._small(source, path, new, old)]
        await self._small_files.bring_for_publication(wanted, timeout_s=self._timeout_s)

    async def write_record(self) -> None:
        """Write down what was published since the last time."""
        self._something_unrecorded = trio.Event()
        directories, self._unrecorded = list(self._unrecorded), {}
        rows = [
            (self._identity(d.source), d.path, d.mtime_ns, d.listing.fingerprint(), d.listing.mtimes.tobytes())
            for d in directories
            if d.listing is not None and not d.removed
        ]
        if rows:
            await trio.to_thread.run_sync(self._record.save, rows)

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
            await self.write_record()

    async def _revisit(self) -> None:
        """List what was looked into last time: what changed while nothing was mounted shows in its directory's time
        before somebody reads that.
        """
        places = list(reversed(self._namespace.recorded()[:_REVISITED_MAX]))
        tops = {top.source: top for top in self._namespace.tops()}

        async def work() -> None:
            while places:
                source, path = places.pop()
                with contextlib.suppress(MfsError):  # gone, or whoever looks next hears of it
                    node = await self._namespace.resolve("/".join(filter(None, (tops[source].full_path, path))))
                    directory = self._namespace.directory(node.inode)
                    if directory is not None:
                        await self._namespace.listing(directory)

        async with trio.open_nursery() as nursery:
            for _ in range(_REVISIT_PARALLEL):
                nursery.start_soon(work)
        self._revisited.set()

    async def _bring_small_files(self) -> None:
        """Those of directories that are listed for the first time; after a refresh there is nothing left to do."""
        while True:
            await self._something_new.wait()
            self._something_new = trio.Event()
            directories, self._new = list(self._new), {}
            wanted: list[Wanted] = []
            for directory in directories:
                if directory.listing is not None and self._small_files.has_allowance:
                    wanted += self._small(directory.source, directory.path, directory.listing)
                if len(wanted) >= _BATCH or directory is directories[-1]:
                    batch, wanted = wanted, []
                    try:
                        await self._small_files.bring_unasked(batch)
                    except MfsError as error:
                        logger.info("small files come when they are read: %s", error)
            self._small_files_there.set()

    def _small(self, source: int, path: str, new: Listing, old: Listing | None = None) -> Iterator[Wanted]:
        for index in small_files(new, old):
            yield new.entry(index).object_at(self._identity(source), path), source

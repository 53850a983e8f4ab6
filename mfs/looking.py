"""Looking at the origins: when the mount begins, from time to time, when somebody asks, and after a crash.

What is shown next is `tree.refresh`'s business and `tree.publication`'s; here stands when it is looked, what is kept of
what an origin said, and what is done about one that is away.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from mfs.config import MountConfig
from mfs.errors import MfsError, StoreError
from mfs.metrics.tally import Tally
from mfs.registry.layout import names_revision
from mfs.several import for_each
from mfs.tree.listing import Drafts
from mfs.tree.namespace import Lister, Namespace
from mfs.tree.nodes import Changes, Directory
from mfs.tree.publication import Publication
from mfs.tree.refresh import Next, Refresher, Tell
from mfs.types import Entry, EntryKind
from mfs.workers.frames import Frame
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_SOURCES_AT_ONCE = 16
_AWAY_S = 10.0  # between looks at an origin that was away when the mount began
_REFRESH_SOON_S = 2.0
_RECALL_S = 15.0  # for the record of what was shown; its disk may hang


@dataclass
class Asked:
    """A listing, for whoever wants to know what is waited for."""

    since_s: float
    """time.monotonic() when it was asked for."""
    until: str
    """Time of day when it is given up."""
    is_answered: bool = False
    fault: str = ""
    """Why it is asked for again; '' if the origin has said nothing at all."""


class Listings:
    """Has workers list directories at the origins."""

    def __init__(self, pool: WorkerPool, tally: Tally, *, timeout_s: float) -> None:
        """timeout_s: for one listing, retries included."""
        self._pool = pool
        self._tally = tally
        self._timeout_s = timeout_s
        self.asked: dict[int, Asked] = {}
        """The last listing of each source."""

    async def list(self, source: int, path: str, drafts: Drafts) -> None:
        """Draw up what a directory of a source contains, and what comes along below it. Raises: MfsError."""
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + self._timeout_s))
        asked = self.asked[source] = Asked(time.monotonic(), until)

        def on_part(part: Frame) -> None:
            if "again" in part:
                drafts.clear()
            elif "waiting" in part:
                asked.fault = part["waiting"]
            else:
                asked.is_answered = True
                directory, entries = part["page"]
                drafts.add(directory, map(_entry, entries))

        try:
            await self._pool.call(
                "list_directory", source=source, path=path, timeout_s=self._timeout_s, on_part=on_part
            )
        except MfsError as error:
            self._tally.list_failed(error)
            raise
        finally:
            asked.is_answered = True


def _entry(fields: list[object]) -> Entry:
    name, kind, *rest = fields
    return Entry(name, EntryKind(kind), *rest)  # type: ignore[arg-type]


@dataclass
class LastLook:
    """What the last look at a source said."""

    at: float = 0.0
    """Seconds since the epoch; 0: none yet."""
    errors: list[str] = field(default_factory=list)


class Looking:
    """Looks at all sources of a mount."""

    def __init__(
        self, config: MountConfig, namespace: Namespace, lister: Lister, publication: Publication | None,
        *, tell: Tell, is_ours: Callable[[], bool],
    ) -> None:  # fmt: skip
        """publication: where there is an SSD tier, which knows what was shown before.
        tell: told what the kernel is to ask for again.
        is_ours: whether the mount is no other daemon's, who would look himself.
        """
        self._refresh_s = config.refresh_s
        self._namespace = namespace
        self._publication = publication
        self._is_ours = is_ours
        self._refresher = Refresher(
            namespace, lister, self._prepare, tell, lambda source: names_revision(config.sources[source].url)
        )
        self.last = [LastLook() for _ in config.sources]
        """By source."""
        self._away: dict[int, str] = {}
        """Sources that have not answered since the mount began, and what is to be said of that."""
        self._soon = [trio.Event() for _ in config.sources]

    @property
    def warnings(self) -> list[str]:
        """Of sources that are away."""
        return list(self._away.values())

    def look_soon(self, source: int) -> None:
        """Have a source looked at soon: it answered with another version than listed."""
        self._soon[source].set()

    async def first(self) -> None:
        """List every root: an endpoint, bucket or credential that is wrong is said now, not at the first read.

        Of an origin that is away (StoreError) what the last mount showed is shown again, and looked at soon.
        Raises: MfsError, the first of all.
        """
        self.last = [LastLook(time.time()) for _ in self.last]
        await for_each(self._namespace.tops(), self._first_at, at_once=_SOURCES_AT_ONCE)

    async def _first_at(self, top: Directory) -> None:
        try:
            await self._namespace.listing(top)
        except MfsError as error:
            named = type(error)(f"source {top.name!r}: {error}") if top.name else error
            publication = self._publication if isinstance(error, StoreError) else None
            if publication is None or not await publication.show_last(top):
                raise named from error
            self._note_away(top, f"{named}; until it answers, what the last mount showed is shown")
            logger.warning("%s", self._away[top.source])
            self.last[top.source] = LastLook(0.0, [str(error)])

    async def show_last(self, identities: Sequence[str]) -> None:
        """Show what a daemon that was killed has shown, as far as the SSD tier knows; the rest when somebody looks."""
        if self._publication is None:
            return
        with trio.move_on_after(_RECALL_S) as scope:  # readers wait
            await self._publication.recall(identities)
            for top in self._namespace.tops():
                await self._publication.show_last(top)
        if scope.cancelled_caught:
            logger.warning("what was shown before could not be read within %g s: going on without", _RECALL_S)

    async def after_crash(self) -> None:
        """See what has changed since a daemon was killed."""
        await for_each(self._namespace.tops(), self._after_crash_at, at_once=_SOURCES_AT_ONCE)

    async def _after_crash_at(self, top: Directory) -> None:
        try:
            await self._namespace.listing(top)
            changes = await self._refresh(top.source)
            said = changes.errors[0] if changes.errors else ""
        except MfsError as error:
            said = str(error)
        if said:
            self._note_away(top, f"source {top.name!r}: {said}; until it answers, what was shown before is shown")

    def _note_away(self, top: Directory, said: str) -> None:
        self._away[top.source] = said
        self._soon[top.source].set()

    async def refresh(self) -> Changes:
        """List all sources again and publish what changed. Cancellation: what was published stays."""
        changes = Changes()

        async def look(source: int) -> None:
            found = await self._refresh(source)
            changes.added_count += found.added_count
            changes.changed_count += found.changed_count
            changes.removed_count += found.removed_count
            changes.errors += found.errors
            changes.names += found.names

        async with trio.open_nursery() as nursery:
            for source in range(len(self.last)):
                nursery.start_soon(look, source)
        return changes

    async def _refresh(self, source: int) -> Changes:
        changes = await self._refresher.refresh(source)
        self.last[source] = LastLook(time.time(), changes.errors)
        for line in changes.errors:
            logger.warning("refresh: %s", line)
        return changes

    async def keep_fresh(self) -> None:
        """Look regularly, and when a source answered with another version than listed; then not all the time.

        Returns when the mount is another daemon's.
        """
        async with trio.open_nursery() as nursery:
            for source in range(len(self.last)):
                nursery.start_soon(self._keep_fresh, source)

    async def _keep_fresh(self, source: int) -> None:
        while True:
            with trio.move_on_after(math.inf if self._refresh_s is None else self._refresh_s):
                await self._soon[source].wait()
            was_told = self._soon[source].is_set()
            self._soon[source] = trio.Event()
            if not self._is_ours():
                return
            changes = await self._refresh(source)
            if source in self._away:  # nobody has asked it yet what there is: until it says so
                if changes.errors:
                    self._soon[source].set()
                    await trio.sleep(_AWAY_S)
                else:
                    del self._away[source]
            if was_told:
                await trio.sleep(_REFRESH_SOON_S)

    async def _prepare(self, source: int, coming: Sequence[Next]) -> None:
        if self._publication is not None:
            await self._publication.prepare(source, coming)

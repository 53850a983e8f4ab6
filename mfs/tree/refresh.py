"""Looking again: lists what was listed, and publishes what changed, one model at a time.

A *unit* is what is published in one turn: each directory at the root of a source, or the whole source where its root is
a model itself, or a revision of a registry. Of a unit everything is listed first, what was looked into before and what
is new in it; then what must be there beforehand is brought (`prepare`); then all its directories change between two
checkpoints. So no reader sees half of a new version, and a unit that cannot be listed or prepared keeps its old tree
while the others go on.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from mfs.errors import AccessError, MfsError, NotFoundError
from mfs.several import for_each
from mfs.tree.listing import Drafts, Listing
from mfs.tree.namespace import Lister, Namespace
from mfs.tree.nodes import Changes, Directory
from mfs.types import EntryKind

logger = logging.getLogger(__name__)

_PARALLEL = 4  # listings of one unit
_UNITS_PARALLEL = 8
"""Seven models that hang keep no other back; the workers' bound on listings leaves readers some beside that."""
_NEW_LISTINGS_MAX = 1000
"""Directories listed because they are new, for one unit; those beyond are listed when somebody looks."""
_TURN_S = 0.005  # without giving way to readers
_MODEL_TURN_S = 0.25  # ... to change one model: of one with more names than that, some change later than others
_UNITS_PER_TURN = 64
_DIRECTORIES_PER_LOOK = 64  # at the clock
_MODEL_FILE = re.compile(rb"config\.json|config\.pbtxt|model_index\.json|.*\.(safetensors|gguf|onnx|bin|pt|pth)")

Next = tuple[str, Listing, Listing | None]
"""(directory path inside the source, what it shows next, what it shows now)."""
Prepare = Callable[[int, Sequence[Next]], Awaitable[None]]
"""(source, what is about to be published). An MfsError keeps it from that."""
Tell = Callable[[Sequence[tuple[int, str]]], None]
"""Told at once which (directory inode, name) mean something else from now on. Nothing may wait there."""


class Refresher:
    """Refreshes one namespace."""

    def __init__(
        self, namespace: Namespace, lister: Lister, prepare: Prepare, tell: Tell = lambda names: None,
        is_revision: Callable[[int], bool] = lambda source: False,
    ) -> None:  # fmt: skip
        """is_revision: whether all of a source, by its number, is one revision of something: one unit, whatever is in
        it.
        """
        self._namespace = namespace
        self._lister = lister
        self._prepare = prepare
        self._tell = tell
        self._is_revision = is_revision
        self._refreshing: dict[int, trio.Lock] = {}

    async def refresh(self, source: int) -> Changes:
        """List again what was listed of a source, publish what changed. What fails keeps its old tree and is named.

        Cancellation: what was published stays.
        """
        changes = Changes()
        # Of two at once, the first could publish last.
        async with self._refreshing.setdefault(source, trio.Lock()):
            for top in self._namespace.tops():
                if top.source == source and top.listing is not None:
                    await self._refresh_source(top, changes)
        return changes

    async def _refresh_source(self, top: Directory, changes: Changes) -> None:
        look = _Look(self._namespace, self._lister, top, self._tell)
        try:
            await look.at("")
            root = look.pages[""]
            if self._is_revision(top.source) or _is_one_model(root):
                paths = await look.at_all_below("")
                coming = await look.changed(paths)
                await self._prepare(top.source, coming)
                await look.publish_changed(coming, changes, _Turn(_MODEL_TURN_S))
                await look.publish_rest(paths, changes)
                return
        except MfsError as error:
            changes.errors.append(str(error))
            return
        await _Units(look, self._prepare, changes).refresh()


def _is_one_model(root: Listing) -> bool:
    """Whether a source is one model rather than a registry of them: by its files, or as the Hub's cache has one."""
    is_cache = root.find(b"refs") >= 0 and root.find(b"snapshots") >= 0
    return is_cache or any(_MODEL_FILE.fullmatch(name) for name in root.names)


class _Turn:
    """How long one task has gone on without giving way to readers."""

    def __init__(self, length_s: float = _TURN_S) -> None:
        self._length_s = length_s
        self._ends = time.monotonic() + length_s

    async def end(self) -> None:
        """Give way, if it is time to."""
        if time.monotonic() > self._ends:
            await trio.lowlevel.checkpoint()
            self._ends = time.monotonic() + self._length_s


class _Units:
    """The units of one source on their way to publication."""

    def __init__(self, look: _Look, prepare: Prepare, changes: Changes) -> None:
        self._look = look
        self._prepare = prepare
        self._changes = changes
        self._root = look.pages.pop("")
        old = look.top.listing
        assert old is not None
        known = {old.names.raw(i): old.inodes[i] for i in range(len(old)) if old.kinds[i] == EntryKind.DIRECTORY}
        self._coming = {name for name in self._root.directories() if name not in known and old.find(name) < 0}
        """New names: shown once what is below them is whole."""
        self._waiting = [name for name in self._root.directories() if name not in known or look.is_listed(known[name])]
        self._ready: list[tuple[bytes, list[Next], list[str]]] = []

    async def refresh(self) -> None:
        """Bring all units as far as they come."""
        self._publish_root()
        async with trio.open_nursery() as nursery:
            for _ in range(_UNITS_PARALLEL):
                nursery.start_soon(self._list_units, nursery)

    async def _list_units(self, nursery: trio.Nursery) -> None:
        turn = _Turn()
        while self._waiting:
            name = self._waiting.pop()
            try:
                paths = await self._look.at_all_below(name.decode())
            except MfsError as error:
                self._changes.errors.append(str(error))
                continue
            coming = await self._look.changed(paths)
            if name in self._coming or coming:
                # By itself: preparing one model may take long, and the others need not wait for it.
                nursery.start_soon(self._finish, name, coming, paths)
            else:
                await self._look.publish_rest(paths, self._changes)
            await turn.end()

    async def _finish(self, name: bytes, coming: list[Next], paths: list[str]) -> None:
        try:
            await self._prepare(self._look.top.source, coming)
        except MfsError as error:
            self._changes.errors.append(f"{name.decode()} is not published: {error}")
            return
        self._ready.append((name, coming, paths))
        await trio.lowlevel.checkpoint()  # others may become ready: new names of one turn cost the root one change
        ready, self._ready = self._ready[:_UNITS_PER_TURN], self._ready[_UNITS_PER_TURN:]
        # no checkpoint from here on until all are published, unless they are too much for one turn
        shown = self._coming.intersection(name for name, _, _ in ready)
        self._coming -= shown
        if shown:
            self._publish_root()
        turn = _Turn(_MODEL_TURN_S)
        for _, changed, _ in ready:
            await self._look.publish_changed(changed, self._changes, turn)
        for _, _, below in ready:
            await self._look.publish_rest(below, self._changes)

    def _publish_root(self) -> None:
        self._look.pages[""] = self._root.without(self._coming) if self._coming else self._root
        self._look.publish([""], self._changes)


class _Look:
    """One look at a source: what its directories show next."""

    def __init__(self, namespace: Namespace, lister: Lister, top: Directory, tell: Tell) -> None:
        self._namespace = namespace
        self._lister = lister
        self._tell = tell
        self._asked: dict[str, int] = {}
        """By path: how much was published when we asked for the page."""
        self.top = top
        self.pages: dict[str, Listing] = {}
        """By path; each leaves when it is published."""
        self._shown: dict[int, int] = {}
        """By inode of a directory we published: when."""

    async def at(self, path: str) -> None:
        """List a directory, and what comes along below it. Raises: MfsError."""
        asked = self._namespace.published_count
        found = await self._list(path)
        self.pages |= found
        self._asked |= dict.fromkeys(found, asked)

    async def _list(self, path: str) -> dict[str, Listing]:
        drafts = Drafts(path, self._now)
        await self._lister(self.top.source, path, drafts)
        return drafts.finish()

    async def _is_gone(self, path: str, top: str) -> bool:
        """Whether a directory that is not found has left the one it stood in, or that one its own, up to `top`."""
        above, _, name = path.rpartition("/")
        try:
            return (await self._list(above))[above].find(name.encode()) < 0
        except NotFoundError:
            if above == top:
                raise
            return await self._is_gone(above, top)

    def _now(self, path: str) -> Listing | None:
        """What a directory shows now, None if it is not listed."""
        directory = self._namespace.below(self.top, path)
        return directory.listing if directory is not None else None

    async def at_all_below(self, path: str) -> list[str]:
        """List a directory and all below it that was listed before or is new; their paths, each after its parent's.

        Raises: MfsError, the first of all.
        """
        found: list[str] = []
        new: set[str] = set()
        """Those of a level that nobody has looked into."""
        level, new_count, turn = [path], 0, _Turn()

        async def look(at: str) -> None:
            try:
                await self.at(at)
            except NotFoundError:  # it went while we looked, as checkpoints that are being written do
                if at == path or not await self._is_gone(at, path):
                    raise
                above, _, name = at.rpartition("/")
                self.pages[above] = self.pages[above].without({name.encode()})
            except AccessError as error:  # refused for good: it says so to whoever looks, and keeps nothing else back
                if at not in new:
                    raise
                logger.warning("%s is shown and cannot be looked into: %s", at, error)

        while level:
            await for_each([at for at in level if at not in self.pages], look, at_once=_PARALLEL)
            level = [at for at in level if at in self.pages]
            found += level
            below: list[str] = []
            for above in level:
                old = self._now(above)
                for name in self.pages[above].directories():
                    await turn.end()
                    child = f"{above}/{name.decode()}" if above else name.decode()
                    place = old.find(name) if old is not None else -1
                    if old is not None and place >= 0 and old.kinds[place] == EntryKind.DIRECTORY:
                        wanted = child in self.pages or self.is_listed(old.inodes[place])
                    else:
                        wanted = child in self.pages or new_count < _NEW_LISTINGS_MAX
                        new_count += child not in self.pages
                        new.add(child)
                    if wanted:
                        below.append(child)
            level = below
        return found

    def is_listed(self, inode: int) -> bool:
        """Whether somebody has looked into a directory."""
        return self._namespace.is_listed(inode)

    async def changed(self, paths: Iterable[str]) -> list[Next]:
        """Those of the directories that show something else next."""
        found: list[Next] = []
        turn = _Turn()
        for path in paths:
            await turn.end()
            old = self._now(path)
            if old is None or (old is not self.pages[path] and not old.has_same_content(self.pages[path])):
                found.append((path, self.pages[path], old))
        return found

    async def publish_changed(self, coming: Sequence[Next], changes: Changes, turn: _Turn) -> None:
        """Publish what shows something else. No checkpoint before the turn is over."""
        changed = [path for path, _, _ in coming]
        for first in range(0, len(changed), _DIRECTORIES_PER_LOOK):
            self.publish(changed[first : first + _DIRECTORIES_PER_LOOK], changes)
            await turn.end()

    async def publish_rest(self, paths: Sequence[str], changes: Changes) -> None:
        """Have the others take note that they were looked at: nothing in them shows anything else."""
        turn = _Turn()
        for path in paths:
            if path in self.pages:
                self.publish([path], changes)
                await turn.end()

    def publish(self, paths: Iterable[str], changes: Changes) -> None:
        """Publish what was found. No checkpoint."""
        told_count = len(changes.names)
        for path in paths:
            listing = self.pages.pop(path)
            directory = self._namespace.below(self.top, path)
            if directory is None:
                continue
            if not self._namespace.is_newer(directory, max(self._asked[path], self._shown.get(directory.inode, 0))):
                self._namespace.publish(directory, listing, changes)
                self._shown[directory.inode] = directory.published
        if len(changes.names) > told_count:
            self._tell(changes.names[told_count:])

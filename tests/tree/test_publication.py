"""What goes with publishing: nothing published goes unrecorded, and what is gone leaves the record."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mfs.errors import NotFoundError
from mfs.tree.listing import Drafts
from mfs.tree.namespace import Namespace
from mfs.tree.publication import Publication
from mfs.tree.record import TreeRecord
from mfs.tree.refresh import Next, Refresher
from mfs.tree.small_files import SmallFiles, SmallFilesConfig
from mfs.types import Entry, EntryKind, ObjectId

SOURCE = "test://origin"


class Disk:
    """An SSD tier, and the workers that answer for it, that have nothing and take everything."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        """How many objects a worker was asked for, call by call."""
        self.brought: list[str] = []
        self.opened: Any = None

    async def call(self, op: str, *, objects: Sequence[Any]) -> Any:
        assert op == "residency"
        await trio.lowlevel.checkpoint()
        self.asked.append(len(objects))
        return {"rows": [[0, False] for _ in objects]}

    def open(self, obj: ObjectId, source: int) -> Any:
        self.brought.append(obj.path)
        self.opened = type("State", (), {"chunks": {}, "users": 1})()
        return self.opened

    def close(self, state: Any) -> None: ...

    async def bring(self, state: Any, index: int, *, to_ssd: bool) -> bool:
        await trio.lowlevel.checkpoint()
        return True


class Registry:
    """Paths of files, listed directory by directory, and a mount's parts that show them."""

    def __init__(self, cache: Path, files: set[str], **bounds: int) -> None:
        self.files = files
        self.listed: list[str] = []
        self.goes: dict[str, set[str]] = {}
        """By directory: files that go just before it is listed."""
        self.missing: set[str] = set()
        """Directories that their parents name, and that are not found."""
        self.disk = Disk()
        self.namespace = Namespace([""], self._list, lambda source: SOURCE)
        self.record = TreeRecord(cache)
        self.small_files = SmallFiles(SmallFilesConfig(**bounds), self.disk, self.disk)  # type: ignore[arg-type]
        self.publication = Publication(
            self.namespace, lambda source: SOURCE, self.record, self.small_files, timeout_s=10
        )  # fmt: skip
        self.refresher = Refresher(self.namespace, self._list, self._prepare)

    async def _list(self, source: int, path: str, drafts: Drafts) -> None:
        await trio.lowlevel.checkpoint()
        self.listed.append(path)
        self.files -= self.goes.pop(path, set())
        below = [file[len(path) :].lstrip("/") for file in self.files if not path or file.startswith(f"{path}/")]
        if path and (not below or path in self.missing):
            raise NotFoundError(path)
        drafts.add(path, [Entry(name, EntryKind.FILE, 1, 5, "v") for name in below if "/" not in name])
        folders = {name.partition("/")[0] for name in below if "/" in name}
        drafts.add(path, [Entry(name, EntryKind.DIRECTORY) for name in folders])

    async def _prepare(self, source: int, coming: Sequence[Next]) -> None: ...

    async def look_at_all(self) -> set[str]:
        """The paths of all files."""
        return {path async for path, _ in self.namespace.walk(await self.namespace.resolve(""), "")}

    def recorded(self) -> set[str]:
        return {path for _, path in self.record.load([SOURCE])[0]}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "v2").mkdir()
    return tmp_path


async def test_what_is_published_just_before_the_end_is_written_down(cache: Path) -> None:
    """A mount ends in the same turn in which its record woke up for a publication."""
    registry = Registry(cache, {"m/w"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.publication._keep_record)
        await trio.testing.wait_all_tasks_blocked()
        listing = registry.namespace.listing
        await listing(registry.namespace.root)
        nursery.cancel_scope.cancel()
    await registry.publication.write_record()
    assert registry.recorded() == {""}


async def test_what_could_not_be_written_down_is_written_with_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full for a moment costs no times."""
    registry = Registry(cache, {"m/w"})
    await registry.namespace.listing(registry.namespace.root)
    with monkeypatch.context() as patch:
        patch.setattr(registry.record, "save", lambda *rows: False)
        await registry.publication.write_record()
    await registry.look_at_all()
    await registry.publication.write_record()
    assert registry.recorded() == {"", "m"}


async def test_directories_that_are_gone_leave_the_record(cache: Path) -> None:
    """A registry gets a new version directory each day; those of last year must not be kept for ever."""
    registry = Registry(cache, {"m/1/w", "n/w"})
    await registry.look_at_all()
    await registry.publication.write_record()
    assert registry.recorded() == {"", "m", "m/1", "n"}
    registry.files |= {"m/2/w"}
    registry.files -= {"m/1/w", "n/w"}
    await registry.refresher.refresh(0)
    await registry.publication.write_record()
    assert registry.recorded() == {"", "m", "m/2"}


@pytest.mark.parametrize("below", ["m/tmp", "m/tmp/deep/er"])
async def test_what_goes_while_it_is_looked_at_keeps_no_news_of_its_model_back(cache: Path, below: str) -> None:
    registry = Registry(cache, {"m/w", "m/stays/a", f"{below}/a"})
    await registry.look_at_all()
    registry.files.add("m/new")
    registry.goes = {below: {f"{below}/a"}}
    assert not (await registry.refresher.refresh(0)).errors
    assert await registry.look_at_all() == {"m/w", "m/new", "m/stays/a"}


async def test_a_directory_that_is_named_and_not_found_keeps_its_model_as_it_was(cache: Path) -> None:
    """An origin that contradicts itself is no news."""
    registry = Registry(cache, {"m/w", "m/d/a"})
    await registry.look_at_all()
    registry.files.add("m/new")
    registry.missing = {"m/d"}
    assert (await registry.refresher.refresh(0)).errors == ["m/d"]
    assert "m/new" not in await registry.look_at_all()


async def test_directories_that_went_while_nothing_was_mounted_leave_the_record(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take no place from those that are looked into again, of which there is a bound."""
    registry = Registry(cache, {f"gone{number}/w" for number in range(20)} | {"m/1/2/w", "m/w"})
    await registry.look_at_all()
    await registry.publication.write_record()
    monkeypatch.setattr("mfs.tree.publication._REVISITED_MAX", 5)
    registry = Registry(cache, {"m/1/2/w", "m/w"})
    await registry.publication.recall([SOURCE])
    await registry.namespace.listing(registry.namespace.root)  # as a mount does first
    await registry.publication._revisit()
    assert sorted(registry.listed) == ["", "m", "m/1", "m/1/2"]
    assert registry.namespace.recorded() == []
    await registry.publication.write_record()
    assert registry.recorded() == {"", "m", "m/1", "m/1/2"}


async def test_a_directory_full_of_small_files_is_asked_for_in_parts(cache: Path) -> None:
    """300,000 small files in one directory: what is brought is bounded, and so is what is thought about."""
    registry = Registry(cache, {f"{number:05d}.json" for number in range(5000)}, unasked_count_max=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.publication.run)
        await registry.look_at_all()
        await registry.publication.wait_settled()
        nursery.cancel_scope.cancel()
    assert len(registry.disk.brought) == 100
    assert sum(registry.disk.asked) < 1000


async def test_writing_down_many_directories_gives_way_to_readers(cache: Path) -> None:
    registry = Registry(cache, {f"{number:05d}/w{file}" for number in range(300) for file in range(30)})
    await registry.look_at_all()
    clock = itertools.count(step=1.0)  # each look at the clock is a second later: all that counts turns gives way
    turns, done = 0, trio.Event()

    async def read() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await trio.lowlevel.checkpoint()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfs.tree.publication.time.monotonic", lambda: next(clock), raising=False)
        patch.setattr(trio.to_thread, "run_sync", _at_once)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await registry.publication.write_record()
            done.set()
    assert turns > 100
    assert len(registry.recorded()) == 301


async def _at_once(call: Any, *args: Any) -> Any:
    return call(*args)

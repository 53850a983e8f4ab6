"""The tree against a dict: what is published, what keeps its inode, what stays answerable, what moves an mtime."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs.errors import NotFoundError, StoreError
from mfs.sources.bounds import DEPTH_MAX, FILE_BYTES_MAX, MTIME_NS_MAX, VERSION_BYTES_MAX
from mfs.tree.listing import Drafts
from mfs.tree.listing import _Strings as Names
from mfs.tree.namespace import Namespace
from mfs.tree.nodes import Changes, Directory, Node
from mfs.tree.record import Record
from mfs.tree.refresh import Next, Refresher
from mfs.types import Entry, EntryKind

FILE, DIRECTORY, SYMLINK = EntryKind


@dataclass
class Origin:
    """A tree of paths, listed one directory at a time or, as object stores do, with all below it."""

    entries: dict[str, Entry] = field(default_factory=dict)
    is_flat: bool = False
    failing: set[str] = field(default_factory=set)
    listed: list[str] = field(default_factory=list)
    gate: trio.Event | None = None

    def put(self, path: str, version: str = "v1", size: int = 1, **fields: object) -> None:
        """A file, and the directories it needs; what stood in its way is gone."""
        self.remove(path)
        parts = path.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if above in self.entries and self.entries[above].kind is not DIRECTORY:
                self.remove(above)
            self.entries.setdefault(above, Entry(parts[depth - 1], DIRECTORY))
        self.entries[path] = Entry(parts[-1], FILE, size, 5, version, **fields)  # type: ignore[arg-type]

    def mkdir(self, path: str) -> None:
        self.put(f"{path}/x")
        self.remove(f"{path}/x")

    def remove(self, path: str) -> None:
        for known in [p for p in self.entries if p == path or p.startswith(f"{path}/")]:
            del self.entries[known]

    def children(self, path: str) -> dict[str, Entry]:
        prefix = f"{path}/" if path else ""
        return {
            p[len(prefix) :]: entry
            for p, entry in self.entries.items()
            if p.startswith(prefix) and "/" not in p[len(prefix) :]
        }

    async def list(self, source: int, path: str, drafts: Drafts) -> None:
        self.listed.append(path)
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if path in self.failing:
            raise StoreError(f"{path}: asked to fail")
        if path and (path not in self.entries or self.entries[path].kind is not DIRECTORY):
            raise NotFoundError(f"{path}: no such directory")
        below = [path] + [
            p for p, entry in self.entries.items()
            if self.is_flat and entry.kind is DIRECTORY and (not path or p.startswith(f"{path}/"))
        ]  # fmt: skip
        for directory in below:
            entries = list(self.children(directory).values())
            middle = len(entries) // 2
            drafts.add(directory, entries[:middle])  # in several pages, in no order
            drafts.add(directory, entries[middle:])


class Tree(Namespace):
    """A namespace of one source that looks again when told."""

    def __init__(self, origin: Origin) -> None:
        super().__init__([""], origin.list, lambda source: "test://origin")
        self.prepared: list[str] = []
        """Directories that were announced before they were published."""
        self.unprepared: set[str] = set()
        """Directories for which that fails."""
        self._refresher = Refresher(self, origin.list, self._prepare)

    async def refresh(self) -> Changes:
        return await self._refresher.refresh(0)

    async def _prepare(self, source: int, coming: Sequence[Next]) -> None:
        await trio.lowlevel.checkpoint()
        for path, _, _ in coming:
            self.prepared.append(path)
            if path in self.unprepared:
                raise StoreError(f"{path}: not to be had")


def make(origin: Origin) -> Tree:
    return Tree(origin)


async def children(tree: Namespace, directory: Directory) -> dict[str, Node]:
    listing = await tree.listing(directory)
    return {name.decode(): node for _, name, node in tree.nodes(directory, listing, 0)}


async def directory_at(tree: Namespace, path: str) -> Directory:
    directory = tree.directory((await tree.resolve(path)).inode)
    assert directory is not None
    return directory


# -- against the model

names = st.sampled_from(["a", "b", "ä", "a.b", "B"])
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
changes = st.one_of(
    st.tuples(st.just("put"), paths, st.sampled_from(["v1", "v2", "v3"])),
    st.tuples(st.just("mkdir"), paths, st.just("")),
    st.tuples(st.just("remove"), paths, st.just("")),
    st.tuples(st.just("look"), paths, st.just("")),
    st.tuples(st.just("forget"), paths, st.just("")),
    st.tuples(st.just("fail"), paths, st.just("")),
    st.tuples(st.just("refresh"), st.just(""), st.just("")),
    st.tuples(st.just("hand over"), st.just(""), st.just("")),
)


class Seen:
    """What the kernel would know: inode -> what it was told, and how often."""

    def __init__(self, tree: Namespace) -> None:
        self.tree = tree
        self.nodes: dict[int, Node] = {}
        self.counts: dict[int, int] = {}
        self.ever: dict[int, Node] = {}

    def tell(self, node: Node) -> None:
        self.tree.remember(node.inode)
        self.counts[node.inode] = self.counts.get(node.inode, 0) + 1
        self.nodes[node.inode] = self.ever[node.inode] = node

    def forget(self, inode: int) -> None:
        self.tree.forget(inode, self.counts.pop(inode))
        del self.nodes[inode]

    def check(self) -> None:
        """An inode stands for what it stood for when it was told, whatever happened to the tree."""
        for inode, told in self.nodes.items():
            now = self.tree.node(inode)
            assert now is not None, told
            assert self.tree.facts(inode) == (now.inode, now.kind, now.size, now.mtime_ns)
            if told.kind is DIRECTORY:
                assert now.kind is DIRECTORY
                directory = self.tree.directory(inode)
                assert directory is not None
                if directory.removed:
                    assert directory.listing is not None
                    assert not len(directory.listing)
            else:
                assert now == told


async def walk_visible(tree: Namespace, directory: Directory) -> dict[str, Node]:
    """All that is published below, without listing anything."""
    found = {}
    if directory.listing is not None:
        for index, name, node in tree.nodes(directory, directory.listing, 0):
            found[node.path] = node
            facts = (node.inode, node.kind, node.size, node.mtime_ns)  # what the kernel is told, by a shorter way
            assert tree.facts(node.inode) == tree.facts_at(directory, directory.listing, index) == facts
            assert directory.listing.find(name) == index
            below = tree.directory(node.inode) if node.kind is DIRECTORY else None
            if below is not None:
                found |= await walk_visible(tree, below)
    return found


async def follow(is_flat: bool, orders: list[tuple[str, str, str]]) -> None:
    origin = Origin(is_flat=is_flat)
    tree = make(origin)
    await tree.listing(tree.root)
    seen, clock = Seen(tree), {}  # type: ignore[var-annotated]
    for order, path, version in orders:
        match order:
            case "put":
                origin.put(path, version)
            case "mkdir":
                origin.mkdir(path)
            case "remove":
                origin.remove(path)
            case "look":
                try:
                    node = await tree.resolve(path)
                    seen.tell(node)
                    if (below := tree.directory(node.inode)) is not None:
                        for child in (await children(tree, below)).values():
                            seen.tell(child)
                except NotFoundError:
                    pass
                except StoreError:
                    if not origin.failing:
                        raise
            case "forget":
                for inode in [i for i, node in seen.nodes.items() if node.path == path]:
                    seen.forget(inode)
            case "fail":
                origin.failing ^= {path}
            case "hand over":
                heir = make(origin)
                heir.restore(msgpack.unpackb(msgpack.packb(tree.export()), strict_map_key=False))
                assert await walk_visible(heir, heir.root) == await walk_visible(tree, tree.root)
                tree = seen.tree = heir
            case "refresh":
                before = await walk_visible(tree, tree.root)
                listings = {d.inode: (d.mtime_ns, d.listing) for d in tree._directories.values() if not d.removed}
                found = await tree.refresh()
                after = await walk_visible(tree, tree.root)
                compare(before, after)
                for inode, (mtime_ns, listing) in listings.items():
                    directory = tree._directories.get(inode)
                    if directory is None or directory.removed or listing is None:
                        continue
                    assert directory.listing is not None
                    moved = [*listing.inodes] != [*directory.listing.inodes]
                    assert (directory.mtime_ns > mtime_ns) if moved else (directory.mtime_ns == mtime_ns)
                if not origin.failing:
                    assert not found.errors
                    expect = {p: (e.kind, e.version) for p, e in origin.entries.items() if p in after}
                    assert {p: (n.kind, n.object.version if n.object else "") for p, n in after.items()} == expect
                    for place in {p.rpartition("/")[0] for p in after}:  # published whole
                        assert set(origin.children(place)) == {
                            p.rpartition("/")[2] for p in after if p.rpartition("/")[0] == place
                        }
        seen.check()
        listings = [d.listing for d in tree._directories.values() if d.listing is not None]
        assert tree.files_count == sum(map(len, listings))
        assert tree.listed_bytes == sum(listing.total_bytes for listing in listings)
        for inode, node in (await all_nodes(tree)).items():
            assert clock.setdefault(inode, (node.kind, node.path, node.object)) == (node.kind, node.path, node.object)


async def all_nodes(tree: Namespace) -> dict[int, Node]:
    return {node.inode: node for node in (await walk_visible(tree, tree.root)).values()}


def compare(before: dict[str, Node], after: dict[str, Node]) -> None:
    """The same version keeps its inode; anything else has one that was never used."""
    used = {node.inode for node in before.values()}
    for path, node in after.items():
        old = before.get(path)
        if old is not None and old.kind is node.kind and old.object == node.object:
            assert old.inode == node.inode
            assert node.kind is DIRECTORY or old.mtime_ns == node.mtime_ns
        else:
            assert node.inode not in used


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.lists(changes, max_size=30))
def test_the_tree_follows_its_origin(is_flat: bool, orders: list[tuple[str, str, str]]) -> None:
    trio.run(follow, is_flat, orders)


# -- looking


@given(st.sets(st.binary(max_size=6)), st.binary(max_size=6))
def test_a_name_is_found_where_it_stands_and_nowhere_else(names: set[bytes], name: bytes) -> None:
    column = Names(sorted(names))
    assert [column.find(known) for known in sorted(names)] == [*range(len(names))]
    assert column.find(name) == (sorted(names).index(name) if name in names else -1)


async def test_one_listing_however_many_look() -> None:
    origin = Origin(gate=trio.Event())
    origin.put("a/b")
    tree, found = make(origin), list[Node | None]()

    async def look() -> None:
        found.append(await tree.lookup(tree.root, b"a"))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        assert origin.gate is not None
        origin.gate.set()
    assert origin.listed == [""]
    assert len({node.inode for node in found if node}) == 1


async def test_the_first_to_look_may_be_cancelled() -> None:
    origin = Origin(gate=trio.Event())
    origin.put("a")
    tree = make(origin)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def impatient() -> None:
            with scope:
                await tree.lookup(tree.root, b"a")

        nursery.start_soon(impatient)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(tree.lookup, tree.root, b"a")
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert origin.gate is not None
        origin.gate.set()
    assert origin.listed == ["", ""]
    assert len(await tree.listing(tree.root)) == 1


async def test_a_listing_that_fails_fails_for_all_and_is_tried_again() -> None:
    origin = Origin(gate=trio.Event(), failing={""})
    origin.put("a")
    tree, errors = make(origin), list[StoreError]()

    async def look() -> None:
        try:
            await tree.lookup(tree.root, b"a")
        except StoreError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        assert origin.gate is not None
        origin.gate.set()
    assert len(errors) == 5
    assert len(origin.listed) == 1
    origin.failing.clear()
    assert await tree.lookup(tree.root, b"a") is not None


async def test_a_flat_listing_saves_those_below() -> None:
    origin = Origin(is_flat=True)
    for number in range(20):
        origin.put(f"models/{number}/weights")
    tree = make(origin)
    await tree.listing(tree.root)
    for number in range(20):
        await children(tree, await directory_at(tree, f"models/{number}"))
    assert origin.listed == [""]
    origin.listed.clear()
    origin.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.refresh)
        await trio.testing.wait_all_tasks_blocked()
        origin.gate.set()
    assert origin.listed == [""]


# -- refresh


async def test_two_refreshes_at_once_publish_in_the_order_they_looked() -> None:
    origin = Origin()
    origin.put("a", "old")
    tree = make(origin)
    await tree.listing(tree.root)
    origin.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.refresh)
        nursery.start_soon(tree.refresh)
        await trio.testing.wait_all_tasks_blocked()
        assert len(origin.listed) == 2  # the first listing, and one refresh: the other waits for its turn
        origin.put("a", "new")
        origin.gate.set()
    node = await tree.resolve("a")
    assert node.object is not None
    assert node.object.version == "new"


async def test_a_failed_refresh_keeps_the_old_tree_and_says_so() -> None:
    origin = Origin()
    origin.put("a/b")
    origin.put("c/d")
    tree = make(origin)
    nodes = [await tree.resolve(path) for path in ("a/b", "c/d")]
    origin.put("a/b", "v2")
    origin.put("c/d", "v2")
    origin.failing = {"a"}
    changes = await tree.refresh()
    assert changes.errors == ["a: asked to fail"]
    assert await tree.resolve("a/b") == nodes[0]
    assert (await tree.resolve("c/d")).inode != nodes[1].inode
    assert (changes.changed_count, changes.added_count, changes.removed_count) == (1, 0, 0)


async def test_what_changed_is_counted_and_named() -> None:
    origin = Origin()
    for name in ("same", "changed", "gone", "flipped"):
        origin.put(name)
    tree = make(origin)
    await tree.listing(tree.root)
    origin.put("changed", "v2")
    origin.remove("gone")
    origin.put("new")
    origin.mkdir("flipped")
    changes = await tree.refresh()
    assert (changes.changed_count, changes.added_count, changes.removed_count) == (2, 1, 1)
    assert sorted(changes.names) == [(1, name) for name in ("changed", "flipped", "gone", "new")]
    assert (await tree.resolve("flipped")).kind is DIRECTORY


async def test_a_changed_digest_or_size_is_another_file_a_changed_date_is_not() -> None:
    origin = Origin()
    origin.put("a", size=5, digest="sha256:1")
    tree = make(origin)
    first = await tree.resolve("a")
    origin.put("a", size=5, digest="sha256:1", locator="commit-2")
    origin.entries["a"] = origin.entries["a"]._replace(mtime_ns=10**18)
    await tree.refresh()
    second = await tree.resolve("a")
    assert (second.inode, second.mtime_ns) == (first.inode, first.mtime_ns)
    assert second.object is not None
    assert second.object.locator == "commit-2"
    origin.put("a", size=5, digest="sha256:2")
    await tree.refresh()
    assert (await tree.resolve("a")).inode != first.inode


async def test_an_open_file_of_a_removed_subtree_stays_until_forgotten() -> None:
    origin = Origin()
    origin.put("model/1/weights")
    tree = make(origin)
    nodes = [await tree.resolve(path) for path in ("model", "model/1", "model/1/weights")]
    for node in nodes:
        tree.remember(node.inode)
    origin.remove("model")
    await tree.refresh()
    for node in nodes:
        found = tree.node(node.inode)
        assert found is not None
        assert found.object == node.object
    for node in nodes[:2]:
        directory = tree.directory(node.inode)
        assert directory is not None
        assert not len(await tree.listing(directory))
        assert await tree.lookup(directory, b"1") is None
    with pytest.raises(NotFoundError):
        await tree.resolve("model")
    for node in reversed(nodes):
        tree.forget(node.inode, 1)
        assert tree.node(node.inode) is None
    assert len(tree._directories) == 1
    assert not tree._places._orphans


async def test_a_removed_directory_nobody_had_looked_into_is_an_empty_one() -> None:
    origin = Origin()
    origin.put("model/weights")
    tree = make(origin)
    node = await tree.resolve("model")
    tree.remember(node.inode)
    origin.remove("model")
    await tree.refresh()
    directory = tree.directory(node.inode)
    assert directory is not None
    assert not len(await tree.listing(directory))


async def test_a_directory_that_goes_while_it_is_listed_stays_empty() -> None:
    origin = Origin()
    origin.put("model/weights")
    tree = make(origin)
    await tree.listing(tree.root)
    directory = await directory_at(tree, "model")
    tree.remember(directory.inode)
    origin.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.listing, directory)
        await trio.testing.wait_all_tasks_blocked()
        gate, origin.gate = origin.gate, None
        kept, origin.entries = origin.entries, {}
        await tree.refresh()
        origin.entries = kept  # the listing under way had begun before
        gate.set()
    assert directory.removed
    assert not len(await tree.listing(directory))


# -- publication


async def test_a_model_changes_in_one_turn() -> None:
    """Nobody who looks at every checkpoint sees one directory of a model new and another old."""
    origin = Origin()
    for path in ("m/config", "m/1/w", "m/2/w", "other/x"):
        origin.put(path)
    tree = make(origin)
    await follow_all(tree)
    for path in ("m/config", "m/1/w", "m/2/w", "m/3/w"):
        origin.put(path, "v2")
    seen = set[frozenset[str]]()

    async def watch() -> None:
        while True:
            nodes = (await walk_visible(tree, tree.root)).values()
            seen.add(frozenset(n.object.version for n in nodes if n.object and n.path.startswith("m/")))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await tree.refresh()
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert seen == {frozenset({"v1"}), frozenset({"v2"})}


async def follow_all(tree: Tree) -> None:
    """Look into everything."""
    async for _ in tree.walk(await tree.resolve(""), ""):
        pass


async def test_what_cannot_be_prepared_keeps_its_tree_and_others_go_on() -> None:
    origin = Origin()
    for path in ("m/config", "m/1/w", "other/x"):
        origin.put(path)
    tree = make(origin)
    await follow_all(tree)
    before = await walk_visible(tree, tree.root)
    origin.put("m/config", "v2")
    origin.put("m/2/w")
    origin.put("new/1/w")
    origin.put("other/x", "v2")
    tree.unprepared = {"m/2"}
    changes = await tree.refresh()
    after = await walk_visible(tree, tree.root)
    assert {p: n for p, n in after.items() if p.startswith("m")} == {p: n for p, n in before.items() if p[0] == "m"}
    assert set(after) - set(before) == {"new", "new/1", "new/1/w"}
    assert after["other/x"].inode != before["other/x"].inode
    assert changes.errors == ["m is not published: m/2: not to be had"]
    assert {"m", "m/2", "new", "new/1", "other"} == set(tree.prepared)
    tree.unprepared = set()
    assert (await tree.refresh()).errors == []
    assert {"m/2/w", "m/config"} <= set(await walk_visible(tree, tree.root))


async def test_what_is_new_is_listed_before_it_shows() -> None:
    origin = Origin()
    origin.put("m/1/w")
    tree = make(origin)
    await follow_all(tree)
    origin.put("m/2/deep/er/w")
    origin.put("n/1/w")
    await tree.refresh()
    assert {"m/2/deep/er/w", "n/1/w"} <= set(await walk_visible(tree, tree.root))


async def test_a_new_directory_that_cannot_be_listed_does_not_show() -> None:
    origin = Origin()
    origin.put("m/1/w")
    tree = make(origin)
    await follow_all(tree)
    for path in ("m/2/w", "n/1/w", "o/1/w"):
        origin.put(path)
    origin.failing = {"m/2", "n/1"}
    changes = await tree.refresh()
    assert sorted(changes.errors) == ["m/2: asked to fail", "n/1: asked to fail"]
    assert set(await walk_visible(tree, tree.root)) == {"m", "m/1", "m/1/w", "o", "o/1", "o/1/w"}


async def test_what_nobody_looked_into_is_not_listed_by_a_refresh() -> None:
    origin = Origin()
    for number in range(10):
        origin.put(f"m{number}/1/w")
    tree = make(origin)
    await tree.resolve("m3/1/w")
    origin.listed.clear()
    await tree.refresh()
    assert sorted(origin.listed) == ["", "m3", "m3/1"]


@pytest.mark.parametrize("is_flat", [True, False])
async def test_a_source_that_is_one_model_changes_as_one(is_flat: bool) -> None:
    """Its root holds a model's files, so that its directories are parts of it."""
    origin = Origin(is_flat=is_flat)
    for path in ("model_index.json", "unet/w", "vae/w"):
        origin.put(path)
    tree = make(origin)
    await follow_all(tree)
    for path in ("model_index.json", "unet/w", "vae/w"):
        origin.put(path, "v2")
    tree.unprepared = {"vae"}
    assert (await tree.refresh()).errors == ["vae: not to be had"]
    found = (await walk_visible(tree, tree.root)).values()
    assert {node.object.version for node in found if node.object} == {"v1"}
    tree.unprepared = set()
    await tree.refresh()
    found = (await walk_visible(tree, tree.root)).values()
    assert {node.object.version for node in found if node.object} == {"v2"}


# -- times


def record_of(directory: Directory) -> Record:
    assert directory.listing is not None
    return Record(directory.mtime_ns, directory.listing.fingerprint(), directory.listing.mtimes.tobytes())


async def test_times_come_back_with_the_same_content_and_move_on_with_another() -> None:
    origin = Origin()
    origin.put("m/w")
    tree = make(origin)
    await follow_all(tree)
    origin.put("m/w", "v2")
    await tree.refresh()
    places = [(0, ""), (0, "m")]
    records = {place: record_of(found) for place in places if (found := tree.directory_at(*place)) is not None}
    before = await walk_visible(tree, tree.root)
    assert before["m/w"].mtime_ns == before["m"].mtime_ns > 5  # the origin's date, 5, is its old version's too

    again = make(origin)
    again.adopt_records(records, max(record.mtime_ns for record in records.values()))
    assert (await again.resolve("m")).mtime_ns == before["m"].mtime_ns
    await follow_all(again)
    after = await walk_visible(again, again.root)
    assert {p: n.mtime_ns for p, n in after.items()} == {p: n.mtime_ns for p, n in before.items()}

    origin.remove("m/w")
    third = make(origin)
    third.adopt_records(records, max(record.mtime_ns for record in records.values()))
    await follow_all(third)
    assert (await third.resolve("m")).mtime_ns > before["m"].mtime_ns


async def test_a_change_is_later_than_any_date_of_the_tree() -> None:
    """Dates from the future included: whoever remembers the latest time sees the change."""
    origin = Origin()
    origin.put("m/1/w")
    origin.entries["m/1/w"] = origin.entries["m/1/w"]._replace(mtime_ns=4 * 10**18)  # 2096
    origin.put("m/2/w")
    tree = make(origin)
    await follow_all(tree)
    origin.remove("m/2")
    await tree.refresh()
    assert (await tree.resolve("m")).mtime_ns > 4 * 10**18


# -- hostile sources


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "\0", "a\nb", "\x1b[31m", "\x9b", "x" * 256, "\udcff", "é" * 128]
)
async def test_names_that_cannot_stand_in_a_directory_are_left_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    origin = Origin({name: Entry(name, FILE, 1, 1, "v"), "good": Entry("good", FILE, 1, 1, "v")})
    origin.children = lambda path: origin.entries  # type: ignore[method-assign]
    tree = make(origin)
    assert set(await children(tree, tree.root)) == {"good"}
    assert "cannot be shown" in caplog.text


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../x", "a/../../x", "d/..", "", "a//b", "a/\nb", "./.."])
async def test_links_that_could_lead_out_are_left_out(target: str) -> None:
    tree = make(Origin({"link": Entry("link", SYMLINK, version=target)}))
    assert not await children(tree, tree.root)


async def test_links_that_stay_inside_are_shown() -> None:
    origin = Origin()
    origin.put("models/blob")
    origin.entries |= {
        "models/link": Entry("link", SYMLINK, version="../models/blob"),
        "models/here": Entry("here", SYMLINK, version="."),
    }
    tree = make(origin)
    found = await children(tree, await directory_at(tree, "models"))
    assert (found["link"].target, found["link"].size) == ("../models/blob", 14)
    assert found["here"].target == "."


async def test_claims_beyond_reason_do_no_harm() -> None:
    origin = Origin({
        "old": Entry("old", FILE, 1, -5, "v"),
        "far": Entry("far", FILE, 1, 10**30, "v"),
        "huge": Entry("huge", FILE, FILE_BYTES_MAX + 1, 1, "v"),
        "large": Entry("large", FILE, FILE_BYTES_MAX, 1, "v"),
        "wordy": Entry("wordy", FILE, 1, 1, "v" * (VERSION_BYTES_MAX + 1)),
        "negative": Entry("negative", FILE, -1, 1, "v"),
        "odd": Entry("odd", FILE, 1, 1, 'W/"\udcff\x00"', locator="\udc80"),
    })  # fmt: skip
    tree = make(origin)
    found = await children(tree, tree.root)
    assert set(found) == {"old", "far", "odd", "large"}
    assert found["old"].mtime_ns > 0
    assert found["far"].mtime_ns == MTIME_NS_MAX
    origin.put("another")
    await tree.refresh()
    assert MTIME_NS_MAX < tree.root.mtime_ns < 2**63
    assert found["odd"].object is not None
    assert found["odd"].object.version == 'W/"\udcff\x00"'
    with pytest.raises(NotFoundError):
        await tree.resolve("\ud800")


async def test_a_file_and_a_directory_of_one_name_are_a_directory() -> None:
    origin = Origin({"a": Entry("a", DIRECTORY)})
    plain = origin.children
    origin.children = lambda path: plain(path) | ({"a ": Entry("a", FILE, 1, 1, "v")} if not path else {})  # type: ignore[method-assign]
    tree = make(origin)
    assert (await tree.resolve("a")).kind is DIRECTORY


# -- several sources, and the clock


async def test_sources_below_one_root_do_not_mix() -> None:
    origin = Origin()
    origin.put("m/w")
    tree = Namespace(["one", "two"], origin.list, lambda source: f"test://{source}")
    first, second = await tree.resolve("one/m/w"), await tree.resolve("two/m/w")
    assert first.object is not None
    assert second.object is not None
    assert (first.object.source, second.object.source) == ("test://0", "test://1")
    assert first.inode != second.inode
    found = tree.directory_at(1, "m")
    assert found is not None
    assert found.full_path == "two/m"
    assert tree.directory_at(1, "x") is None
    assert [path async for path, _ in tree.walk(tree.node(1), "")] == ["one/m/w", "two/m/w"]  # type: ignore[arg-type]


async def test_a_directorys_mtime_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = Origin()
    tree = make(origin)
    await tree.listing(tree.root)
    dice, last = random.Random(1), tree.root.mtime_ns
    for number in range(50):
        monkeypatch.setattr("mfs.tree.namespace.time.time_ns", lambda: dice.randrange(2 * 10**18))
        origin.put(f"{number}")
        await tree.refresh()
        assert tree.root.mtime_ns > last
        last = tree.root.mtime_ns
        await tree.refresh()
        assert tree.root.mtime_ns == last


@pytest.mark.parametrize("is_flat", [True, False])
async def test_the_deepest_tree_is_walked_and_removed_without_recursion(is_flat: bool) -> None:
    """A source decides how deep it is; one refresh of it must not end the daemon."""
    origin = Origin(is_flat=is_flat)
    path = "/".join(["d"] * (DEPTH_MAX - 2))
    origin.put("m/config.json")
    origin.put(f"m/{path}/f")
    tree = make(origin)
    found = [name async for name, _ in tree.walk(await tree.resolve("m"), "m")]
    assert found == ["m/config.json", f"m/{path}/f"]
    origin.put(f"m/{path}/d/too-deep")
    assert (await tree.refresh()).errors == []
    below = await children(tree, await directory_at(tree, f"m/{path}"))
    assert set(below) == {"d", "f"}
    assert not await children(tree, await directory_at(tree, f"m/{path}/d"))
    bottom = await directory_at(tree, f"m/{path}")
    assert bottom.full_path == f"m/{path}"
    tree.remember(bottom.inode)
    origin.remove("m")
    assert (await tree.refresh()).errors == []
    assert tree.files_count == 0
    tree.forget(bottom.inode, 1)


async def test_what_somebody_listed_before_a_look_came_there_is_no_reason_to_keep_it() -> None:
    """A look at 10,000 models takes long. Somebody looks into a directory before the look gets there, and then a new
    version is uploaded: the look has seen it, so it is published whole.
    """
    origin = Origin()
    for name in ("m/sub/code.py", "z/config"):
        origin.put(name)
    tree = make(origin)
    await follow_all(tree)
    tree = make(origin)
    for path in ("", "m", "z"):
        await tree.listing(await directory_at(tree, path))
    listed = origin.list

    async def list_and_meanwhile(source: int, path: str, drafts: Drafts) -> None:
        await listed(source, path, drafts)
        if path == "":  # the look has begun, and is not at m yet
            assert len(await children(tree, await directory_at(tree, "m/sub"))) == 1
            origin.put("m/sub/code.py", "v2")
            origin.put("m/config", "v2")

    tree._refresher = Refresher(tree, list_and_meanwhile, tree._prepare)
    await tree.refresh()
    node = await tree.resolve("m/config")
    assert node.object is not None
    assert node.object.version == "v2"
    node = await tree.resolve("m/sub/code.py")
    assert node.object is not None
    assert node.object.version == "v2"


async def test_walking_300000_files_gives_way_to_readers() -> None:
    origin = Origin()
    tree = make(origin)
    drafts = Drafts("")
    drafts.add("", [Entry(f"{number:06d}", FILE, 1, 5, "v") for number in range(60_000)])
    tree.publish(tree.root, drafts.finish()[""], Changes())
    turns, done = 0, trio.Event()

    async def read() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.lowlevel.checkpoint()
        root = tree.node(tree.root.inode)
        assert root is not None
        turns_before = turns
        assert len([path async for path, _ in tree.walk(root, "")]) == 60_000
        turns_within = turns - turns_before
        done.set()
    assert turns_within > 5


async def test_a_look_passes_by_models_that_hang() -> None:
    """Seven models whose listings hang keep no other model's new version back."""
    origin, hanging = Origin(), [f"z{number}" for number in range(7)]
    for name in ("a", "b", *hanging):
        origin.put(f"{name}/config")
    tree, gate = make(origin), trio.Event()
    await follow_all(tree)

    async def list_or_hang(source: int, path: str, drafts: Drafts) -> None:
        if path in hanging:
            await gate.wait()
        await origin.list(source, path, drafts)

    tree._refresher = Refresher(tree, list_or_hang, tree._prepare)
    for name in ("a", "b"):
        origin.put(f"{name}/config", "v2")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.refresh)
        await trio.testing.wait_all_tasks_blocked()
        for name in ("a", "b"):
            node = await tree.resolve(f"{name}/config")
            assert node.object is not None
            assert node.object.version == "v2"
        gate.set()


async def test_a_file_keeps_its_time_when_only_its_neighbour_changes() -> None:
    """The source gives the same bytes a new date (put again, restored) while something beside them changes."""
    origin = Origin()
    origin.put("m/same")
    origin.put("m/other")
    tree = make(origin)
    await follow_all(tree)
    before = (await tree.resolve("m/same")).mtime_ns
    origin.entries["m/same"] = origin.entries["m/same"]._replace(mtime_ns=before + 10**9)
    origin.put("m/other", "v2")
    await tree.refresh()
    node = await tree.resolve("m/other")
    assert node.object is not None
    assert node.object.version == "v2"
    assert (await tree.resolve("m/same")).mtime_ns == before


# -- inodes


async def test_inodes_are_the_same_in_every_daemon_and_leave_room_for_the_kernels() -> None:
    origin = Origin()
    for path, version in (("a/w", "v1"), ("a/v", "v1"), ("b/w", "v1")):
        origin.put(path, version)
    found = []
    for _ in range(2):
        tree = make(origin)
        found.append({path: (await tree.resolve(path)).inode for path in ("", "a", "b", "a/w", "a/v", "b/w")})
    assert found[0] == found[1]
    inodes = set(found[0].values())
    assert len(inodes) == 6
    assert found[0][""] == 1
    assert all(inode & 0xFF == 0 and 0 < inode < 1 << 63 for inode in inodes - {1})


async def test_a_version_that_comes_back_has_its_inode_again() -> None:
    origin = Origin()
    origin.put("a/w", "v1")
    tree = make(origin)
    first = await tree.resolve("a/w")
    tree.remember(first.inode)
    origin.put("a/w", "v2")
    await tree.refresh()
    second = await tree.resolve("a/w")
    assert second.inode != first.inode
    assert tree.node(first.inode) == first
    origin.put("a/w", "v1")
    await tree.refresh()
    assert (await tree.resolve("a/w")).inode == first.inode
    origin.remove("a")
    await tree.refresh()
    origin.put("a/w", "v1")
    await tree.refresh()
    assert (await tree.resolve("a/w")).inode == first.inode
    assert not tree._places._orphans


async def test_two_sources_of_the_same_bytes_have_inodes_of_their_own() -> None:
    origin = Origin()
    origin.put("w")
    tree = Namespace(["one", "two"], origin.list, lambda source: "test://origin")
    one, two = await tree.resolve("one/w"), await tree.resolve("two/w")
    assert one.inode != two.inode
    assert one.object == two.object


@pytest.mark.parametrize("bits", [0x0, 0x100, 0x300, 0xF00])
async def test_names_that_meet_in_one_inode(
    bits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The later one is not shown; no inode ever stands for two things, also when versions come and go."""
    monkeypatch.setattr("mfs.tree.inodes._KEPT", bits)
    origin, chance = Origin(is_flat=True), random.Random(bits)
    tree, stood_for = make(origin), dict[int, tuple[str, str]]()
    for number in range(12):
        origin.put(f"{number}.bin", "v1")
    await tree.listing(tree.root)
    for _ in range(40):
        shown = await walk_visible(tree, tree.root)
        assert len({node.inode for node in shown.values()}) == len(shown)
        assert len(shown) <= max(1, bits >> 8 if bits else 1) + 1
        for path, node in shown.items():
            assert node.object is not None
            known = tree._places.is_known(node.inode)
            fact = (path, node.object.version)
            assert not known or stood_for[node.inode] == fact
            stood_for[node.inode] = fact
            if not known:
                tree.remember(node.inode)
        for inode, (path, version) in stood_for.items():
            now = tree.node(inode)
            assert now is not None
            assert now.object is not None
            assert (now.path, now.object.version) == (path, version)
        name = f"{chance.randrange(12)}.bin"
        origin.put(name, chance.choice(["v1", "v2", "v3"])) if chance.random() < 0.8 else origin.remove(name)
        await tree.refresh()
    assert "is not shown: its inode" in caplog.text

"""A folder as a source: the suite, and what only file systems can do."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from mfs.errors import AccessError, ChangedError, NotFoundError, StoreError, UsageError
from mfs.registry.layout import MARKER_BODY, MARKER_KEY
from mfs.sources import fence, open_source
from mfs.sources.bounds import MTIME_NS_MAX
from mfs.sources.folder import FolderSource, file_version, open_beneath
from mfs.sources.options import SourceOptions
from mfs.testing import ramp
from mfs.testing.suite import SourceSuite, deadline, list_tree, object_of, read
from mfs.types import Entry, EntryKind


class FolderOrigin:
    def __init__(self, root: Path) -> None:
        self.root = root

    def source(self) -> FolderSource:
        return FolderSource(str(self.root))

    def put(self, path: str, content: bytes) -> None:
        """Replaced by rename, as careful publishers do: a new inode, so a new version whatever the clock's tick."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.root.with_name("put.tmp")
        temporary.write_bytes(content)
        temporary.rename(target)

    def delete(self, path: str) -> None:
        (self.root / path).unlink()


class TestFolder(SourceSuite):
    @pytest.fixture
    def origin(self, tmp_path: Path) -> FolderOrigin:
        root = tmp_path / "registry"
        root.mkdir()
        return FolderOrigin(root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "registry"
    root.mkdir()
    (root / "m").mkdir()
    (root / "m" / "w.bin").write_bytes(ramp(100))
    return root


def test_both_spellings_of_the_url(root: Path) -> None:
    spaced = root / "100% da"
    spaced.mkdir()
    for url in (str(spaced), spaced.as_uri()):
        assert list(open_source(url).list("", deadline_s=deadline())) == [("", [])]
    assert open_source(str(root) + "/").identity == open_source(root.as_uri()).identity
    with pytest.raises(UsageError, match="file:///"):
        open_source("file://other-host/dir")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=str(tmp_path / "nowhere")):
        list(FolderSource(str(tmp_path / "nowhere")).list("", deadline_s=deadline()))


def test_a_root_that_is_a_file_is_refused(root: Path) -> None:
    with pytest.raises(NotFoundError, match="not a directory"):
        list(FolderSource(str(root / "m" / "w.bin")).list("", deadline_s=deadline()))


def test_an_empty_directory_is_listed_as_empty(root: Path) -> None:
    (root / "void").mkdir()
    assert list(FolderSource(str(root)).list("void", deadline_s=deadline())) == [("void", [])]


def test_links_inside_stay_links_with_relative_targets(root: Path) -> None:
    (root / "latest").symlink_to("m")
    (root / "m" / "absolute").symlink_to(root / "m" / "w.bin")
    (root / "m" / "devious").symlink_to(f"../../{root.name}/m/w.bin")  # steps outside on its way back in
    found = list_tree(FolderSource(str(root)))
    targets = {path: entry.version for path, entry in found.items() if entry.kind is EntryKind.SYMLINK}
    assert targets == {"latest": "m", "m/absolute": "w.bin", "m/devious": "w.bin"}


def test_links_leading_outside_are_served_as_what_they_point_to(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "x.bin").write_bytes(ramp(10))
    (outside / "back").symlink_to(root / "m")
    (outside / "self").symlink_to(outside)
    (root / "out").symlink_to(outside)
    (root / "file").symlink_to(outside / "deep" / "x.bin")
    source = FolderSource(str(root))
    found = list_tree(source)
    assert (found["out"].kind, found["file"].kind) == (EntryKind.DIRECTORY, EntryKind.FILE)
    assert {path for path in found if path.startswith("out/")} == {
        "out/deep", "out/deep/x.bin", "out/back", "out/back/w.bin",
    }  # fmt: skip
    for path in ("file", "out/deep/x.bin"):
        assert read(source, object_of(source, path, found[path])) == ramp(10)


def test_what_cannot_be_served_is_left_out_and_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(root / "m" / "fifo")
    (root / "m" / "dangling").symlink_to("nothing")
    (root / "m" / "loop").symlink_to("loop")
    (root / "m" / "to-fifo").symlink_to("fifo")
    (root / "m" / "bell\a").write_bytes(b"")
    (root / "m" / "around").symlink_to(root.parent)
    os.close(os.open(os.fsencode(root / "m") + b"/latin-\xe9", os.O_CREAT | os.O_WRONLY))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "m" / "sock"))
    with caplog.at_level(logging.WARNING):
        found = list_tree(FolderSource(str(root)))
    assert set(found) == {"m", "m/w.bin"}
    assert len(caplog.messages) == 1
    assert "left out 8 names" in caplog.messages[0]


def test_rewriting_in_place_is_noticed(root: Path) -> None:
    source = FolderSource(str(root))
    obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
    before = (root / "m" / "w.bin").stat()
    (root / "m" / "w.bin").write_bytes(ramp(100, 1))
    os.utime(root / "m" / "w.bin", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ChangedError, match=r"m/w\.bin"):
        read(source, obj)


def test_names_that_no_listing_gave_are_not_found(root: Path) -> None:
    source = FolderSource(str(root))
    for path in ("../registry", "m/../m", "/etc", "m//w.bin", "."):
        with pytest.raises(NotFoundError):
            list(source.list(path, deadline_s=deadline()))


def test_an_unreadable_directory_is_an_access_error(root: Path) -> None:
    (root / "m").chmod(0)
    uid = os.geteuid()
    try:
        if uid == 0:
            os.seteuid(65534)  # root reads everything
        with pytest.raises(AccessError, match="mode"):
            list(FolderSource(str(root)).list("m", deadline_s=deadline()))
    finally:
        os.seteuid(uid)
        (root / "m").chmod(0o755)


class TestWhereStrangersMayWrite:
    """A folder below `beneath`: who may put links there still sees nothing that lies elsewhere."""

    @pytest.fixture
    def allowed(self, root: Path) -> Path:
        """The directory above `root`; beside it, what only the node may read, and another model that all may."""
        allowed = root.parent / "allowed"
        allowed.mkdir()
        root.rename(allowed / "team")
        (allowed / "other").mkdir()
        (allowed / "other" / "w.bin").write_bytes(ramp(50))
        (root.parent / "node" / "m").mkdir(parents=True)
        (root.parent / "node" / "m" / "w.bin").write_bytes(b"secret")
        return allowed

    def source(self, allowed: Path) -> FolderSource:
        return FolderSource(str(allowed / "team"), beneath=str(allowed))

    def test_links_that_lead_out_are_left_out(self, allowed: Path, caplog: pytest.LogCaptureFixture) -> None:
        team = allowed / "team"
        (team / "shadow").symlink_to(allowed.parent / "node" / "m" / "w.bin")
        (team / "node").symlink_to("../../node")
        (team / "chain").symlink_to("shadow")
        (team / "gone").symlink_to("/nowhere")
        (team / "latest").symlink_to("m")
        (team / "other").symlink_to(allowed / "other")
        (team / "file").symlink_to(allowed / "other" / "w.bin")
        with caplog.at_level(logging.WARNING):
            source = self.source(allowed)
            found = list_tree(source)
        assert set(found) == {"m", "m/w.bin", "latest", "other", "other/w.bin", "file"}
        assert found["latest"].kind is EntryKind.SYMLINK
        for path, content in (("m/w.bin", ramp(100)), ("other/w.bin", ramp(50)), ("file", ramp(50))):
            assert read(source, object_of(source, path, found[path])) == content
        assert f"leads out of {allowed}" in caplog.text

    def test_directories_that_become_links_later(self, allowed: Path) -> None:
        """Whoever saw the version of what is outside may ask for it by that."""
        source, team, node = self.source(allowed), allowed / "team", allowed.parent / "node"
        (team / "m").rename(allowed / "was")
        (team / "m").symlink_to(node / "m")
        outside = Entry("w.bin", EntryKind.FILE, 6, 0, file_version((node / "m" / "w.bin").stat()))
        with pytest.raises(NotFoundError, match="leads out of"):
            read(source, object_of(source, "m/w.bin", outside))
        with pytest.raises(NotFoundError, match="leads out of"):
            list(source.list("m", deadline_s=deadline()))
        team.rename(allowed / "away")
        team.symlink_to(node)
        with pytest.raises(NotFoundError, match="leads out of"):
            list(source.list("", deadline_s=deadline()))

    def test_steps_that_become_links_once_they_were_looked_at(
        self, allowed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look and the opening: as if a link had been put there at the worst instant."""
        source, team = self.source(allowed), allowed / "team"
        obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
        (team / "m").rename(allowed / "was")
        (team / "m").symlink_to(allowed.parent / "node" / "m")
        monkeypatch.setattr(os.path, "realpath", lambda path, strict=False: str(path))
        with pytest.raises(NotFoundError, match="not a directory"):
            read(source, obj)
        with pytest.raises((NotFoundError, ChangedError)):
            list(source.list("m", deadline_s=deadline()))
        assert set(list_tree(source)) == set()

    def test_what_lies_elsewhere_is_not_opened(self, allowed: Path) -> None:
        with pytest.raises(OSError, match="leads out of"):
            open_beneath(str(allowed), str(allowed.parent / "node"), os.O_RDONLY)
        with pytest.raises(OSError, match="leads out of"):
            open_beneath(str(allowed), f"{allowed}-too", os.O_RDONLY)
        os.close(open_beneath(str(allowed), str(allowed), os.O_RDONLY))

    def test_what_was_remembered_without_it_says_nothing_here(self, allowed: Path) -> None:
        assert self.source(allowed).identity != FolderSource(str(allowed / "team")).identity

    def test_a_registry_in_such_a_folder(self, allowed: Path) -> None:
        """Also the place above the one that is named, where its marker is looked for."""
        options = SourceOptions(beneath=str(allowed))
        for place in (allowed.parent, allowed.parent / "node", allowed / "team"):
            (place / MARKER_KEY).write_bytes(MARKER_BODY)
        (allowed / "link").symlink_to(allowed.parent / "node")
        for url in (f"mfs+file://{allowed}", f"mfs+file://{allowed}/link"):
            with pytest.raises(NotFoundError, match="no registry"):
                list(open_source(url, options).list("", deadline_s=deadline()))
        for url, given in ((f"mfs+file://{allowed}/team", options), (f"mfs+file://{allowed}/link", SourceOptions())):
            assert list(open_source(url, given).list("", deadline_s=deadline())) == [("", [])]


class TestWhatIsOurs:
    """A folder ends at mounts of ours and at the cache of its own mount, whatever path leads there."""

    def test_its_own_mount_point_and_cache(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("mnt", ".cache/v1", "m/sub"):
            (root / name).mkdir(parents=True)
        (root / "to-cache").symlink_to(".cache")
        (root / "in-cache").symlink_to(".cache/v1")
        (root / "to-mnt").symlink_to("mnt")
        source = FolderSource(str(root), mountpoint=str(root / "mnt"), cache_directory=str(root / ".cache"))
        assert set(list_tree(source)) == {"m", "m/sub", "m/w.bin"}
        assert "left out 5 names" in caplog.messages[0]

    def test_a_cache_reached_by_another_path(self, root: Path, tmp_path: Path) -> None:
        (root / "real").mkdir()
        (tmp_path / "elsewhere").symlink_to(root / "real")
        source = FolderSource(str(root), cache_directory=str(tmp_path / "elsewhere"))
        assert set(list_tree(source)) == {"m", "m/w.bin"}

    def test_the_cache_of_another_mount_is_empty_and_no_source(self, root: Path) -> None:
        (root / "other").mkdir()
        (root / "other" / "mfs-cache.json").write_text("{}")
        (root / "other" / "v1").mkdir()
        assert set(list_tree(FolderSource(str(root)))) == {"m", "m/w.bin", "other"}
        with pytest.raises(StoreError, match="the cache of a mount"):
            list_tree(FolderSource(str(root / "other")))

    def test_a_place_that_became_a_mount_of_ours(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (root / "m" / "mnt").mkdir()
        monkeypatch.setattr(fence, "look", lambda *own: fence.Fence(frozenset([str(root / "m" / "mnt")]), None))
        source = FolderSource(str(root))
        assert set(list_tree(source)) == {"m", "m/w.bin"}
        assert list(source.list("m/mnt", deadline_s=deadline())) == [("m/mnt", [])]
        with pytest.raises(StoreError, match="in the mfs mount"):
            list_tree(FolderSource(str(root / "m" / "mnt")))


def test_dates_that_no_tree_shows(root: Path) -> None:
    for name, ns in (("early", -(10**18)), ("late", 10**19)):
        (root / name).write_bytes(b"1")
        os.utime(root / name, ns=(0, ns))
    source = FolderSource(str(root))
    found = list_tree(source)
    assert (found["early"].mtime_ns, found["late"].mtime_ns) == (0, MTIME_NS_MAX)
    for name in ("early", "late"):
        assert read(source, object_of(source, name, found[name])) == b"1"

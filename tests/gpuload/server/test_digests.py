"""Digests that outlive a load, a process and a mount: what is remembered, what is not, and that it never lies."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuload.server import versions
from gpuload.server.digest_files import DigestFiles, decode, encode
from gpuload.server.digests import DigestCache, now_ns
from gpuload.server.versions import Version, is_open_for_writing, look
from mfs.control import mountinfo

ROW = (0, 1, 1, 1)
DIGEST = b"d" * 32
S = 1_000_000_000


def version(inode: int, changed_ns: int = 0) -> Version:
    return Version((1, inode), b"key%d" % inode, changed_ns)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    yield opened
    os.close(opened)


def test_digests_of_files_that_just_changed_are_not_remembered(fd: int) -> None:
    cache = DigestCache(settled_s=2.0)
    assert not cache.add(version(1, 10 * S), fd, 11 * S, [(ROW, DIGEST)])
    assert cache.find(version(1, 10 * S)) == {}
    assert cache.add(version(1, 10 * S), fd, 12 * S, [(ROW, DIGEST)])
    assert cache.find(version(1, 10 * S)) == {ROW: DIGEST}


def test_the_digest_cache_is_bounded(fd: int) -> None:
    cache = DigestCache(entries_max=10, settled_s=0)
    for inode in range(20):
        cache.add(version(inode), fd, now_ns(), [((i, 1, 1, 1), DIGEST) for i in range(4)])
        assert cache.entries_count <= 10
    assert cache.find(version(0)) == {}
    assert len(cache.find(version(19))) == 4
    cache.forget(version(19))
    assert cache.entries_count == 4


def test_a_file_that_somebody_may_store_into_is_not_remembered(tmp_path: Path, fd: int) -> None:
    """Stores into a mapped page leave no trace in a file's times: a writer who has it open or mapped is seen."""
    cache = DigestCache(settled_s=0)
    assert not is_open_for_writing(fd)
    with open(tmp_path / "file", "r+b") as writer:
        assert is_open_for_writing(fd)
        mapped = mmap.mmap(writer.fileno(), 5000)
    assert is_open_for_writing(fd), "closed, and still mapped"
    assert not cache.add(version(1, 1), fd, now_ns(), [(ROW, DIGEST)])
    mapped.close()
    assert cache.add(version(1, 1), fd, now_ns(), [(ROW, DIGEST)])


def test_a_changed_file_is_another_version(tmp_path: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "CHANGE_STAMPED", versions.CHANGE_STAMPED | {versions._file_system(fd)})
    before = look(fd)
    assert before == look(fd)
    os.utime(tmp_path / "file", ns=(0, os.fstat(fd).st_mtime_ns))
    assert look(fd).key != before.key, "ctime is what no program can set"


def test_file_systems_whose_times_say_nothing_are_not_trusted(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "CHANGE_STAMPED", set())
    assert look(fd).key is None
    cache = DigestCache(settled_s=0)
    assert not cache.add(look(fd), fd, now_ns(), [(ROW, DIGEST)])
    assert cache.find(look(fd)) == {}


def test_images_are_not_trusted(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that nobody can write to was built somewhere, its times with it. A read-only bind mount is none."""
    monkeypatch.setattr(versions, "CHANGE_STAMPED", {versions._file_system(fd)})
    device = os.fstat(fd).st_dev
    line = "1 1 %d:%d / / %s - ext4 /dev/x %s"
    for mount, options, is_trusted in (("ro", "rw,errors=remount-ro", True), ("rw", "ro,relatime", False)):
        table = mountinfo.parse((line % (os.major(device), os.minor(device), mount, options)).encode())
        monkeypatch.setattr(mountinfo, "read", lambda table=table: table)
        assert (look(fd).key is not None) == is_trusted


def test_digests_outlive_their_process(tmp_path: Path, fd: int) -> None:
    one = DigestCache(DigestFiles(tmp_path / "d"), settled_s=0)
    one.add(version(1), fd, now_ns(), [(ROW, DIGEST)])
    one.add(version(1), fd, now_ns(), [((7, 1, 1, 1), DIGEST)])
    again = DigestCache(DigestFiles(tmp_path / "d"), settled_s=0)
    assert again.find(version(1)) == {ROW: DIGEST, (7, 1, 1, 1): DIGEST}
    again.forget(version(1))
    assert DigestCache(DigestFiles(tmp_path / "d")).find(version(1)) == {}, "forgotten on disk too"


def test_what_another_process_finds_out_meanwhile_is_seen_and_kept(tmp_path: Path, fd: int) -> None:
    ours, theirs = (DigestCache(DigestFiles(tmp_path / "d"), settled_s=0) for _ in range(2))
    ours.add(version(1), fd, now_ns(), [(ROW, DIGEST)])
    theirs.add(version(1), fd, now_ns(), [((7, 1, 1, 1), DIGEST)])
    assert ours.find(version(1)) == {ROW: DIGEST, (7, 1, 1, 1): DIGEST}
    theirs.add(version(1), fd, now_ns(), [((8, 1, 1, 1), DIGEST)])
    ours.add(version(1), fd, now_ns(), [((9, 1, 1, 1), DIGEST)])
    assert len(DigestCache(DigestFiles(tmp_path / "d")).find(version(1))) == 4


def test_files_and_folder_are_for_us_alone(tmp_path: Path) -> None:
    files = DigestFiles(tmp_path / "d")
    files.write(b"k", {ROW: DIGEST})
    assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "d", *(tmp_path / "d").iterdir())] == ["0o700", "0o600"]


def test_a_folder_that_others_may_write_to_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DigestFiles(tmp_path / "d").write(b"k", {ROW: DIGEST})
    os.chmod(tmp_path / "d", 0o777)
    assert DigestFiles(tmp_path / "d").read(b"k") == {}
    assert "can be written by others" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "d").write_bytes(b"")
    files = DigestFiles(tmp_path / "d")
    files.write(b"k", {ROW: DIGEST})
    assert files.read(b"k") == {}
    assert "not kept" in caplog.text


rows = st.dictionaries(
    st.tuples(*[st.integers(0, 2**64 - 1)] * 4), st.binary(min_size=32, max_size=32), max_size=20
)  # fmt: skip


@settings(deadline=None)
@given(key=st.binary(max_size=40), known=rows)
def test_what_is_written_is_read(key: bytes, known: dict) -> None:  # type: ignore[type-arg]
    assert decode(encode(key, known), key) == known


@settings(deadline=None)
@given(known=rows, data=st.data())
def test_damaged_files_are_refused_whole(known: dict, data: st.DataObject) -> None:  # type: ignore[type-arg]
    raw = bytearray(encode(b"key", known))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    assert decode(bytes(raw), b"key") is None
    assert decode(bytes(raw[:at]), b"key") is None
    assert decode(encode(b"key", known), b"other") is None


def test_a_damaged_file_is_a_miss_and_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = DigestFiles(tmp_path / "d")
    files.write(b"k", {ROW: DIGEST})
    (path,) = (tmp_path / "d").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert files.read(b"k") == {}
    assert not path.exists()
    assert "damaged" in caplog.text


def test_the_folder_is_bounded_and_the_least_recently_used_go(tmp_path: Path) -> None:
    one = len(encode(b"k0", {ROW: DIGEST}))
    files = DigestFiles(tmp_path / "d", bytes_max=3 * one)
    for i in range(3):
        files.write(b"k%d" % i, {ROW: DIGEST})
        os.utime(files._path(b"k%d" % i), ns=(i, i))
    assert files.read(b"k0")  # a use
    files.write(b"k3", {ROW: DIGEST})
    assert [bool(files.read(b"k%d" % i)) for i in range(4)] == [True, False, True, True]
    assert sum(p.stat().st_size for p in (tmp_path / "d").iterdir()) <= 3 * one

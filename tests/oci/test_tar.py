"""The headers of a tar, walked by ranges; what `tarfile` writes is found, what strangers write does not hurt."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from mfs.errors import StoreError, TransientStoreError
from mfs.oci import tar
from mfs.oci.artifact import BadLayerError
from mfs.oci.tar import Kind
from mfs.testing import ramp
from mfs.testing.suite import deadline
from tests.oci.artifacts import tar_of

LONG = "d" * 90 + "/" + "e" * 120 + "/" + "f" * 200


class Counting:
    def __init__(self, body: bytes) -> None:
        self.body = body
        self.reads: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(self.body)
        self.reads.append((start, stop))
        return self.body[start:stop]


def walk(body: bytes) -> list[tar.Member]:
    return list(tar.members(Counting(body), len(body), tar.Allowance("x", deadline())))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_format_says_the_same(kind: int) -> None:
    files = {"./a.txt": b"1", "dir/w.bin": ramp(70_000), "empty": b"", "模型/плюс.bin": b"x" * 512}
    if kind != tarfile.USTAR_FORMAT:
        files[LONG] = b"long"
    body = tar_of(files, kind=kind)
    found = {member.path: body[member.offset : member.offset + member.size] for member in walk(body)}
    assert found == {path.removeprefix("./"): content for path, content in files.items()}
    assert {member.mtime_ns for member in walk(body)} == {1_700_000_000 * 10**9}


def test_what_the_tar_command_writes(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/w.bin").write_bytes(ramp(10_000))
    os.link(tmp_path / "in/w.bin", tmp_path / "in/zz-twin")
    os.symlink("../w.bin", tmp_path / "in/sub/link")
    os.mkfifo(tmp_path / "in/fifo")
    with (tmp_path / "in/sparse").open("wb") as file:
        file.truncate(10 << 20)
    for form in ("gnu", "posix"):
        subprocess.run(["tar", "--format", form, "--sort=name", "-S", "-C", str(tmp_path / "in"), "-cf",
                        str(tmp_path / "out.tar"), "."], check=True, timeout=60)  # fmt: skip
        body = (tmp_path / "out.tar").read_bytes()
        found = {member.path: member for member in walk(body)}
        assert body[found["w.bin"].offset :][: found["w.bin"].size] == ramp(10_000)
        assert (found["zz-twin"].kind, found["zz-twin"].target) == (Kind.TWIN, "w.bin")
        assert (found["sub"].kind, found["sub/link"].kind, found["sub/link"].target) == (
            Kind.DIRECTORY, Kind.LINK, "../w.bin")  # fmt: skip
        assert found["fifo"].fault
        assert any("sparse" in member.fault for member in found.values())


def test_large_members_cost_a_small_read_each_and_small_ones_share() -> None:
    large = tar_of({f"{number}.bin": bytes(3 << 20) for number in range(6)})
    reader = Counting(large)
    assert len(list(tar.members(reader, len(large), tar.Allowance("x", deadline())))) == 6
    assert len(reader.reads) <= 8
    assert sum(stop - start for start, stop in reader.reads) < 50_000
    small = tar_of({f"{number}.json": b"{}" for number in range(3000)})
    reader = Counting(small)
    assert len(list(tar.members(reader, len(small), tar.Allowance("x", deadline())))) == 3000
    assert len(reader.reads) < 20


def member(name: str, size: int = 0, **facts: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in facts.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(*records: bytes) -> bytes:
    body = b"".join(records)
    return member("x", len(body), type=tarfile.XHDTYPE) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    "body",
    [
        b"no tar at all" * 100,
        b"x" * 100,
        member("a", 5000) + bytes(512),
        member("a", 10**15) + bytes(1024),
        member("a", -(2**40)) + bytes(1024),
        member("x", 2 << 20, type=tarfile.XHDTYPE) + bytes(3 << 20),
        extended(b"9999 path=x\n") + member("a"),
        extended(b"0 path=x\n") + member("a"),
        extended(b"garbage") + member("a"),
        extended(b"14 size=-5000\n") + member("a") + bytes(1024),
        extended(b"14 size=1e999\n") + member("a") + bytes(1024),
        member("L", 2 << 20, type=tarfile.GNUTYPE_LONGNAME) + bytes(3 << 20),
        extended(b"7 a=b\n") * 9 + member("a"),
    ],
)
def test_broken_and_lying_headers_are_an_error(body: bytes) -> None:
    with pytest.raises(BadLayerError):
        walk(body)


def test_a_tar_that_ends_without_an_end_is_read_and_one_of_too_many_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [found.path for found in walk(member("a") + member("b", 3) + b"123")] == ["a", "b"]
    assert walk(b"") == []
    monkeypatch.setattr(tar, "MEMBERS_MAX", 10)
    with pytest.raises(BadLayerError, match="more than 10"):
        walk(member("a") * 11)


def test_a_global_header_says_nothing_of_names() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "evil"}) as archive:
        archive.addfile(tarfile.TarInfo("good"))
    assert [found.path for found in walk(buffer.getvalue())] == ["good"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
def test_names_and_targets_that_are_too_long_are_not_kept(kind: bytes) -> None:
    body = b"d/" * 300_000
    if kind == tarfile.XHDTYPE:
        body = b"600013 path=" + body + b"\n"
    found = walk((member("L", len(body), type=kind) + body + bytes(-len(body) % 512) + member("a")) * 3)
    assert [one.kind for one in found] == [Kind.NAMELESS] * 3
    assert all(len(one.path) <= 100 and "600000 characters" in one.fault for one in found)


def test_of_extended_headers_only_what_is_used_is_kept() -> None:
    odd = [b"12 k%04d=xx\n" % number for number in range(1000)]
    assert tar._extended(tarfile.XHDTYPE, b"".join([*odd, b"9 path=b\n"])) == {"path": "b"}


def test_all_tars_of_a_listing_are_bounded_together_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    body = member("a") * 6
    monkeypatch.setattr("mfs.sources.bounds.ENTRIES_MAX", 10)
    allowance = tar.Allowance("x", deadline())
    assert len(list(tar.members(Counting(body), len(body), allowance))) == 6
    with pytest.raises(StoreError, match="x: more than 10 names"):
        list(tar.members(Counting(body), len(body), allowance))
    monkeypatch.setattr(tar, "NAMES_MAX", 5)
    with pytest.raises(StoreError, match="x: more than 5 characters"):
        list(tar.members(Counting(body), len(body), tar.Allowance("x", deadline())))
    with pytest.raises(TransientStoreError, match="before the deadline"):
        list(tar.members(Counting(body), len(body), tar.Allowance("x", deadline(0))))

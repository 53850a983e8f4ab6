"""The record of what directories showed: what is written comes back, what is damaged is thrown away."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from mfs.tree.listing import Drafts, Listing
from mfs.tree.record import Record, TreeRecord
from mfs.types import Entry, EntryKind

TIMES = array("Q", [7, 9]).tobytes()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "v2").mkdir()
    return tmp_path


def test_rows_come_back_by_source_and_path(cache: Path) -> None:
    record = TreeRecord(cache)
    assert record.load(["s3://a", "s3://b"]) == ({}, 0)
    rows = [("s3://a", "", 5, b"f", TIMES), ("s3://a", "m/\u00e4", 6, b"g", b""), ("s3://c", "m", 99, b"h", b"")]
    assert record.save(rows)
    found, latest_ns = TreeRecord(cache).load(["s3://b", "s3://a"])
    assert found == {(1, ""): Record(5, b"f", TIMES), (1, "m/\u00e4"): Record(6, b"g", b"")}
    assert latest_ns == 9


def test_what_another_mount_wrote_first_of_the_same_content_holds(cache: Path) -> None:
    """Two mounts of one source see a change at different times: each must find its own or an earlier one again."""
    record = TreeRecord(cache)
    record.save([("a", "m", 5, b"old", b"")])
    record.save([("a", "m", 10, b"new", b"")])
    record.save([("a", "m", 11, b"new", b"")])
    assert record.load(["a"])[0] == {(0, "m"): Record(10, b"new", b"")}


def test_a_damaged_file_is_thrown_away_and_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = TreeRecord(cache)
    (cache / "v2" / "tree.sqlite").write_bytes(b"this is no database at all" * 100)
    assert record.load(["a"]) == ({}, 0)
    assert "tree.sqlite" in caplog.text
    assert record.save([("a", "m", 5, b"f", b"")])
    assert len(record.load(["a"])[0]) == 1


def test_what_another_mount_wrote_later_of_other_content_holds(cache: Path) -> None:
    """A mount that is slow to see a change must not put its older view in place of the newer one."""
    record = TreeRecord(cache)
    record.save([("a", "m", 20, b"newest", b"")])
    record.save([("a", "m", 15, b"newer", b"")])
    assert record.load(["a"])[0] == {(0, "m"): Record(20, b"newest", b"")}


@pytest.mark.parametrize(
    ("mtime_ns", "times"),
    [(5, b"123"), (-1, TIMES), (2**63 - 1, TIMES), (5, array("Q", [2**64 - 1]).tobytes()), (5, "text"), ("x", TIMES)],
)
def test_a_row_that_makes_no_sense_costs_the_record_not_the_mount(
    cache: Path, caplog: pytest.LogCaptureFixture, mtime_ns: Any, times: Any
) -> None:
    """Without fsync a power cut may leave anything there. A time beyond what fits would end each later mount."""
    record = TreeRecord(cache)
    record.save([("a", "m", mtime_ns, b"f", times)])
    assert record.load(["a"]) == ({}, 0)
    assert "tree.sqlite" in caplog.text
    caplog.clear()
    assert record.save([("a", "m", 5, b"f", b"")])  # of the same content: what made no sense does not stay for that
    assert record.load(["a"]) == ({(0, "m"): Record(5, b"f", b"")}, 5)
    assert not caplog.text


def test_a_cache_directory_that_is_gone_is_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = TreeRecord(cache / "gone")
    assert not record.save([("a", "m", 5, b"f", b"")])
    assert record.load(["a"]) == ({}, 0)
    assert "tree.sqlite" in caplog.text


def test_what_was_shown_comes_back_whole_and_what_is_damaged_is_left_out(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = TreeRecord(cache)
    root = listing_of(Entry("m", EntryKind.DIRECTORY), Entry("w.bin", EntryKind.FILE, 7, 10**18, "v1", None, "here"))
    model = listing_of(Entry("\u00e4.bin", EntryKind.FILE, 5, 10**18, "v2", "sha256:00"))
    evil = listing_of(Entry("ok", EntryKind.FILE, 1, 1, "v"))
    evil.names._text = b".."
    shown = [("s3://a", path, found.export()) for path, found in (("m", model), ("", root), ("e", evil))]
    assert record.save([], shown=[*shown, ("s3://a", "x", ["nonsense"]), ("s3://b", "", root.export())])
    found = record.shown("s3://a")
    assert list(found) == ["", "e", "m"]  # each after the one it stands in
    assert found[""].has_same_content(root)
    assert found[""].entry(1).locator == "here"
    assert found["m"].has_same_content(model)
    assert len(found["e"]) == 0
    assert "'x' showed is damaged" in caplog.text
    assert record.save([], absent=[("s3://a", "m")])
    assert list(record.shown("s3://a")) == ["", "e"]


def listing_of(*entries: Entry) -> Listing:
    drafts = Drafts("")
    drafts.add("", entries)
    return drafts.finish()[""]

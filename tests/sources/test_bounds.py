"""What strangers choose is bounded: lengths, depths, numbers, dates, counts; what is left out is said in one line."""

from __future__ import annotations

import hashlib
import os

import pytest

from mfs.errors import StoreError
from mfs.fetch.dates import epoch_ns, epoch_s, http_date
from mfs.sources import bounds, hf
from mfs.sources.tree import TreeBuilder
from mfs.types import Entry, EntryKind

FILE = Entry("", EntryKind.FILE, 1, 1, "v")


@pytest.mark.parametrize(
    ("path", "is_good"),
    [
        ("d/" * (bounds.DEPTH_MAX - 1) + "f", True),
        ("d/" * bounds.DEPTH_MAX + "f", False),
        ("/".join(["é" * 127] * 15), True),
        ("/".join(["é" * 127] * 17), False),
        ("x" * 255, True),
        ("x" * 256, False),
    ],
)
def test_paths_are_as_long_and_deep_as_programs_can_name_them(path: str, is_good: bool) -> None:
    tree = TreeBuilder("t", "")
    tree.add_file(path, FILE)
    names = {f"{folder}/{entry.name}" if folder else entry.name for folder, found in tree.pages() for entry in found}
    assert (path in names) == is_good
    assert len(os.fsencode(path)) < os.pathconf("/", "PC_PATH_MAX") or not is_good


def test_what_is_above_a_name_that_cannot_be_is_there_empty(caplog: pytest.LogCaptureFixture) -> None:
    tree = TreeBuilder("t", "")
    for name in ("\0", "\n", "\x7f", "\x9b", ".", "..", "", "\udcff", "x" * 256):
        tree.add_file(f"m/{name}", FILE)
    for path in ("/lead", "../up", "d/" * 3000):
        tree.add_file(path, FILE)
    assert list(tree.pages()) == [("", [Entry("m", EntryKind.DIRECTORY)]), ("m", [])]
    assert len(caplog.messages) == 1
    assert "left out 12 names" in caplog.text
    assert "and 9 more" in caplog.text
    assert len(caplog.text) < 2000


def test_a_file_of_no_bytes_has_the_digest_of_none(caplog: pytest.LogCaptureFixture) -> None:
    tree, empty = TreeBuilder("t", ""), FILE._replace(size=0)
    for name, data in (("none", b""), ("some", b"x")):
        tree.add_file(name, empty._replace(digest=f"sha256:{hashlib.sha256(data).hexdigest()}"))
    tree.add_file("unstated", empty)
    assert [entry.name for entry in dict(tree.pages())[""]] == ["none", "unstated"]
    assert "'some' (has no bytes, and the sha256:2d711642b726… of some)" in caplog.text


def test_a_name_said_twice_is_served_as_said_last_and_named(caplog: pytest.LogCaptureFixture) -> None:
    tree = TreeBuilder("t", "")
    tree.add_file("m/f", FILE)
    tree.add_file("m/f", FILE)
    list(tree.pages())
    assert not caplog.messages
    tree.add_file("m/f", FILE._replace(version="w"))
    assert dict(tree.pages())["m"][0].version == "w"
    assert "is named twice" in caplog.text


def test_more_names_than_any_tree_has_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "ENTRIES_MAX", 10)
    monkeypatch.setattr(bounds, "DIRECTORIES_MAX", 5)
    tree = TreeBuilder("t", "")
    for i in range(10):
        tree.add_file(f"{i}", FILE)
        tree.add_file(f"{i}", FILE)
    with pytest.raises(StoreError, match="more than 10 names"):
        tree.add_file("more", FILE)
    with pytest.raises(StoreError, match="more than 5 directories"):
        TreeBuilder("t", "").add_file("a/b/c/d/e/f", FILE)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1970-01-01T00:00:01Z", 1),
        ("1970-01-01 01:00:01+01:00", 1),
        ("1970-01-01T00:00:01", 1),
        ("1970-01-01T00:00:01.123456789Z", 1),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 1),
        ("Thursday, 01-Jan-70 00:00:01 GMT", 1),
        ("Thu Jan  1 00:00:01 1970", 1),
        ("Thu, 01 Jan 1970 00:00:01 -0000", 1),
        ("2016-12-31T23:59:60Z", 1483228799),
        ("0001-01-01T00:00:00Z", -62_135_596_800),
        ("Mon, 01 Jan 0001 00:00:00 GMT", -62_135_596_800),
        ("Thu, 01 Jan 0070 00:00:00 +0000", -59_958_144_000),
        ("Sat, 01 Jan 0000 00:00:00 GMT", None),
        ("9999-12-31T23:59:59Z", 253_402_300_799),
        ("9999-12-31T23:59:59-01:00", None),
        ("10000-01-01T00:00:00Z", None),
        (1, 1), (1.9, 1), (-0.5, -1), (10**11, 10**11), (253_402_300_800, None), (10**400, None),
        pytest.param(10**5000, None, id="5000 digits"), pytest.param("x" * 10**6, None, id="a long text"),
        (float("nan"), None), (float("inf"), None), (True, None), (None, None), ([], None), ("", None),
    ],
)  # fmt: skip
def test_dates_in_every_form_and_none(value: object, seconds: int | None) -> None:
    assert epoch_s(value) == seconds
    assert (epoch_ns(value) is None) == (seconds is None)
    if seconds is not None:
        assert epoch_s(http_date(seconds)) == seconds


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 10_000, "nested too deep"),
        (b'{"a":' * 10_000, "nested too deep"),
        (b"[" + b"{}," * 3_000_000 + b"{}]", "objects and lists"),
        (b"\xff\xfe", "Expecting value"),
    ],
)
def test_json_that_no_listing_is(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounds.parse_json(body)


def test_json_keeps_what_is_good_beside_what_is_not() -> None:
    assert bounds.parse_json(b'["a\xffb", ' + b"9" * 5000 + b", 7, NaN]")[:3] == ["a\udcffb", float("inf"), 7]


def test_an_odd_entry_of_the_hub_costs_itself_alone() -> None:
    good = b'{"type": "file", "path": "m/good", "size": 1, "oid": "x"}'
    odd = (
        b'"path": "no-size", "oid": "x"', b'"path": 5, "size": 1, "oid": "x"', b'"path": "o", "size": 1, "oid": null',
        b'"path": "s", "size": -1, "oid": "x"', b'"path": "f", "size": 1.5, "oid": "x"',
        b'"path": "l", "size": 1, "lfs": [1]', b'"path": "l", "lfs": 7',
    )  # fmt: skip
    files = [b'{"type": "file", ' + facts + b"}" for facts in odd]
    others = (b"7", b"null", b"{}", b'{"type": "directory", "path": ""}')
    tree = TreeBuilder("t", "")
    hf._add_page(tree, b"[" + b",".join((*files, *others, good)) + b"]", "c" * 40, "t")
    found = [(path, [entry.name for entry in entries]) for path, entries in tree.pages()]
    assert found == [("", ["m"]), ("m", ["good"])]
    for body in (b"[" * 10_000, b"{}", b"[1, 2]", b"<html>"):
        with pytest.raises(StoreError, match="expected a page of the repository's tree"):
            hf._add_page(TreeBuilder("t", ""), body, "c" * 40, "t")

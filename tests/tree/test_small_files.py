"""Which files are small, and how many of them are brought before anybody asks."""

from __future__ import annotations

from mfs.tree.listing import Listing
from mfs.tree.small_files import _within, small_files
from mfs.types import SMALL_FILE_BYTES, Entry, EntryKind, ObjectId

FILE = EntryKind.FILE


def names(new: Listing, old: Listing | None = None) -> list[str]:
    return [new.names[index] for index in small_files(new, old)]


def listing(*entries: Entry) -> Listing:
    return Listing(sorted(entries, key=lambda entry: entry.name.encode()))


def file(name: str, version: str = "1", size: int = 10) -> Entry:
    return Entry(name, FILE, size, 5, version)


def test_small_is_told_by_size_and_name() -> None:
    found = listing(
        file("config.pbtxt"), file("model.py"), file("merges"), file("tokenizer.json", size=SMALL_FILE_BYTES),
        file("vocab.json", size=SMALL_FILE_BYTES + 1), file("w.safetensors"), file("W.GGUF"), file("m.onnx"),
        file("pytorch_model.bin"), file("empty", size=0), Entry("folder", EntryKind.DIRECTORY),
        Entry("link", EntryKind.SYMLINK, version="model.py"),
        file("model.safetensors.index.json"),
    )  # fmt: skip
    assert names(found) == ["config.pbtxt", "merges", "model.py", "model.safetensors.index.json", "tokenizer.json"]


def test_of_a_new_revision_only_what_changed() -> None:
    old = listing(file("a"), file("b"), file("gone"))
    assert names(listing(file("a"), file("b", "2"), file("new")), old) == ["b", "new"]
    assert names(old, old) == []


def test_no_more_than_the_bounds_allow() -> None:
    wanted = [(ObjectId("s", f"{number}", 10, "v"), 0) for number in range(5)]
    assert _within(wanted, 3, 1000) == wanted[:3]
    assert _within(wanted, 10, 25) == wanted[:2]
    assert _within(wanted, 10, 50) == wanted
    assert _within(wanted, -1, 1000) == []

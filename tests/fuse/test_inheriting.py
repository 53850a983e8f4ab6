"""What a daemon makes of the journal of one that was killed, before the kernel is answered."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from mfs.errors import StoreError
from mfs.fuse.backing import NodeIds
from mfs.fuse.files import FileOperations
from mfs.fuse.handles import FileRow, OpenFiles
from mfs.fuse.journal import Journal
from mfs.fuse.waiting import Waiting
from mfs.tree.listing import Drafts
from mfs.tree.namespace import Namespace
from mfs.types import EntryKind, ObjectId
from mfs.workers.frames import object_to_wire

INODE = 0x1234_5600


class Reopened:
    """A file of which nothing is asked."""

    def pass_through(self) -> None: ...

    def export(self) -> list[Any]:
        return []

    def close(self) -> None: ...


class Reader:
    def reopen(self, exported: list[Any]) -> Reopened:
        return Reopened()


async def never_listed(source: int, path: str, drafts: Drafts) -> None:
    raise StoreError("the origin is away")


def row(path: str, renewals: int, backing: int = 0) -> list[Any]:
    obj = object_to_wire(ObjectId("test://origin", path, 7_000_000, "v1"))
    return list(FileRow(EntryKind.FILE, 1, 5, path, [obj, 0, False], backing, renewals, False))


@pytest.fixture
def journal() -> Journal:
    return Journal.create()


def inherited(journal: Journal) -> tuple[Namespace, NodeIds, list[tuple[int, str]]]:
    namespace = Namespace([""], never_listed, lambda source: "test://origin")
    node_ids = NodeIds()

    async def main() -> list[tuple[int, str]]:
        files = FileOperations(namespace, Reader(), node_ids, journal, Waiting())  # type: ignore[arg-type]
        return files.inherit(journal)

    return namespace, node_ids, trio.run(main)


def test_names_that_lead_elsewhere_are_told_again(journal: Journal) -> None:
    """The daemon was killed after it gave a file that became whole another node, before the kernel heard of it."""
    journal.note(INODE, row("llama/w.bin", renewals=1))
    namespace, node_ids, names = inherited(journal)
    [(directory, name)] = names
    known = namespace.directory(directory)
    assert known is not None
    assert (known.path, name) == ("llama", "w.bin")
    assert node_ids.node_of(INODE) == INODE | 1


def test_nothing_is_told_of_files_that_are_open_by_their_latest_node(journal: Journal) -> None:
    journal.note(INODE, row("w.bin", renewals=0))
    journal.note(INODE + 0x100 | 2, row("v.bin", renewals=2, backing=7))
    assert inherited(journal)[2] == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_latest_of_several_nodes_counts_in_whatever_order_they_were_noted(
    journal: Journal, order: tuple[int, int]
) -> None:
    """Of an older node that is open as well, the row may know of fewer renewals."""
    rows = [(INODE, row("w.bin", renewals=1)), (INODE | 1, row("w.bin", renewals=2, backing=7))]
    for at in order:
        journal.note(*rows[at])
    _, node_ids, names = inherited(journal)
    assert node_ids.node_of(INODE) == INODE | 2
    assert {name for _, name in names} == {"w.bin"}


def test_handles_that_the_kernel_reads_by_itself_are_counted(journal: Journal) -> None:
    closed: list[int] = []
    file: Any = Reopened()
    files = OpenFiles(journal, lambda exported: file, lambda node, backing: closed.append(node))
    entries = {node: FileRow(*row(f"m/{node}", 0)).entry(node) for node in (16, 32, 48)}
    files.inherit(16, FileRow(*row("m/16", 0, backing=7))._replace(handles_count=3))
    files.inherit(32, FileRow(*row("m/32", 0)))
    ways = [(16, 7), (32, 0), (48, 8), (48, 8)]
    own = [files.add(node, entries[node], file, backing, 0) for node, backing in ways]
    assert (len(files), files.passed_through_count) == (8, 6)
    files.release(16, 1)
    files.release(48, own[2])
    assert (len(files), files.passed_through_count) == (6, 4)
    files.forget(16)  # whatever other daemons have given of it
    assert (len(files), files.passed_through_count) == (4, 2)
    files.release(48, own[3])
    files.release(32, own[1])
    files.add(48, entries[48], file, 0, 0)
    assert (len(files), files.passed_through_count, closed) == (3, 1, [48])
    files.close_all()
    assert files.passed_through_count == 0


@pytest.mark.parametrize("is_disowned", [False, True])
async def test_a_name_never_leads_back_to_a_file_that_was_found_damaged(journal: Journal, is_disowned: bool) -> None:
    """The kernel forgets the node that came after it: how often it was told of the other, a killed daemon knew."""
    journal.note(INODE, list(FileRow(*row("w.bin", renewals=1, backing=7))._replace(is_disowned=is_disowned)))
    namespace, node_ids = Namespace([""], never_listed, lambda source: "test://origin"), NodeIds()
    files = FileOperations(namespace, Reader(), node_ids, journal, Waiting())  # type: ignore[arg-type]
    files.inherit(journal)
    files.forget(INODE | 1)
    assert node_ids.node_of(INODE) == (INODE | 1 if is_disowned else INODE)

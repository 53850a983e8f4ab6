"""The journal: what was written is there, whatever happened to whoever wrote it."""

from __future__ import annotations

import os
import random

import pytest

from mfs.fuse.journal import AGREEMENT, Journal


@pytest.fixture
def journal() -> Journal:
    return Journal.create()


def again(journal: Journal) -> dict[int, object]:
    return dict(Journal(journal.fd).rows())


def test_rows_are_there_for_the_next(journal: Journal) -> None:
    journal.note(0x100, [1, "a/ä", b"\xff", None])
    journal.note(0x200, [2, "\udcff"])
    journal.note(0x100, [3])
    journal.note(AGREEMENT, [b"request", b"reply"])
    journal.forget(0x200)
    journal.forget(0x300)
    assert again(journal) == {0x100: [3]}
    assert Journal(journal.fd).row(AGREEMENT) == [b"request", b"reply"]


def test_the_next_writes_on(journal: Journal) -> None:
    journal.note(0x100, [1])
    heir = Journal(journal.fd)
    heir.note(0x200, [2])
    heir.forget(0x100)
    assert again(journal) == {0x200: [2]}


def test_an_end_that_was_cut_off_does_not_count(journal: Journal) -> None:
    """Wherever: what came before it is there, and the next record takes its place."""
    journal.note(0x100, [1])
    whole = os.fstat(journal.fd).st_size
    journal.note(0x200, ["a row that is cut off"])
    for size in range(whole, os.fstat(journal.fd).st_size):
        copy = os.memfd_create("cut")
        os.pwrite(copy, os.pread(journal.fd, size, 0), 0)
        cut = Journal(copy)
        assert dict(cut.rows()) == {0x100: [1]}
        cut.note(0x300, [3])
        assert dict(Journal(copy).rows()) == {0x100: [1], 0x300: [3]}
        os.close(copy)


def test_a_damaged_record_ends_it(journal: Journal) -> None:
    journal.note(0x100, [1])
    at = os.fstat(journal.fd).st_size
    journal.note(0x200, [2])
    os.pwrite(journal.fd, b"\xee", at + 10)
    assert again(journal) == {0x100: [1]}


def test_what_stood_behind_a_damaged_record_never_counts_again(journal: Journal) -> None:
    journal.note(0x100, [1])
    at = os.fstat(journal.fd).st_size
    for inode in (0x200, 0x300):
        journal.note(inode, [2])
    os.pwrite(journal.fd, b"\xee", at + 10)
    next_one = Journal(os.dup(journal.fd))
    next_one.note(0x200, [4])  # as long as the damaged one
    assert again(next_one) == {0x100: [1], 0x200: [4]}
    next_one.close()


def test_who_hands_it_over_writes_no_more(journal: Journal) -> None:
    """Not over what the next daemon writes, nor what that does not hear of; unless it goes on itself."""
    journal.note(0x100, [1])
    journal.hold()
    journal.note(0x200, [2])
    next_one = Journal(os.dup(journal.fd))
    assert dict(next_one.rows()) == {0x100: [1]}
    next_one.note(0x300, [3])
    journal.forget(0x100)
    assert again(journal) == {0x100: [1], 0x300: [3]}
    next_one.close()


def test_what_was_noted_meanwhile_is_written_by_who_goes_on(journal: Journal) -> None:
    journal.note(0x100, [1])
    journal.hold()
    journal.note(0x200, [2])
    journal.forget(0x100)
    assert again(journal) == {0x100: [1]}
    journal.go_on()
    assert again(journal) == {0x200: [2]} == dict(journal.rows())
    journal.note(0x300, [3])
    assert again(journal) == {0x200: [2], 0x300: [3]}


def test_it_does_not_grow_with_what_went(journal: Journal) -> None:
    """Against a dict, over many compactions; what is out of date goes back to the system."""
    chance, expected = random.Random(3), dict[int, list[object]]()
    for number in range(30_000):
        inode = chance.randrange(1, 50) << 8
        if chance.random() < 0.4:
            journal.forget(inode)
            expected.pop(inode, None)
        else:
            journal.note(inode, [number, "x" * chance.randrange(100)])
            expected[inode] = [number, "x" * len(str(journal.row(inode)[1]))]  # type: ignore[index]
        if number % 3000 == 0:
            assert again(journal) == expected
    assert again(journal) == expected
    assert os.fstat(journal.fd).st_blocks * 512 < 1 << 20

"""What is read ahead of who reads a whole file past us: as much as he has taken, two windows at most, once."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import trio
import trio.testing

from mfs.cache.chunk_state import ObjectState
from mfs.cache.following import _GAP_CHUNKS, _LEAST_CHUNKS, _WINDOW_CHUNKS, _WINDOWS, Course, Follower
from tests.cache.objectfiles import make_object
from tests.workers.rig import until

COUNT = 400


def windows(course: Course, count: int = COUNT) -> list[range]:
    return list(iter(lambda: course.next_window(count), range(0)))


def test_a_look_at_the_beginning_orders_nothing() -> None:
    course = Course()
    assert not windows(course)
    for front in range(_LEAST_CHUNKS):
        assert course.note(front, True)
        assert not windows(course)


def test_who_stands_still_gets_no_more() -> None:
    course = Course()
    course.note(0, True)
    course.note(_LEAST_CHUNKS, True)
    assert windows(course)
    assert not course.note(_LEAST_CHUNKS, True)
    assert not windows(course)


@pytest.mark.parametrize("began", [0, 7])
def test_a_reader_is_led_through_the_file(began: int) -> None:
    """Each chunk is ordered once at most, never behind him nor further ahead than he has come and two windows are."""
    course, ordered = Course(), set[int]()
    course.note(began, True)
    front = began
    while front < COUNT:
        front += 1  # he reads a chunk; what was ordered is there at once
        while front in ordered:
            front += 1
        if front >= COUNT:
            break
        assert course.note(front, True)
        for window in windows(course):
            taken = front - began
            assert len(window) < min(taken, _WINDOW_CHUNKS)
            assert window.start >= front
            assert window.stop <= front + _GAP_CHUNKS + _WINDOWS * min(taken, _WINDOW_CHUNKS)
            assert not ordered & set(window)
            ordered |= set(window)
    assert len(ordered) > 0.9 * (COUNT - began)


def test_nothing_is_ordered_before_the_chunk_left_out_was_passed() -> None:
    course = Course()
    course.note(0, True)
    course.note(_WINDOW_CHUNKS, True)
    first, second = windows(course)
    assert (first, second) == (range(20, 35), range(36, 51))
    course.note(first.stop, True)  # the kernel shows what we filled, and no more
    assert not windows(course)
    course.note(first.stop + 1, True)
    assert windows(course) == [range(52, 67)]


def test_who_reads_at_several_places_is_left_alone_while_he_does() -> None:
    course = Course()
    for front in itertools.chain([0], range(5, 50, 5)):
        course.note(front, False)
        assert not windows(course)
    course.note(50, True)
    course.note(54, True)
    assert windows(course)


def test_the_end_of_the_file_is_the_end() -> None:
    course = Course()
    course.note(0, True)
    course.note(8, True)
    assert windows(course, 14) == [range(12, 13)]
    course.note(13, True)
    assert not windows(course, 14)


async def test_who_closes_and_opens_again_at_once_is_followed_anew() -> None:
    looks = list[str]()

    class Silent:
        async def call(self, operation: str, **arguments: Any) -> None:
            looks.append(operation)
            await trio.sleep_forever()

    follower, state = Follower(cast(Any, Silent())), ObjectState(make_object(), 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        await trio.testing.wait_all_tasks_blocked()
        follower.begin(state)
        await until(lambda: len(looks) == 1, "a look")
        follower.end(state)
        follower.begin(state)  # both in one turn of the device's loop
        await until(lambda: len(looks) == 2, "another look")
        nursery.cancel_scope.cancel()
    assert set(looks) == {"page_cache_front"}


async def test_who_has_closed_it_before_the_first_look_is_not_looked_at() -> None:
    looked_at = list[list[Any]]()

    class Silent:
        async def call(self, operation: str, *, obj: list[Any], **arguments: Any) -> None:
            looked_at.append(obj)
            await trio.sleep_forever()

    follower = Follower(cast(Any, Silent()))
    gone, there = (ObjectState(make_object(path), 0) for path in ("gone.bin", "there.bin"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        await trio.testing.wait_all_tasks_blocked()
        follower.begin(gone)
        follower.end(gone)
        follower.begin(there)
        await until(lambda: bool(looked_at), "a look")
        nursery.cancel_scope.cancel()
    assert looked_at == [there.wire]

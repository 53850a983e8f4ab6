"""What reads say about the next ones: properties that hold for any order of reads, and the cases people know."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mfs.prefetch.pattern import BURST_BYTES, WEIGHTS_BYTES_MAX, AccessPattern
from mfs.types import ByteRange

KIB, MIB = 1 << 10, 1 << 20
reads = st.lists(
    st.tuples(st.integers(0, 600 * MIB), st.sampled_from([4 * KIB, 128 * KIB, MIB, 4 * MIB])), min_size=1, max_size=60
)


def spans(start: int, stop: int, step: int = 128 * KIB) -> list[ByteRange]:
    return [ByteRange(at, min(stop, at + step)) for at in range(start, stop, step)]


def table(*sizes: int, header: int = 100 * KIB) -> list[int]:
    bounds = [header]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return bounds


@given(reads, st.booleans())
def test_never_more_ahead_than_was_consumed_and_never_past_the_tensor(
    asked: list[tuple[int, int]], has_table: bool
) -> None:
    bounds = table(*[37 * MIB] * 20)
    pattern, consumed, ahead_bytes = AccessPattern(bounds[-1]), 0, 0
    if has_table:
        pattern.set_table(bounds)
    for start, length in asked:
        span = ByteRange(start, min(bounds[-1], start + length))
        consumed += len(span)
        ahead = pattern.note(span)
        if ahead is None:
            continue
        ahead_bytes += len(ahead)
        # A tensor that can have been taken whole makes the rest of every touched tensor fair game.
        whole_bytes = 37 * MIB if has_table and consumed >= 33 * MIB else 0
        assert 0 < len(ahead) <= max(consumed, whole_bytes)
        assert ahead.stop <= pattern.tensor_stop(span.stop - 1)
        assert ahead.stop <= bounds[-1]
    if not has_table or consumed < 33 * MIB:
        assert ahead_bytes <= 2 * consumed


def test_a_sequential_read_widens_and_is_never_asked_for_twice() -> None:
    size = 512 * MIB
    pattern, asked, widths = AccessPattern(size), 0, []
    for span in spans(0, size):
        ahead = pattern.note(span)
        if ahead is not None:
            assert ahead.start >= asked
            assert ahead.stop <= 2 * span.stop
            asked = ahead.stop
            widths.append(asked - span.stop)
    assert asked == size
    assert max(widths) > 32 * MIB


def test_several_runs_at_once_are_each_followed() -> None:
    pattern = AccessPattern(1 << 40)
    starts = [number * 10_000 * MIB for number in range(8)]
    asked = set()
    for step in range(80):
        for start in starts:
            at = start + step * 128 * KIB
            if pattern.note(ByteRange(at, at + 128 * KIB)):
                asked.add(start)
    assert asked == set(starts)


def test_kernel_reads_a_little_out_of_order_are_one_run() -> None:
    pattern, dice = AccessPattern(200 * MIB), random.Random(1)
    order = spans(0, 100 * MIB)
    for at in range(0, len(order), 4):
        part = order[at : at + 4]
        dice.shuffle(part)
        order[at : at + 4] = part
    assert sum(len(ahead) for span in order if (ahead := pattern.note(span))) > 90 * MIB


def test_random_reads_fetch_nothing_ahead() -> None:
    pattern, dice = AccessPattern(1 << 40), random.Random(2)
    for _ in range(2000):
        at = dice.randrange(1 << 28) * 4096
        assert pattern.note(ByteRange(at, at + 4096)) is None


def test_headers_alone_are_no_load() -> None:
    pattern = AccessPattern(5000 * MIB)
    pattern.set_table(table(*[50 * MIB] * 99, header=8 * MIB))
    for _ in range(20):
        for span in spans(0, 8 * MIB):
            ahead = pattern.note(span)
            assert ahead is None or ahead.stop <= 8 * MIB
    assert not pattern.taking_weights


def test_one_page_fault_alone_is_no_run() -> None:
    pattern = AccessPattern(5000 * MIB)
    pattern.set_table(table(*[500 * MIB] * 9))
    assert [ahead for span in spans(100 * MIB, 100 * MIB + BURST_BYTES) if (ahead := pattern.note(span))] == []


def test_one_slice_of_one_tensor_asks_for_about_that_slice() -> None:
    pattern = AccessPattern(5000 * MIB)
    pattern.set_table(table(*[500 * MIB] * 9))
    start, length = 700 * MIB, 12 * MIB
    stop = start
    for span in spans(start, start + length):
        ahead = pattern.note(span)
        stop = max(stop, ahead.stop if ahead else 0)
    assert stop - start <= 2 * length
    assert not pattern.taking_weights


def test_one_whole_tensor_is_no_load_two_are() -> None:
    bounds = table(*[20 * MIB] * 30)
    pattern = AccessPattern(bounds[-1])
    pattern.set_table(bounds)
    for span in spans(bounds[5], bounds[6]):
        pattern.note(span)
    assert not pattern.taking_weights
    for span in spans(bounds[17], bounds[18]):
        pattern.note(span)
    assert pattern.taking_weights


def test_two_small_tensors_are_no_load() -> None:
    bounds = table(*[MIB] * 2, *[500 * MIB] * 3)
    pattern = AccessPattern(bounds[-1])
    pattern.set_table(bounds)
    for span in spans(bounds[0], bounds[2]):
        pattern.note(span)
    assert not pattern.taking_weights


def test_many_tensors_read_in_part_are_no_load() -> None:
    bounds = table(*[20 * MIB] * 40)
    pattern = AccessPattern(bounds[-1])
    pattern.set_table(bounds)
    for bound in bounds[:-1]:
        for span in spans(bound, bound + 5 * MIB):
            pattern.note(span)
    assert not pattern.taking_weights


def test_after_one_large_tensor_the_next_one_touched_is_fetched_to_its_end() -> None:
    bounds = table(*[20 * MIB] * 100)
    pattern = AccessPattern(bounds[-1])
    pattern.set_table(bounds)
    assert pattern.note(ByteRange(bounds[7], bounds[7] + MIB)) is None
    for span in spans(bounds[7] + MIB, bounds[8]):
        pattern.note(span)
    assert not pattern.taking_weights
    touched = ByteRange(bounds[50] + 3 * MIB, bounds[50] + 4 * MIB)
    assert pattern.note(touched) == ByteRange(touched.stop, bounds[51])


def test_a_file_without_a_table_is_loaded_by_volume() -> None:
    pattern = AccessPattern(1000 * MIB)
    for span in spans(0, WEIGHTS_BYTES_MAX - MIB):
        pattern.note(span)
    assert not pattern.taking_weights
    for span in spans(WEIGHTS_BYTES_MAX - MIB, WEIGHTS_BYTES_MAX + MIB):
        pattern.note(span)
    assert pattern.taking_weights


@given(st.lists(st.integers(0, 3 * MIB), max_size=30), st.lists(st.integers(0, 60 * MIB), min_size=1, max_size=40))
def test_any_table_and_any_read_are_taken(sizes: list[int], offsets: list[int]) -> None:
    """Empty tensors, an empty table, reads beyond the last tensor: none of them stumbles."""
    bounds = table(*sizes)
    size = bounds[-1] + 7
    pattern = AccessPattern(size)
    pattern.set_table(bounds)
    for offset in offsets:
        start = min(offset, size - 1)
        ahead = pattern.note(ByteRange(start, min(size, start + 128 * KIB)))
        assert ahead is None or ahead.stop <= size

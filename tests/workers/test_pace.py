"""How much is asked at once of an origin whose link is slow: smaller orders first, then fewer, and back again."""

from __future__ import annotations

from mfs.types import CHUNK_BYTES
from mfs.workers.pace import Pace

MIB = 1 << 20
TIMEOUT_S = 32.0
AIM_S = TIMEOUT_S / 4


def trickle(
    pace: Pace, *, since_s: float, now_s: float, came_bytes: int, under_way_bytes: int = 14 * CHUNK_BYTES
) -> None:
    pace.note_trickle(
        since_s=since_s, now_s=now_s, asked_bytes=CHUNK_BYTES, came_bytes=came_bytes, under_way_bytes=under_way_bytes,
        timeout_s=TIMEOUT_S,
    )  # fmt: skip


def narrowed() -> Pace:
    """By orders that take eight times as long as they should."""
    pace = Pace()
    trickle(pace, since_s=1, now_s=1 + 2 * AIM_S, came_bytes=CHUNK_BYTES // 4)
    return pace


def test_a_link_that_is_quick_or_dead_has_no_window() -> None:
    pace = Pace()
    trickle(pace, since_s=1, now_s=1 + AIM_S / 2, came_bytes=MIB)
    trickle(pace, since_s=1, now_s=1 + TIMEOUT_S, came_bytes=0)
    pace.note_done(now_s=500, took_s=TIMEOUT_S, nbytes=CHUNK_BYTES, timeout_s=TIMEOUT_S)
    assert pace.order_blocks is None
    assert pace.orders_max is None
    assert not pace.trickled_s


def test_orders_become_smaller_before_they_become_fewer() -> None:
    """An origin that bounds each connection gives more to many."""
    pace = narrowed()
    assert (pace.order_blocks, pace.orders_max) == (4, 14)
    trickle(pace, since_s=20, now_s=20 + 2 * AIM_S, came_bytes=CHUNK_BYTES, under_way_bytes=7 * MIB)
    assert (pace.order_blocks, pace.orders_max) == (4, 7)


def test_what_was_ordered_before_narrows_it_once() -> None:
    pace = narrowed()
    trickle(pace, since_s=2, now_s=18, came_bytes=1)
    assert (pace.order_blocks, pace.orders_max) == (4, 14)
    assert pace.trickled_s == 18


def test_one_order_always_goes() -> None:
    pace = Pace()
    for round_ in range(1, 20):
        trickle(pace, since_s=100 * round_, now_s=100 * round_ + TIMEOUT_S, came_bytes=1)
    assert (pace.order_blocks, pace.orders_max) == (4, 1)


def test_a_link_that_became_quick_gets_back_all_there_was() -> None:
    pace = narrowed()
    turns = 0
    while (blocks := pace.order_blocks) is not None and (orders := pace.orders_max) is not None:
        for _ in range(orders):
            pace.note_done(now_s=500, took_s=AIM_S, nbytes=blocks << 17, timeout_s=TIMEOUT_S)  # neither slow nor quick
        assert (pace.order_blocks, pace.orders_max) == (blocks, orders)
        for _ in range(orders):
            pace.note_done(now_s=500, took_s=0.1, nbytes=blocks << 17, timeout_s=TIMEOUT_S)
        turns += 1
    assert turns <= 4


def test_an_origin_that_is_dead_has_none_any_more() -> None:
    """Orders that wait for each other would fail one after the other."""
    pace = narrowed()
    pace.note_failed(since_s=10)  # while others brought something
    assert pace.orders_max == 14
    pace.note_failed(since_s=18)
    assert pace.orders_max is None

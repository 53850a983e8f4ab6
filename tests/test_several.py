"""Each of many, several at once: in order, within the bound, and no more after the first error."""

from __future__ import annotations

import pytest
import trio

from mfs.errors import StoreError
from mfs.several import for_each


@pytest.mark.parametrize("count", [0, 1, 7])
async def test_each_is_done_once_in_order_and_few_at_a_time(count: int, autojump_clock: object) -> None:
    begun, under_way, most = list[int](), 0, 0

    async def work(item: int) -> None:
        nonlocal under_way, most
        begun.append(item)
        under_way += 1
        most = max(most, under_way)
        await trio.sleep(1)
        under_way -= 1

    await for_each(iter(range(count)), work, at_once=3)
    assert begun == list(range(count))
    assert most == min(3, count)


async def test_after_an_error_nothing_begins_and_what_is_under_way_ends(autojump_clock: object) -> None:
    begun, ended = list[int](), list[int]()

    async def work(item: int) -> None:
        begun.append(item)
        await trio.sleep(1 + item)
        if item < 2:
            raise StoreError(f"{item} fails")
        ended.append(item)

    with pytest.raises(StoreError, match="0 fails"):
        await for_each(range(9), work, at_once=3)
    assert begun == [0, 1, 2]
    assert ended == [2]

"""The lender's bounds by themselves: its share, its deadline, and what is left of a lease that did not come about."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from mfs.errors import StoreError, TransientStoreError
from mfs.lending import RamLender
from mfs.types import CHUNK_BYTES
from mfs.waits import Waits

SLOTS_COUNT = 32


class _Cache:
    """Chunks that are there at once, but those of `hanging`, which never come, and of `broken`, which fail."""

    def __init__(self) -> None:
        self.waits = Waits()
        self.held = 0
        self.hanging: set[int] = set()
        self.broken: set[int] = set()

    async def lease_in_file(self, state: Any, index: int, mask: int) -> Any:
        if index in self.broken:
            raise StoreError("the origin is dead")
        if index in self.hanging:
            await trio.sleep_forever()
        self.held += 1
        return SimpleNamespace(index=index, place=SimpleNamespace(slot=1000 + index))

    def note_use(self, chunk: Any) -> None:
        return None

    def release(self, chunk: Any) -> None:
        self.held -= 1


@pytest.fixture
def cache() -> _Cache:
    return _Cache()


@pytest.fixture
def lender(cache: _Cache) -> RamLender:
    memory = SimpleNamespace(slots_count=SLOTS_COUNT)
    return RamLender(SimpleNamespace(memory=memory, cache=cache))  # type: ignore[arg-type]


def file_of(model: str) -> Any:
    state = SimpleNamespace(chunks={}, object=SimpleNamespace(path=f"{model}/w"))
    load = SimpleNamespace(waiting=0, last_s=0.0, ram_bytes=0)
    return SimpleNamespace(handle=SimpleNamespace(state=state, group=(0, model), load=load))


FILE = file_of("a")


async def test_a_model_that_hangs_with_what_it_borrowed_leaves_slots_for_others(
    lender: RamLender, cache: _Cache, autojump_clock: trio.testing.MockClock
) -> None:
    """Others are lent at once; they do not stand behind the waiting borrowers of the model that hangs either."""
    cache.hanging = set(range(1000, 1100))
    async with trio.open_nursery() as nursery:
        for i in range(1000, 1050):
            nursery.start_soon(_refused_or_cancelled, lender, i)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        for model in ("b", "c"):
            loan, _ = await lender.lease(file_of(model), 0, 2 * CHUNK_BYTES, here=False)
            loan.release()
        assert trio.current_time() == began
        await trio.sleep(11)
        nursery.cancel_scope.cancel()
    assert cache.held == 0
    whole, _ = await lender.lease(FILE, 0, lender.lease_bytes_max, here=False)
    whole.release()


async def _refused_or_cancelled(lender: RamLender, chunk: int) -> None:
    with suppress(TransientStoreError):
        await lender.lease(FILE, chunk * CHUNK_BYTES, chunk * CHUNK_BYTES + 1, here=False)


async def test_a_quarter_is_lent_and_who_waits_too_long_is_refused(
    lender: RamLender, cache: _Cache, autojump_clock: trio.testing.MockClock
) -> None:
    starts = range(0, SLOTS_COUNT // 4 * CHUNK_BYTES, CHUNK_BYTES)
    loans = [(await lender.lease(FILE, start, start + 1, here=False))[0] for start in starts]
    began = trio.current_time()
    with pytest.raises(TransientStoreError, match="others hold all the slots that are lent, for 10 s already"):
        await lender.lease(FILE, 0, 1, here=False)
    assert trio.current_time() - began == pytest.approx(10)
    loans.pop().release()
    with pytest.raises(TransientStoreError):
        await lender.lease(FILE, 0, 2 * CHUNK_BYTES, here=False)  # needs two, has one: and gives that one back
    (await lender.lease(FILE, 0, 1, here=False))[0].release()
    for loan in loans:
        loan.release()
    assert cache.held == 0


@pytest.mark.parametrize("ending", ["failure", "cancel"])
async def test_a_lease_that_does_not_come_about_holds_nothing(
    lender: RamLender, cache: _Cache, ending: str, autojump_clock: trio.testing.MockClock
) -> None:
    cache.hanging = {1}
    cache.broken = {2} if ending == "failure" else set()
    if ending == "failure":
        with pytest.raises(StoreError, match="the origin is dead"):
            await lender.lease(FILE, 0, 4 * CHUNK_BYTES, here=False)
    else:
        with trio.move_on_after(5):
            await lender.lease(FILE, 0, 4 * CHUNK_BYTES, here=False)
    assert cache.held == 0
    loan, slots = await lender.lease(FILE, 4 * CHUNK_BYTES - 5, 4 * CHUNK_BYTES + 9, here=False)
    assert slots == [1003, 1004]
    loan.release()
    cache.hanging = cache.broken = set()
    for _ in range(3):  # all permits are back
        whole, _ = await lender.lease(FILE, 0, (SLOTS_COUNT // 4 - 1) * CHUNK_BYTES, here=False)
        whole.release()
    assert cache.held == 0

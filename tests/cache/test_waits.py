"""What readers waited for is said by its true name, once for each wait, and not of who fetches ahead."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mfs.cache.chunks import mask_runs, mask_span, run_bytes
from mfs.errors import StoreError
from mfs.types import BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, ByteRange, ObjectId
from mfs.waits import Cause, Waited
from tests.workers.rig import Rig, running_rig, until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path) as running:
        yield running
        await running.cache.saver.wait_saved()


def heard(rig: Rig) -> list[Waited]:
    """Gets all waits from now on."""
    waits: list[Waited] = []
    rig.cache.waits.listeners.append(waits.append)
    return waits


async def read(rig: Rig, obj: ObjectId, start: int, stop: int) -> None:
    state = rig.cache.open(obj, 0)
    try:
        assert b"".join(await rig.cache.read(state, ByteRange(start, stop))) == rig.contents[obj][start:stop]
    finally:
        rig.cache.close(state)


def causes(waits: list[Waited]) -> set[Cause]:
    return {waited.cause for waited in waits if waited.stop}


async def test_a_cold_read_waits_for_the_origin_a_warm_one_for_the_disk_and_a_hit_for_nothing(rig: Rig) -> None:
    obj, waits = rig.put_ramp("llama/model.bin", CHUNK_BYTES + 5), heard(rig)
    state = rig.cache.open(obj, 0)
    await rig.cache.learned_ssd(state)  # else the first read waits for that, too
    span = BLOCK_BYTES, 2 * BLOCK_BYTES + 1
    await read(rig, obj, *span)
    [waited] = waits
    assert waited[2:] == (Cause.ORIGIN, 0, "llama/model.bin", BLOCK_BYTES, 3 * BLOCK_BYTES)
    assert waited.waited_s > 0
    await read(rig, obj, *span)
    assert len(waits) == 1
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    assert rig.cache.evict(obj, 0)
    await read(rig, obj, *span)
    assert causes(waits[1:]) == {Cause.SSD}
    rig.cache.close(state)


async def test_each_who_waits_for_one_fill_is_heard_of_and_who_fetches_ahead_is_not(rig: Rig) -> None:
    obj, waits, gate = rig.put_ramp("a/model.bin", CHUNK_BYTES), heard(rig), rig.gate()
    state = rig.cache.open(obj, 0)
    await rig.cache.learned_ssd(state)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.cache.bring(state, 0, to_ssd=False))
        await until(lambda: bool(rig.cache.fills_count), "the fill")
        for number in range(3):
            nursery.start_soon(read, rig, obj, number, number + 1)
        await until(lambda: rig.cache.leases_count == 4, "its readers")
        gate.unlink()
    assert [waited[2:] for waited in waits] == 3 * [(Cause.ORIGIN, 0, "a/model.bin", 0, BLOCK_BYTES)]
    rig.cache.close(state)


async def test_a_wait_that_fails_is_heard_of_as_well(rig: Rig) -> None:
    obj, waits = rig.put_ramp("a/model.bin", CHUNK_BYTES), heard(rig)
    rig.fail(1, StoreError)
    with pytest.raises(StoreError):
        await read(rig, obj, 0, 1)
    assert Cause.ORIGIN in causes(waits)


async def test_who_waits_for_room_or_for_his_models_share_says_so(tmp_path: Path) -> None:
    async with running_rig(tmp_path, ssd=False, timeout_s=1) as rig:
        waits, gate = heard(rig), rig.gate("slow")
        slots = rig.memory.slots_count
        slow = rig.put_ramp("slow/model.bin", slots * CHUNK_BYTES)
        fast = rig.put_ramp("fast/model.bin", slots * CHUNK_BYTES)
        state = rig.cache.open(fast, 0)
        async with trio.open_nursery() as nursery:

            async def try_to_read(index: int) -> None:
                with pytest.raises(StoreError):
                    await read(rig, slow, index * CHUNK_BYTES, index * CHUNK_BYTES + 1)

            for index in range(slots):
                nursery.start_soon(try_to_read, index)
        assert Cause.SHARE in causes(waits)
        gate.unlink()
        await until(lambda: not rig.cache.fills_count, "rest")
        waits.clear()
        held = [await rig.cache.lease(state, index, 1) for index in range(slots)]
        with pytest.raises(StoreError):
            await read(rig, slow, 0, 1)
        assert causes(waits) >= {Cause.SLOT}
        for chunk in held:
            rig.cache.release(chunk)
        rig.cache.close(state)


@given(st.integers(0, 3), st.integers(1, 2**BLOCKS_PER_CHUNK - 1), st.integers(1, CHUNK_BYTES))
def test_the_span_of_a_mask_goes_from_its_first_block_to_its_last(index: int, mask: int, length: int) -> None:
    size = index * CHUNK_BYTES + length
    mask &= (2 << ((length - 1) // BLOCK_BYTES)) - 1
    runs = [run_bytes(first, end, length) for first, end in mask_runs(mask)]
    span = mask_span(index, mask, size)
    if runs:
        base = index * CHUNK_BYTES
        assert (span.start, span.stop) == (base + runs[0][0], base + runs[-1][1])
    else:
        assert not span

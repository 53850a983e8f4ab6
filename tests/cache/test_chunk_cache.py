"""The conductor of the tiers over real workers: one fetch for all, errors to who waits, nothing held in the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from mfs.cache.chunks import block_mask, full_mask
from mfs.cache.object_files import lock
from mfs.errors import ChangedError, IntegrityError, NotFoundError, StoreError, TransientStoreError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from mfs.workers.job import Job, Priority
from tests.workers.rig import Rig, process_state, running_rig, until

FULL = full_mask(CHUNK_BYTES)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path) as running:
        yield running
        await running.cache.saver.wait_saved()
        await until(lambda: not any(running.pool.inflight(lane) for lane in ("origin", "ssd", "disk")), "rest")
        running.assert_idle()


async def read(rig: Rig, obj: ObjectId, start: int = 0, stop: int | None = None) -> None:
    """Read as FUSE does, and compare before the next checkpoint."""
    state = rig.cache.open(obj, 0)
    span = ByteRange(start, obj.size if stop is None else stop)
    try:
        pieces = await rig.cache.read(state, span, rig.cache.begin(state, span))
        assert b"".join(pieces) == rig.contents[obj][span.start : span.stop]
    finally:
        rig.cache.close(state)


async def test_ram_disk_and_origin_give_the_same_bytes(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 2 * CHUNK_BYTES + 12345)
    spans = [(0, 1), (CHUNK_BYTES - 5, CHUNK_BYTES + 5), (2 * CHUNK_BYTES, obj.size), (obj.size - 1, obj.size),
             (0, obj.size), (BLOCK_BYTES - 1, BLOCK_BYTES + 1), (5, 5)]  # fmt: skip
    for span in spans:
        await read(rig, obj, *span)
    assert rig.cache.counters.origin_bytes == obj.size
    await read(rig, obj)
    assert rig.cache.counters.origin_bytes == obj.size
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    assert rig.cache.evict(obj, 0) == obj.size
    assert rig.memory.slots_free == rig.memory.slots_count
    (rig.origin / "model.bin").unlink()
    for span in spans:
        await read(rig, obj, *span)
    assert rig.cache.counters.ssd_hit_bytes == rig.cache.counters.origin_bytes == obj.size


async def test_one_fetch_however_many_wait(rig: Rig) -> None:
    obj, gate = rig.put_ramp("model.bin", CHUNK_BYTES), rig.gate()
    async with trio.open_nursery() as nursery:
        for n in range(30):
            nursery.start_soon(read, rig, obj, n * BLOCK_BYTES, (n + 2) * BLOCK_BYTES)
        await until(lambda: bool(rig.origin_reads()), "a fetch")
        gate.unlink()
    fetched = [
        block for _, start, stop in rig.origin_reads() for block in range(start // BLOCK_BYTES, stop // BLOCK_BYTES)
    ]
    assert sorted(fetched) == list(range(31))


async def test_a_cancelled_reader_fails_nobody_else(rig: Rig) -> None:
    obj, gate = rig.put_ramp("model.bin", CHUNK_BYTES), rig.gate()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read, rig, obj)
        with trio.move_on_after(0.05):
            await read(rig, obj)
        gate.unlink()
    assert len(rig.origin_reads()) == 1


async def test_a_chunk_whose_readers_all_left_is_kept_if_it_came_and_let_go_if_not(rig: Rig) -> None:
    obj, gate = rig.put_ramp("model.bin", 2 * CHUNK_BYTES), rig.gate()

    async def leave_a_fill(start: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, rig, obj, start)
            await until(lambda: rig.cache.fills_count == 1, "the fill")
            nursery.cancel_scope.cancel()

    await leave_a_fill(0)
    assert rig.cache.slots_used == 1
    gate.unlink()
    await until(lambda: rig.cache.fills_count == 0, "the fill")
    assert rig.cache.resident_bytes(obj, 0) == CHUNK_BYTES
    gate = rig.gate()
    rig.fail(1, NotFoundError)
    await leave_a_fill(CHUNK_BYTES)
    gate.unlink()
    await until(lambda: rig.cache.fills_count == 0, "the fill")
    assert rig.cache.slots_used == 1


async def test_an_error_goes_to_all_who_wait_and_the_next_starts_anew(rig: Rig) -> None:
    obj, gate = rig.put_ramp("model.bin", CHUNK_BYTES), rig.gate()
    rig.fail(1, IntegrityError)
    failed: list[int] = []

    async def expect_failure() -> None:
        with pytest.raises(IntegrityError):
            await read(rig, obj, 0, BLOCK_BYTES)
        failed.append(1)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(expect_failure)
        await until(lambda: bool(rig.origin_reads()), "a fetch")
        gate.unlink()
    assert len(failed) == 5
    assert len(rig.origin_reads()) == 1
    await read(rig, obj)


async def test_what_may_pass_is_tried_once_more(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    rig.fail(1, TransientStoreError)
    await read(rig, obj, 0, BLOCK_BYTES)
    rig.fail(2, TransientStoreError)
    with pytest.raises(TransientStoreError):
        await read(rig, obj, BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert len(rig.origin_reads()) == 4


async def test_a_dead_origin_is_an_error_in_time_and_keeps_no_connection_after(tmp_path: Path) -> None:
    async with running_rig(tmp_path, timeout_s=0.5) as rig:
        obj, warm = rig.put_ramp("model.bin", CHUNK_BYTES), rig.put_ramp("warm.bin", CHUNK_BYTES)
        await read(rig, warm)
        gate = rig.gate()
        with pytest.raises(StoreError):
            await read(rig, obj)
        await read(rig, warm)
        await until(lambda: rig.pool.inflight("origin") == 0, "the connection given back")
        assert len(rig.origin_reads()) == 2  # not asked for a second deadline's time
        gate.unlink()
        await read(rig, obj)
        await rig.cache.saver.wait_saved()
        rig.assert_idle()


async def test_a_killed_worker_costs_a_reader_nothing(rig: Rig) -> None:
    obj, gate = rig.put_ramp("model.bin", 4 * CHUNK_BYTES), rig.gate()
    async with trio.open_nursery() as nursery:
        for index in range(4):
            nursery.start_soon(read, rig, obj, index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES)
        await until(lambda: len(rig.origin_reads()) == 4, "fetches")
        for worker in rig.pool.describe():
            os.kill(worker["pid"], signal.SIGKILL)
        gate.unlink()
    assert len(rig.origin_reads()) == 8


async def test_a_worker_killed_while_it_saves_leaves_the_chunk_to_be_saved_later(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    await read(rig, obj, 0, BLOCK_BYTES)
    for worker in rig.pool.describe():
        os.kill(worker["pid"], signal.SIGSTOP)
    rig.cache.saver.save_quiet(older_than_s=0)
    assert rig.pool.inflight("disk") == 1
    for worker in rig.pool.describe():
        os.kill(worker["pid"], signal.SIGKILL)
    await rig.cache.saver.wait_saved()
    assert rig.cache.counters.saved_bytes == 0
    await until(lambda: rig.pool.restarts_count == 2 and len(rig.pool.describe()) == 2, "new workers")
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    assert rig.cache.counters.saved_bytes == BLOCK_BYTES
    assert rig.ssd_mask(obj, 0)


async def test_more_readers_than_slots_all_get_their_bytes(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 40 * CHUNK_BYTES)
    async with trio.open_nursery() as nursery:
        for index in range(40):
            nursery.start_soon(read, rig, obj, index * CHUNK_BYTES + 3, min(obj.size, (index + 2) * CHUNK_BYTES - 3))


async def test_who_waits_for_a_slot_sees_a_chunk_that_another_brought(rig: Rig) -> None:
    """All slots held but one that comes free: two wait for the same chunk, one slot must do for both."""
    obj, held = rig.put_ramp("model.bin", 17 * CHUNK_BYTES), rig.put_ramp("held.bin", 16 * CHUNK_BYTES)
    state = rig.cache.open(held, 0)
    leased = [await rig.cache.lease(state, index, 1) for index in range(16)]
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read, rig, obj, 0, 100)
        await trio.testing.wait_all_tasks_blocked()
        rig.cache.release(leased.pop())
    for chunk in leased:
        rig.cache.release(chunk)
    rig.cache.close(state)


async def test_without_a_slot_in_time_a_read_fails_and_holds_nothing(tmp_path: Path) -> None:
    async with running_rig(tmp_path, timeout_s=0.2) as rig:
        obj, held = rig.put_ramp("model.bin", 100), rig.put_ramp("held.bin", 16 * CHUNK_BYTES)
        state = rig.cache.open(held, 0)
        leased = [await rig.cache.lease(state, index, 1) for index in range(16)]
        with pytest.raises(StoreError, match=r"no answer within 0\.2 s"):
            await read(rig, obj)
        for chunk in leased:
            rig.cache.release(chunk)
        rig.cache.close(state)
        await read(rig, obj)
        await rig.cache.saver.wait_saved()
        rig.assert_idle()


# -- versions


async def test_an_old_handle_gets_old_bytes_or_an_error(rig: Rig) -> None:
    told: list[ObjectId] = []
    rig.cache.filler.on_changed = lambda state: told.append(state.object)
    old = rig.put_ramp("model.bin", 2 * CHUNK_BYTES)
    await read(rig, old, 0, 1000)
    new = rig.put_ramp("model.bin", 2 * CHUNK_BYTES, start=77)
    await read(rig, old, 500, 700)
    with pytest.raises(ChangedError):
        await read(rig, old, CHUNK_BYTES, CHUNK_BYTES + 1)
    await read(rig, new)
    assert told == [old]


async def test_equal_bytes_under_another_name_are_fetched_by_the_name_seen_last(rig: Rig) -> None:
    first = rig.put_ramp("a.bin", CHUNK_BYTES)
    second = rig.put_ramp("b.bin", CHUNK_BYTES)
    digest = "sha256:" + "1" * 64
    a, b = (ObjectId(o.source, o.path, o.size, o.version, digest) for o in (first, second))
    rig.contents |= {a: rig.contents[first], b: rig.contents[second]}
    state = rig.cache.open(a, 0)
    (rig.origin / "a.bin").unlink()
    await read(rig, b)
    rig.cache.close(state)


async def test_a_read_that_outlives_its_handle_forgets_nobody_elses_state(rig: Rig) -> None:
    obj, gate = rig.put_ramp("model.bin", CHUNK_BYTES), rig.gate()
    lost = rig.cache.open(obj, 0)
    rig.cache.close(lost)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.cache.read, lost, ByteRange(0, 10))
        await trio.testing.wait_all_tasks_blocked()
        state = rig.cache.open(obj, 0)
        assert state is not lost
        gate.unlink()
    [chunk] = lost.chunks.values()
    await rig.cache.saver.wait_saved()
    rig.cache._drop(chunk)
    assert rig.cache.open(obj, 0) is state
    rig.cache.close(state)
    rig.cache.close(state)


# -- the disk


async def test_bringing_to_disk_returns_when_all_of_the_chunk_is_there(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    await read(rig, obj, 0, BLOCK_BYTES)
    for worker in rig.pool.describe():
        os.kill(worker["pid"], signal.SIGSTOP)
    rig.cache.saver.save_quiet(older_than_s=0)  # of one block: under way while the rest comes
    state = rig.cache.open(obj, 0)
    async with trio.open_nursery() as nursery:

        async def bring() -> None:
            await rig.cache.bring(state, 0, to_ssd=True)

        nursery.start_soon(bring)
        await trio.testing.wait_all_tasks_blocked()
        for worker in rig.pool.describe():
            os.kill(worker["pid"], signal.SIGCONT)
    assert (await rig.pool.call("masks", obj=state.wire))["masks"] == [FULL]
    rig.cache.close(state)


async def test_a_disk_that_fails_is_left_alone_for_a_while(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    obj = rig.put_ramp("model.bin", 40 * CHUNK_BYTES)
    shutil.rmtree(rig.cache_dir / "v2" / "objects")
    (rig.cache_dir / "v2" / "objects").touch()
    state = rig.cache.open(obj, 0)
    for index in range(40):
        assert not await rig.cache.bring(state, index, to_ssd=index % 2 == 0)
    await rig.cache.saver.wait_saved()
    rig.cache.close(state)
    assert 1 <= caplog.text.count("serving on without writing") <= 16
    await read(rig, obj, 0, 100)


async def test_dropped_from_disk_is_saved_again(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    await read(rig, obj)
    await rig.cache.saver.wait_saved()
    assert rig.ssd_mask(obj, 0)
    await rig.pool.call("evict", objects=[rig.cache.open(obj, 0).wire])
    rig.cache.note_unsaved(obj, 0)
    assert not rig.ssd_mask(obj, 0)
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    assert rig.ssd_mask(obj, 0)
    rig.cache.close(rig.cache.open(obj, 0))


async def test_what_the_budget_drops_from_disk_is_written_again_only_if_asked_for(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 4 * CHUNK_BYTES)
    state = rig.cache.open(obj, 0)
    for index in range(4):
        assert await rig.cache.bring(state, index, to_ssd=True)
    found = await rig.pool.call("enforce_budget", budget_bytes=4 * CHUNK_BYTES, target_bytes=2 * CHUNK_BYTES)
    [(cache_id, dropped)] = found["dropped"].items()
    assert cache_id == obj.cache_id
    rig.cache.note_evicted(found["dropped"])
    rig.cache.saver.save_quiet(older_than_s=0)
    assert rig.pool.inflight("disk") == 0
    assert [index for index in range(4) if not state.on_ssd(index)] == sorted(dropped)
    for index in range(4):
        assert await rig.cache.bring(state, index, to_ssd=True)
        assert rig.ssd_mask(obj, index)
    rig.cache.close(state)


async def test_who_keeps_the_budget_is_woken_by_what_is_written(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 4 * CHUNK_BYTES)
    state = rig.cache.open(obj, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.cache.saver.wait_saved_more, 2 * CHUNK_BYTES + 1)
        await trio.testing.wait_all_tasks_blocked()
        for index in range(2):
            await rig.cache.bring(state, index, to_ssd=True)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        await rig.cache.bring(state, 2, to_ssd=True)
    rig.cache.close(state)


async def test_unread_chunks_are_counted_until_read_or_dropped(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 3 * CHUNK_BYTES)
    state = rig.cache.open(obj, 0)
    for index in range(3):
        await rig.cache.bring(state, index, to_ssd=False, ahead=True)
    assert rig.cache.unread_count == 3
    await read(rig, obj, 0, 1)
    assert rig.cache.unread_count == 2
    await rig.cache.saver.wait_saved()
    rig.cache.evict(obj, 0)
    assert rig.cache.unread_count == 0
    rig.cache.close(state)


async def test_a_lease_ahead_of_need_is_hurried_by_a_reader(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=1, origin_limit=2, background_limit=1) as rig:
        obj, gate = rig.put_ramp("model.bin", 4 * CHUNK_BYTES), rig.gate()
        state = rig.cache.open(obj, 0)
        await state.ssd_known.wait()
        async with trio.open_nursery() as nursery:

            async def bring(index: int) -> None:
                chunk = await rig.cache.lease(state, index, block_mask(0, 1), priority=Priority.BACKGROUND)
                rig.cache.release(chunk)

            for index in range(4):
                nursery.start_soon(bring, index)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, rig, obj, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 1)
            await until(lambda: len(rig.origin_reads()) == 2, "two fetches")
            assert {start for _, start, _ in rig.origin_reads()} == {0, 3 * CHUNK_BYTES}
            gate.unlink()
        rig.cache.close(state)
        rig.assert_idle()


async def test_what_the_disk_has_waits_for_no_origin(rig: Rig) -> None:
    """All connections and slots that a model may have wait for its origin: its chunks on SSD are read all the same."""
    warm, cold = rig.put_ramp("m/warm.bin", 2 * CHUNK_BYTES), rig.put_ramp("m/cold.bin", 64 * CHUNK_BYTES, start=5)
    await read(rig, warm)
    await rig.cache.saver.wait_saved()
    rig.cache.evict(warm, 0)
    gate = rig.gate()
    async with trio.open_nursery() as nursery:
        for index in range(64):
            nursery.start_soon(read, rig, cold, index * CHUNK_BYTES, index * CHUNK_BYTES + 10)
        await until(lambda: len(rig.origin_reads()) >= 2 + 6, "the model's share")
        await read(rig, warm)
        assert rig.cache.counters.ssd_hit_bytes == warm.size
        gate.unlink()


async def test_a_chunk_that_is_gone_or_bad_is_fetched_though_it_was_believed_to_be_there(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 3 * CHUNK_BYTES)
    await read(rig, obj)
    await rig.cache.saver.wait_saved()
    rig.cache.evict(obj, 0)
    state = rig.cache.open(obj, 0)
    await state.ssd_known.wait()
    assert list(state.ssd_masks) == [FULL] * 3
    rig.ssd.drop_chunk(obj.cache_id, 0)
    with open(rig.object_file(obj), "r+b") as file:
        file.seek(CHUNK_BYTES + 3 * BLOCK_BYTES)
        file.write(b"\xff\xfe")
    await read(rig, obj)
    assert rig.cache.counters.ssd_hit_bytes == 2 * CHUNK_BYTES - BLOCK_BYTES  # what verifies in a bad file is good
    await rig.cache.saver.wait_saved()
    assert list(state.ssd_masks) == [FULL] * 3
    assert rig.ssd_mask(obj, 0)
    assert rig.ssd_mask(obj, 1)
    rig.cache.close(state)


async def test_a_reader_of_what_the_disk_has_is_woken_by_a_slot_though_his_models_share_is_used_up(
    tmp_path: Path,
) -> None:
    async with running_rig(tmp_path, slots_count=16) as rig:
        warm, cold = rig.put_ramp("m/warm.bin", CHUNK_BYTES), rig.put_ramp("m/cold.bin", 16 * CHUNK_BYTES, start=5)
        other = rig.cache.open(rig.put_ramp("h/w.bin", 10 * CHUNK_BYTES, start=9), 0)
        await read(rig, warm)
        await rig.cache.saver.wait_saved()
        rig.cache.evict(warm, 0)
        gate = rig.gate("m")
        async with trio.open_nursery() as nursery:
            for index in range(16):
                nursery.start_soon(read, rig, cold, index * CHUNK_BYTES, index * CHUNK_BYTES + 10)
            await until(lambda: len(rig.origin_reads()) == 1 + 6, "the model's share")
            leased = [await rig.cache.lease(other, index, FULL) for index in range(10)]
            async with trio.open_nursery() as reader:
                reader.start_soon(read, rig, warm)
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert rig.cache.counters.ssd_hit_bytes == 0
                for chunk in leased:
                    rig.cache.release(chunk)
                with trio.move_on_after(5) as scope:
                    await until(lambda: rig.cache.counters.ssd_hit_bytes == warm.size, "the slot", timeout_s=10)
                gate.unlink()
            assert not scope.cancelled_caught
        rig.cache.close(other)


async def test_a_block_on_disk_is_read_while_the_rest_of_its_chunk_waits_for_the_origin(rig: Rig) -> None:
    obj = rig.put_ramp("m/model.safetensors", CHUNK_BYTES)
    await read(rig, obj, 0, 10)
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    rig.cache.evict(obj, 0)
    gate = rig.gate()
    state = rig.cache.open(obj, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(rig.cache.bring, state, 0, to_ssd=False))
        await until(lambda: len(rig.origin_reads()) == 2, "the origin is asked for the rest")
        with trio.move_on_after(5) as scope:
            await read(rig, obj, 0, 10)
        gate.unlink()
    assert not scope.cancelled_caught
    assert rig.cache.counters.origin_bytes == CHUNK_BYTES
    await read(rig, obj)
    rig.cache.close(state)


async def test_a_disk_that_lost_what_it_was_believed_to_have_gives_no_model_more_than_its_share(tmp_path: Path) -> None:
    """Another mount's eviction empties the shared directory, and the origin hangs."""
    async with running_rig(tmp_path, slots_count=16) as rig:
        warm, other = rig.put_ramp("m/w.bin", 16 * CHUNK_BYTES), rig.put_ramp("h/w.bin", CHUNK_BYTES, start=5)
        await read(rig, warm)
        await rig.cache.saver.wait_saved()
        rig.cache.evict(warm, 0)
        state = rig.cache.open(warm, 0)
        await state.ssd_known.wait()
        for index in range(16):
            rig.ssd.drop_chunk(warm.cache_id, index)
        gate = rig.gate("m")
        async with trio.open_nursery() as nursery:
            for index in range(16):
                nursery.start_soon(read, rig, warm, index * CHUNK_BYTES, index * CHUNK_BYTES + 10)
            await until(lambda: len(rig.origin_reads()) >= 16 + 6, "the model's share")
            with trio.move_on_after(5) as scope:
                await read(rig, other)
            gate.unlink()
        assert not scope.cancelled_caught
        rig.cache.close(state)


async def test_a_hung_worker_costs_a_file_just_opened_a_pause_and_not_its_bytes(tmp_path: Path) -> None:
    async with running_rig(tmp_path, timeout_s=8) as rig:
        obj = rig.put_ramp("model.bin", CHUNK_BYTES)
        hung = rig.pool.describe()[0]["pid"]  # which is asked, as all are idle; stopped first, so it cannot answer
        os.kill(hung, signal.SIGSTOP)
        try:
            await until(lambda: process_state(hung) == "T", "the worker stops")
            state = rig.cache.open(obj, 0)
            assert [worker["pid"] for worker in rig.pool.describe() if worker["inflight"]] == [hung]
            await read(rig, obj)
        finally:
            os.kill(hung, signal.SIGCONT)
        await rig.cache.saver.wait_saved()
        rig.cache.close(state)


async def test_what_was_given_whole_is_no_victim_and_goes_at_once(tmp_path: Path) -> None:
    """A reader who has the file itself, as the kernel will, sees nothing of it vanish; then all slots are free."""
    async with running_rig(tmp_path) as rig:
        given, other = rig.put_ramp("m/given.bin", 6 * CHUNK_BYTES - 5), rig.put_ramp("m/other.bin", 30 * CHUNK_BYTES)
        state = rig.cache.open(given, 0)
        for index in range(6):
            await rig.cache.bring(state, index, to_ssd=False, keep=True)  # as who asks for it in RAM does
        assert state.ram is not None
        assert rig.cache.drop_whole(state) == 0, "it was not given"
        state.ram.given = True
        held = os.dup(state.ram.fd)
        await read(rig, other)
        assert rig.cache.resident_bytes(given, 0) == given.size
        chunk = await rig.cache.lease(state, 0, 1)
        assert rig.cache.drop_whole(state) == 0, "a chunk is in use"
        rig.cache.release(chunk)
        await rig.cache.saver.wait_saved()
        os.close(rig.cache.slots.hold(state))
        assert rig.cache.drop_whole(state) == 0, "it is lent"
        rig.cache.slots.unhold(state)
        assert rig.cache.evict(given, 0) == given.size
        assert state.ram is None
        assert os.pread(held, given.size + 1, 0) == rig.contents[given]
        os.close(held)
        await read(rig, given)
        rig.cache.close(state)
        await rig.cache.saver.wait_saved()
        rig.assert_idle()


async def test_what_the_kernel_and_the_disk_have_goes_before_memory_that_was_not_in_use(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        obj = rig.put_ramp("m/model.bin", 8 * CHUNK_BYTES)
        state = rig.cache.open(obj, 0)
        for index in range(8):
            await rig.cache.read(state, obj.chunk_range(index))
            await rig.cache.saver.wait_saved()
            assert rig.memory.slots_used == 1, "each took the memory of the one before"
        rig.cache.close(state)
        rig.assert_idle()


async def test_what_stands_in_common_memory_moves_into_the_objects_file_when_others_want_that(rig: Rig) -> None:
    """While it is read, and however many want it at once."""
    obj = rig.put_ramp("model.bin", 3 * CHUNK_BYTES + 5000)
    state = rig.cache.open(obj, 0)
    whole = ByteRange(0, obj.size)

    async def borrow(index: int) -> None:
        chunk = await rig.cache.lease_in_file(state, index, 1)
        assert chunk.is_own
        rig.cache.release(chunk)

    await rig.cache.read(state, whole)
    assert state.ram is None
    async with trio.open_nursery() as nursery:
        for index in (0, 0, 1, 3):
            nursery.start_soon(borrow, index)
        for _ in range(50):
            assert b"".join(await rig.cache.read(state, whole)) == rig.contents[obj]
    for index in range(4):
        await rig.cache.bring(state, index, to_ssd=False, keep=True)
    assert state.complete_in_ram
    assert state.ram is not None
    assert os.pread(state.ram.fd, obj.size + 1, 0) == rig.contents[obj]
    assert rig.memory.slots_used == 4
    rig.cache.close(state)


async def test_where_a_chunk_stood_stays_until_no_worker_reads_there(rig: Rig) -> None:
    """A borrower does not wait for a disk that hangs."""
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    state = rig.cache.open(obj, 0)
    chunk = await rig.cache.lease(state, 0, FULL)
    chunk.looks += 1
    rig.cache.release(await rig.cache.lease_in_file(state, 0, FULL))
    assert chunk.is_own
    assert chunk.left
    await rig.cache.saver.wait_saved()
    assert rig.memory.slots_used == 2
    chunk.looks -= 1
    rig.cache.slots.give_left(chunk)
    assert rig.memory.slots_used == 1
    assert chunk.view(0, CHUNK_BYTES) == rig.contents[obj]
    rig.cache.release(chunk)
    rig.cache.close(state)


async def test_without_a_disk_everything_stands_in_the_objects_file(tmp_path: Path) -> None:
    """Whatever is whole there may be given to the kernel."""
    async with running_rig(tmp_path, ssd=False) as rig:
        obj = rig.put_ramp("model.bin", 2 * CHUNK_BYTES)
        state = rig.cache.open(obj, 0)
        await rig.cache.read(state, ByteRange(0, obj.size))
        assert state.complete_in_ram
        rig.cache.close(state)
        rig.assert_idle()


async def test_a_file_that_is_lent_stays_the_same_though_all_of_it_is_dropped(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        obj = rig.put_ramp("model.bin", 2 * CHUNK_BYTES)
        state = rig.cache.open(obj, 0)
        fd = rig.cache.slots.hold(state)
        for _ in range(2):
            await read(rig, obj)
            assert os.pread(fd, obj.size, 0) == rig.contents[obj]
            await rig.cache.saver.wait_saved()
            assert rig.cache.evict(obj, 0) == obj.size
            assert os.fstat(fd).st_blocks == 0
        rig.cache.slots.unhold(state)
        assert state.ram is None
        os.close(fd)
        rig.cache.close(state)
        rig.assert_idle()


async def test_who_fetched_all_of_a_chunk_saves_it_without_another_order(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    obj = rig.put_ramp("model.bin", 8 * CHUNK_BYTES + 12345)
    ordered, submit = list[str](), rig.pool.submit

    def noting(job: Job) -> None:
        ordered.append(job.operation)
        submit(job)

    monkeypatch.setattr(rig.pool, "submit", noting)
    await read(rig, obj, 0, CHUNK_BYTES)
    await rig.cache.saver.wait_saved()
    assert rig.ssd_mask(obj, 0) == FULL
    assert "persist" not in ordered
    # At once as many as there are: some have to be ordered, and are.
    async with trio.open_nursery() as nursery:
        for index in range(1, 9):
            nursery.start_soon(read, rig, obj, index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, obj.size))
    await rig.cache.saver.wait_saved()
    assert [rig.ssd_mask(obj, i) for i in range(9)] == [full_mask(len(obj.chunk_range(i))) for i in range(9)]
    assert rig.cache.counters.origin_requests == 9


async def test_a_chunk_is_saved_later_if_its_worker_dies_while_it_saves_it(rig: Rig, tmp_path: Path) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    names = tmp_path / "cache" / "v2" / "names.lock"
    fd = os.open(names, os.O_RDWR | os.O_CREAT, 0o600)
    lock(fd, fcntl.F_WRLCK, int(obj.cache_id[:2], 16))  # whoever makes its files waits
    try:
        await read(rig, obj)  # its bytes wait for no disk
        (chunk,) = rig.cache.slots.chunks
        assert chunk.saving is not None
        (saving,) = [worker for worker in rig.pool.describe() if worker["inflight"]]
        os.kill(saving["pid"], signal.SIGKILL)
        await until(lambda: chunk.saving is None, "the end of the worker")
        assert not chunk.saved
    finally:
        os.close(fd)
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    assert rig.ssd_mask(obj, 0) == FULL


async def test_saves_that_follow_leave_the_disk_to_others_however_many_workers_there_are(tmp_path: Path) -> None:
    async with running_rig(tmp_path, workers_count=4) as rig, trio.open_nursery() as nursery:
        obj = rig.put_ramp("model.bin", 14 * CHUNK_BYTES)
        fd = os.open(rig.cache_dir / "v2" / "names.lock", os.O_RDWR | os.O_CREAT, 0o600)
        lock(fd, fcntl.F_WRLCK, int(obj.cache_id[:2], 16))  # whoever makes its files waits
        try:
            for index in range(14):
                nursery.start_soon(read, rig, obj, index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES)
            saving = partial(rig.pool.inflight, "disk")
            waiting = partial(rig.pool.queued, "disk")
            # One of each worker, and six that were ordered before those began.
            await until(lambda: saving() <= 4 + 6 and saving() + waiting() == 14, "as many saves as there may be")
        finally:
            os.close(fd)
        await rig.cache.saver.wait_saved()
        assert all(rig.ssd_mask(obj, index) == FULL for index in range(14))


async def test_a_range_over_two_chunks_goes_out_uncopied(rig: Rig) -> None:
    obj = rig.put_ramp("model.bin", 2 * CHUNK_BYTES)
    state, span = rig.cache.open(obj, 0), ByteRange(CHUNK_BYTES - 5, CHUNK_BYTES + 5)
    for pieces in (await rig.cache.read(state, span), rig.cache.read_nowait(state, span)):
        assert pieces is not None
        assert [bytes(piece) for piece in pieces] == [rig.contents[obj][span.start : CHUNK_BYTES],
                                                      rig.contents[obj][CHUNK_BYTES : span.stop]]  # fmt: skip
        assert all(isinstance(piece, memoryview) for piece in pieces)
    rig.cache.close(state)

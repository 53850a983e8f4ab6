"""The prefetcher over real workers: bounded, in order, patient with a dead origin, and giving everything back."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio

from mfs.cache.chunk_state import ObjectState
from mfs.cache.chunks import full_mask
from mfs.cache.ram import SLOTS_COUNT_MIN
from mfs.errors import AccessError, NotFoundError
from mfs.prefetch import engine
from mfs.prefetch.engine import PrefetchConfig, Prefetcher
from mfs.testing import ramp
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from tests.workers.rig import Rig, running_rig, until

MIB = 1 << 20
UNREAD_MAX = SLOTS_COUNT_MIN // 2  # what one model may have of the rig's slots


class Model:
    """Shards with tensor tables in a rig, and readers that take them as the kernel does."""

    def __init__(self, rig: Rig, *, ssd: bool = True) -> None:
        self.rig = rig
        self.shards: list[ObjectId] = []
        self.prefetcher = Prefetcher(PrefetchConfig(4, ssd), rig.cache, rig.pool, self.siblings)
        self.unread_seen = 0

    def siblings(self, state: ObjectState) -> Sequence[tuple[ObjectId, int]]:
        at = self.shards.index(state.object)
        return [(obj, 0) for obj in [*self.shards[at + 1 :], *self.shards[:at]]]

    def add(self, name: str, tensors_count: int, tensor_bytes: int) -> ObjectId:
        table = {
            f"t{n}": {
                "dtype": "U8",
                "shape": [tensor_bytes],
                "data_offsets": [n * tensor_bytes, (n + 1) * tensor_bytes],
            }
            for n in range(tensors_count)
        }
        text = json.dumps(table).encode()
        data = struct.pack("<Q", len(text)) + text + ramp(tensors_count * tensor_bytes)
        obj = self.rig.put(name, data)
        self.shards.append(obj)
        return obj

    @contextlib.asynccontextmanager
    async def open(self, obj: ObjectId) -> AsyncIterator[ObjectState]:
        state = self.rig.cache.open(obj, 0)
        self.prefetcher.opened(state)
        try:
            await self.prefetcher.header(state)
            yield state
        finally:
            self.prefetcher.closed(state)
            self.rig.cache.close(state)

    async def read(self, state: ObjectState, start: int, stop: int) -> None:
        for at in range(start, stop, BLOCK_BYTES):
            span = ByteRange(at, min(at + BLOCK_BYTES, stop))
            whole = self.prefetcher.note(state, span)
            begun = self.rig.cache.begin(state, span, whole_chunks=whole)
            pieces = await self.rig.cache.read(state, span, begun)
            assert b"".join(pieces) == self.rig.contents[state.object][span.start : span.stop]
            self.unread_seen = max(self.unread_seen, self.rig.cache.unread_count)

    def fetched(self, obj: ObjectId) -> int:
        """Bytes of an object the origin was asked for."""
        return sum(stop - start for path, start, stop in self.rig.origin_reads() if path == obj.path)


@contextlib.asynccontextmanager
async def running_model(tmp_path: Path, *, ssd: bool = True) -> AsyncIterator[Model]:
    async with running_rig(tmp_path, ssd=ssd) as rig:
        model = Model(rig, ssd=ssd)
        async with trio.open_nursery() as nursery:
            await nursery.start(model.prefetcher.run)
            yield model
            nursery.cancel_scope.cancel()
        assert model.prefetcher.active_count == 0
        await until(lambda: not any(rig.pool.inflight(lane) for lane in ("origin", "ssd", "disk")), "rest")
        await rig.cache.saver.wait_saved()
        rig.assert_idle()
        assert not model.prefetcher._tracks
        for obj in model.shards:
            rig.cache.evict(obj, 0)
        assert not rig.cache._states
        assert rig.cache.unread_count == 0


async def test_a_header_comes_with_the_open_and_nothing_else(tmp_path: Path) -> None:
    async with running_model(tmp_path) as model:
        shards = [model.add(f"model-{n}.safetensors", 8, 8 * MIB) for n in range(3)]
        for obj in shards:
            async with model.open(obj) as state:
                header = await model.prefetcher.header(state)
                assert header == model.rig.contents[obj][:BLOCK_BYTES]
        assert [model.fetched(obj) for obj in shards] == [BLOCK_BYTES] * 3


async def test_two_whole_tensors_bring_the_file_and_then_its_neighbours(tmp_path: Path) -> None:
    async with running_model(tmp_path) as model:
        shards = [model.add(f"model-{n}.safetensors", 4, 9 * MIB) for n in range(3)]
        async with model.open(shards[0]) as state:
            head = shards[0].size - 4 * 9 * MIB
            await model.read(state, head, head + 18 * MIB)
            assert model.prefetcher.active_count >= 1
            # Nobody reads on: RAM takes what its bound allows, all the rest goes on to the disk, shard by shard.
            for obj in shards:
                wire = model.rig.cache.open(obj, 0).wire
                for _ in range(3000):
                    masks = (await model.rig.pool.call("masks", obj=wire))["masks"]
                    there = [
                        mask == full_mask(len(obj.chunk_range(i)))
                        or ((c := model.rig.cache._states[obj.cache_id, 0].chunks.get(i)) is not None and c.complete)
                        for i, mask in enumerate(masks)
                    ]
                    if all(there):
                        break
                    await trio.sleep(0.01)
                assert all(there), (obj.path, masks)
                model.rig.cache.close(model.rig.cache._states[obj.cache_id, 0])
        order = list(dict.fromkeys(path for path, _, _ in model.rig.origin_reads()))
        assert order == [obj.path for obj in shards]
        assert model.rig.cache.unread_count <= UNREAD_MAX


async def test_slots_nobody_has_read_yet_are_bounded(tmp_path: Path) -> None:
    async with running_model(tmp_path, ssd=False) as model:
        obj = model.add("model.safetensors", 12, 9 * MIB)
        async with model.open(obj) as state:
            await model.read(state, 0, obj.size)
        assert 0 < model.unread_seen <= UNREAD_MAX
        assert model.fetched(obj) <= obj.size + 16 * CHUNK_BYTES  # hardly anything twice


async def test_a_file_without_a_table_is_streamed_too_and_its_reads_stay_cheap(tmp_path: Path) -> None:
    async with running_model(tmp_path, ssd=False) as model:
        obj = model.rig.put_ramp("model.gguf", 60 * MIB)
        model.shards.append(obj)
        async with model.open(obj) as state:
            await model.read(state, 0, obj.size)
            assert len(model.prefetcher._urgent) <= 16
        assert model.unread_seen <= UNREAD_MAX


async def test_what_the_kernel_has_taken_is_not_fetched_ahead_again(tmp_path: Path) -> None:
    """Until a reader asks for it: then the kernel has dropped it."""
    async with running_model(tmp_path) as model:
        obj = model.add("model.safetensors", 8, 8 * MIB)
        cache = model.rig.cache

        async def read_all(state: ObjectState) -> None:
            for start in range(0, obj.size, MIB):
                await model.read(state, start, min(start + MIB, obj.size))

        async with model.open(obj) as state:
            await read_all(state)
            await cache.saver.wait_saved()
            await until(lambda: not cache.fills_count and not cache.unread_count, "rest")
            cache.evict(obj, 0)
            assert len(state.taken) == obj.chunks_count
            before = cache.counters.ssd_hit_bytes
            model.prefetcher._want(model.prefetcher._tracks[state], ByteRange(0, obj.size))
            assert model.prefetcher.queued_bytes == 0
            await trio.sleep(0.2)
            assert cache.counters.ssd_hit_bytes == before
            await model.read(state, 0, MIB)
            assert not state.taken
            await read_all(state)
            assert cache.counters.ssd_hit_bytes >= before + obj.size


async def test_a_slice_brings_about_that_slice(tmp_path: Path) -> None:
    async with running_model(tmp_path) as model:
        obj = model.add("model.safetensors", 3, 30 * MIB)
        async with model.open(obj) as state:
            await model.read(state, 40 * MIB, 43 * MIB)
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert model.fetched(obj) <= 3 * 3 * MIB
        assert model.prefetcher.active_count == 0


async def test_a_failing_origin_pauses_what_is_fetched_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PAUSE_S", 3600.0)
    async with running_model(tmp_path) as model:
        obj = model.add("model.safetensors", 8, 9 * MIB)
        async with model.open(obj) as state:
            head = obj.size - 8 * 9 * MIB
            await model.read(state, head, head + 18 * MIB - BLOCK_BYTES * 20)
            model.rig.fail(1000, AccessError)
            with contextlib.suppress(AccessError):
                await model.read(state, head + 18 * MIB - BLOCK_BYTES * 20, head + 18 * MIB)
            tracks = model.prefetcher._tracks.values()
            await until(lambda: all(t.paused_until and not t.under_way for t in tracks), "the pause")
            before = len(model.rig.origin_reads())
            await trio.sleep(1.2)  # a round of housekeeping, which wakes everybody
            assert len(model.rig.origin_reads()) == before
            for path in model.rig.faults.glob("fail-*"):
                path.unlink()
            await model.read(state, head + 30 * MIB, head + 31 * MIB)  # readers themselves are not held back


async def test_a_changed_file_is_not_asked_for_again(tmp_path: Path) -> None:
    async with running_model(tmp_path) as model:
        obj = model.add("model.safetensors", 8, 9 * MIB)
        async with model.open(obj) as state:
            await model.read(state, 0, 20 * MIB)
            (model.rig.origin / "model.safetensors").unlink()
            with pytest.raises(NotFoundError):
                await model.read(state, 20 * MIB, obj.size)


async def test_no_header_is_no_harm(tmp_path: Path) -> None:
    async with running_model(tmp_path) as model:
        strange = {
            "empty": b"", "short": b"\x01", "text": b"not a header " * 1000,
            "lying": struct.pack("<Q", 2**62) + b"{}", "cut": struct.pack("<Q", 100) + b"{",
        }  # fmt: skip
        for name, data in strange.items():
            obj = model.rig.put(f"{name}.safetensors", data)
            model.shards.append(obj)
            async with model.open(obj) as state:
                await model.prefetcher.header(state)
                if data:
                    await model.read(state, 0, len(data))


async def test_handles_closed_after_the_end_are_no_error(tmp_path: Path) -> None:
    async with running_rig(tmp_path) as rig:
        model = Model(rig)
        obj = model.add("model.safetensors", 2, MIB)
        async with contextlib.AsyncExitStack() as stack:
            async with trio.open_nursery() as nursery:
                await nursery.start(model.prefetcher.run)
                state = await stack.enter_async_context(model.open(obj))
                nursery.cancel_scope.cancel()
            assert await model.prefetcher.header(state) is None
        assert not state.users


async def test_a_model_that_hangs_stops_nobody_elses_stream(tmp_path: Path) -> None:
    async with running_model(tmp_path) as model:
        hanging, other = (model.add(f"{name}/model.safetensors", 6, 9 * MIB) for name in "mh")
        async with model.open(hanging) as first, model.open(other) as second:
            head = hanging.size - 6 * 9 * MIB
            await model.read(first, head, head + 18 * MIB - BLOCK_BYTES)
            gate = model.rig.gate("m")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(model.read, first, head + 18 * MIB - BLOCK_BYTES, hanging.size)
                await model.read(second, head, head + 18 * MIB)
                await until(lambda: model.fetched(other) == other.size, "all of the other")
                assert model.fetched(hanging) < hanging.size
                gate.unlink()

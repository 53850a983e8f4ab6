"""The pipeline: every way brings the same bytes, every failure and cancellation leaves nothing behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuload.device import nodes
from gpuload.device.base import Device
from gpuload.device.host import HostDevice, view_of
from gpuload.errors import BusyError, DeviceError
from gpuload.moving.pipeline import Limits, move_batches, move_one_by_one
from gpuload.moving.plan import Packing, Piece, Transfer, cut_axis, pack_transfers, plan_batches
from gpuload.moving.shards import Shard, close_shards, open_shards
from gpuload.moving.source import FileSource, Source
from gpuload.moving.staging import Buffer, Ring
from gpuload.testing import FaultyDevice, FaultySource, Gate, LendingSource, random_tensors, write
from mfs.errors import ChangedError, StoreError
from mfs.safetensors import TensorInfo

SMALL = Limits(buffer_bytes=4096, buffers_count=3, readers_count=3, step_timeout_s=30)
TINY = Limits(buffer_bytes=1200, buffers_count=2, readers_count=2, step_timeout_s=30)
"""Many batches of many pieces: something fails, or is cancelled, between any two."""


class _Bed:
    """A file of a few tensors, a plan that cuts them in every way, and memory for the outcome."""

    def __init__(self, folder: Path) -> None:
        shapes = {"a": (64, 33), "b": (5,), "c": (7, 11, 13), "d": (3000,), "e": (40, 1, 6)}
        self.shards: list[Shard] = open_shards([write(folder / "bed.safetensors", random_tensors(1, shapes, "U8"))])
        infos = self.shards[0].header.by_name
        self.transfers: list[Transfer] = [
            cut_axis(infos["a"], 0, "cpu", 1, 4, 20),
            _whole(infos["b"]),
            cut_axis(infos["c"], 0, "cpu", 2, 0, 5),
            _whole(infos["d"]),
            cut_axis(infos["e"], 0, "cpu", 0, 3, 39),
        ]
        self.memory = [bytearray(t.nbytes) for t in self.transfers]
        self.views = [memoryview(m) for m in self.memory]
        raw = (folder / "bed.safetensors").read_bytes()
        self.want = [
            b"".join(raw[t.start + r * t.pitch_bytes :][: t.row_bytes] for r in range(t.rows_count))
            for t in self.transfers
        ]

    def runs_of(self, piece: Piece) -> list[tuple[int, int]]:
        import ctypes

        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory[piece.transfer])) + piece.offset
        cut = piece.nbytes // 3  # laid over two runs, as granules do
        return [(base, cut), (base + cut, piece.nbytes - cut)] if cut else [(base, piece.nbytes)]

    def batches(self, limits: Limits):  # type: ignore[no-untyped-def]
        piece_bytes = 300 if limits is TINY else 1000
        return plan_batches(self.transfers, buffer_bytes=limits.buffer_bytes, piece_bytes=piece_bytes)

    async def move(self, source: Source, device: Device, limits: Limits, **told: Any) -> None:
        await move_batches(
            self.batches(limits), source=source, device=device, runs_of=self.runs_of, limits=limits, **told
        )


def _whole(t: TensorInfo) -> Transfer:
    return Transfer(t.name, t.dtype, t.shape, "cpu", 0, t.start, t.nbytes, 1, t.nbytes)


@pytest.fixture
def bed(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = _Bed(tmp_path)
    yield made
    close_shards(made.shards)


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "staged"])
@pytest.mark.parametrize("limits", [SMALL, Limits(), Limits(1000, 1, 1, 30)], ids=["small", "default", "one at a time"])
async def test_all_ways_bring_the_same_bytes(bed: _Bed, is_direct: bool, limits: Limits) -> None:
    seen: dict[tuple[int, int], bytes] = {}
    landed: list[int] = []
    await bed.move(
        FileSource(bed.shards),
        HostDevice(is_direct=is_direct),
        limits,
        check=lambda piece, views: seen.update({(piece.transfer, piece.offset): b"".join(views)}),
        on_landed=landed.append,
    )
    assert [bytes(m) for m in bed.memory] == bed.want
    assert sorted(landed) == list(range(5)), "each transfer lands once"
    for index, want in enumerate(bed.want):
        assert b"".join(v for (t, _), v in sorted(seen.items()) if t == index) == want, "the check saw other bytes"


async def test_readers_stay_on_the_processors_of_the_devices_memory_node_for_the_load_alone(
    bed: _Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("this process has one processor: nothing to choose")
    monkeypatch.setattr(nodes, "ROOT", tmp_path)
    place = tmp_path / "sys/devices/system/node/node1"
    place.mkdir(parents=True)
    (place / "cpulist").write_text(f"{min(mine)},4000-4007\n")
    seen: list[set[int]] = []

    class Told(FileSource):
        def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
            seen.append(os.sched_getaffinity(0))
            super().read_into(shard, start, views)

    device = HostDevice(is_direct=False)
    for node, wanted in ((1, {min(mine)}), (None, mine), (2, mine)):  # of 2 nobody says anything
        device.node = node
        seen.clear()
        await bed.move(Told(bed.shards), device, TINY)
        assert seen
        assert all(one == wanted for one in seen), node
    assert [bytes(m) for m in bed.memory] == bed.want


class _Copy:
    """An event whose copy is still under way, was made, or failed."""

    error: Exception | None = None

    def wait(self, timeout_s: float) -> None:
        if self.error is not None:
            raise self.error


def test_a_ring_has_new_buffers_only_where_those_it_has_are_copied_from() -> None:
    device, copy = HostDevice(is_direct=False), _Copy()
    with closing(Ring(device, buffer_bytes=100, count=3, first_bytes=10)) as ring:

        def take_and_put(error: Exception | None) -> Buffer:
            copy.error = error
            buffer = ring.take()
            assert buffer is not None
            buffer.pending = copy
            ring.put(buffer)
            return buffer

        one = take_and_put(None)
        assert one.room == 10
        assert take_and_put(None) is one, "its copy was made"
        assert one.room == 100
        two = take_and_put(BusyError("under way"))
        assert two is not one
        with pytest.raises(DeviceError, match="as asked"):
            take_and_put(DeviceError("as asked"))
        three = take_and_put(BusyError("under way"))
        assert three not in (one, two)
        assert [take_and_put(BusyError("under way")) for _ in range(4)] == [one, two, three, one], "none was lost"
        assert ring.room == 100
        ring.rest()


async def test_batches_are_moved_while_later_ones_are_planned(bed: _Bed) -> None:
    limits, landed = TINY, threading.Event()
    device = HostDevice(is_direct=False)
    ring = Ring(device, buffer_bytes=limits.buffer_bytes, count=2)

    class Told(FileSource):
        def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
            super().read_into(shard, start, views)
            landed.set()

    pieces = [(batch.shard, piece) for batch in bed.batches(limits) for piece in batch.pieces]

    def planned() -> Iterator[tuple[int, Piece]]:
        yield from pieces[:-1]
        assert landed.wait(30), "nothing moves before all is planned"
        yield pieces[-1]

    async def move(pieces: Iterable[tuple[int, Piece]], source: Source) -> None:
        await move_batches(
            Packing(pieces), source=source, device=device, runs_of=bed.runs_of, limits=limits, lent=ring
        )  # fmt: skip

    await move(planned(), Told(bed.shards))
    assert [bytes(m) for m in bed.memory] == bed.want

    def broken() -> Iterator[tuple[int, Piece]]:
        yield from pieces[:-1]
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        await move(broken(), FileSource(bed.shards))
    landed.set()
    bed.memory[0][:] = bytes(len(bed.memory[0]))
    await move(planned(), FileSource(bed.shards))  # all buffers are back
    assert [bytes(m) for m in bed.memory] == bed.want
    ring.close()


@pytest.mark.parametrize("reaches_all", [True, False], ids=["in place", "staged"])
@pytest.mark.parametrize("limits", [SMALL, Limits(), Limits(1000, 1, 1, 30)], ids=["small", "default", "one at a time"])
async def test_lent_bytes_are_the_same_bytes(bed: _Bed, reaches_all: bool, limits: Limits) -> None:
    """A source that lends: copied from in place where the device reaches it, else over staging; hashed all the same."""
    seen: dict[tuple[int, int], bytes] = {}
    source = LendingSource(FileSource(bed.shards))
    await bed.move(
        source,
        HostDevice(is_direct=False, reaches_all=reaches_all),
        limits,
        check=lambda piece, views: seen.update({(piece.transfer, piece.offset): b"".join(views)}),
    )
    assert [bytes(m) for m in bed.memory] == bed.want
    for index, want in enumerate(bed.want):
        assert b"".join(v for (t, _), v in sorted(seen.items()) if t == index) == want, "the check saw other bytes"
    assert source.loans_count == 0
    assert 0 < source.loans_most <= limits.buffers_count + limits.readers_count + 1, "the loans have no bound"


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "staged"])
def test_the_way_without_overlap_is_no_other_way(bed: _Bed, is_direct: bool) -> None:
    move_one_by_one(
        bed.batches(SMALL),
        source=FileSource(bed.shards),
        device=HostDevice(is_direct=is_direct),
        runs_of=bed.runs_of,
        limits=SMALL,
    )
    assert [bytes(m) for m in bed.memory] == bed.want
    lending, lender = HostDevice(is_direct=False, reaches_all=True), LendingSource(FileSource(bed.shards))
    for memory in bed.memory:
        memory[:] = bytes(len(memory))
    move_one_by_one(bed.batches(SMALL), source=lender, device=lending, runs_of=bed.runs_of, limits=SMALL)
    assert [bytes(m) for m in bed.memory] == bed.want
    assert lender.loans_count == 0


@pytest.mark.parametrize("passes", range(6))
@pytest.mark.parametrize("stage", ["source", "device", "check"])
async def test_a_failure_while_bytes_are_lent_leaves_no_loan(bed: _Bed, stage: str, passes: int) -> None:
    gate, never = Gate(passes), Gate(1 << 30)
    device = FaultyDevice(HostDevice(), gate if stage == "device" else never)
    source = LendingSource(FileSource(bed.shards), gate if stage == "source" else None)
    refused = StoreError("the check failed, as asked")
    with pytest.raises((StoreError, DeviceError), match="as asked"):
        await bed.move(
            source,
            device,
            TINY,
            check=lambda piece, views: (gate if stage == "check" else never).pass_or(refused),
        )
    assert source.loans_count == 0
    assert device.staging_count == 0


@pytest.mark.parametrize("passes", range(6))
@pytest.mark.parametrize("stage", ["source", "device"])
async def test_cancelling_while_bytes_are_lent_leaves_no_loan(bed: _Bed, stage: str, passes: int) -> None:
    """Loans go back only when no copy reads from them: the lender's memory is overwritten as they do."""
    gate = Gate(passes, blocks=True)
    device = FaultyDevice(HostDevice(), gate if stage == "device" else Gate(1 << 30))
    source = LendingSource(FileSource(bed.shards), gate if stage == "source" else None)
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            await trio.to_thread.run_sync(gate.reached.wait, 30)
            scope.cancel()
            if stage == "device":
                assert source.loans_count, "a loan went back while the device still copied from it"
            gate.opened.set()

        nursery.start_soon(cancel)
        with trio.CancelScope() as scope:
            await bed.move(source, device, TINY)
    assert scope.cancelled_caught
    assert source.loans_count == 0
    assert device.staging_count == 0


@pytest.mark.parametrize("passes", range(6))
@pytest.mark.parametrize("stage", ["source", "device"])
async def test_a_failure_at_any_step_ends_everything(bed: _Bed, stage: str, passes: int) -> None:
    gate = Gate(passes)
    device = FaultyDevice(HostDevice(), gate if stage == "device" else Gate(1 << 30))
    source = FaultySource(FileSource(bed.shards), gate if stage == "source" else Gate(1 << 30))
    before = threading.active_count()
    with pytest.raises(StoreError if stage == "source" else DeviceError, match="as asked"):
        await bed.move(source, device, TINY)
    assert device.staging_count == 0
    assert not [t for t in threading.enumerate() if t.name == "gpuload-host-stream"], before


@pytest.mark.parametrize("passes", range(6))
@pytest.mark.parametrize("stage", ["source", "device"])
async def test_cancelling_at_any_step_ends_everything(bed: _Bed, stage: str, passes: int) -> None:
    gate = Gate(passes, blocks=True)
    device = FaultyDevice(HostDevice(), gate if stage == "device" else Gate(1 << 30))
    source = FaultySource(FileSource(bed.shards), gate if stage == "source" else Gate(1 << 30))
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            await trio.to_thread.run_sync(gate.reached.wait, 30)
            scope.cancel()
            gate.opened.set()

        nursery.start_soon(cancel)
        with trio.CancelScope() as scope:
            await bed.move(source, device, TINY)
    assert scope.cancelled_caught
    assert device.staging_count == 0
    assert not [t for t in threading.enumerate() if t.name == "gpuload-host-stream"]


async def test_a_file_cut_short_is_an_error_not_zeros(bed: _Bed) -> None:
    batches = bed.batches(SMALL)
    with open(bed.shards[0].path, "r+b") as file:
        file.truncate(bed.shards[0].header.file_bytes - 10)
    with pytest.raises(ChangedError, match="cut short"):
        await move_batches(
            batches, source=FileSource(bed.shards), device=HostDevice(), runs_of=bed.runs_of, limits=SMALL
        )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    buffer_bytes=st.integers(1, 500),
    first_bytes=st.integers(1, 500),
    way=st.sampled_from(["direct", "staged", "growing", "lent", "lent, growing", "lent and staged"]),
    readers=st.integers(1, 4),
)
def test_any_shape_of_load(
    sizes: list[int],
    buffer_bytes: int,
    first_bytes: int,
    way: str,
    readers: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = write(
        tmp_path_factory.getbasetemp() / "any.safetensors",
        random_tensors(3, {f"t{i}": (n,) for i, n in enumerate(sizes)}, "U8"),
    )
    shards = open_shards([path])
    transfers = [_whole(t) for t in shards[0].header.tensors]
    total = sum(t.nbytes for t in transfers)
    arena = HostDevice(granule_bytes=4096).create_arena(8192)
    starts = [t.start - shards[0].header.data_start for t in transfers]

    device = HostDevice(is_direct=way == "direct", reaches_all=way.startswith("lent") and way != "lent and staged")
    ring = Ring(device, buffer_bytes=buffer_bytes, count=3, first_bytes=first_bytes)
    grows = way.endswith("growing")
    packing = pack_transfers(transfers, piece_bytes=min(first_bytes, buffer_bytes))

    async def main() -> None:
        await move_batches(
            packing if grows else plan_batches(transfers, buffer_bytes=buffer_bytes),
            source=LendingSource(FileSource(shards)) if way.startswith("lent") else FileSource(shards),
            device=device,
            runs_of=lambda p: [(arena.address + starts[p.transfer] + p.offset, p.nbytes)],
            limits=Limits(buffer_bytes, 2, readers, 30),
            lent=ring if grows else None,
        )

    trio.run(main)
    assert bytes(view_of(arena.address, total)) == path.read_bytes()[shards[0].header.data_start :]
    ring.close()
    arena.close()
    close_shards(shards)

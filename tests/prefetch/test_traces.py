"""Replays of what real libraries did: no more than was wanted for a look, everything ahead for a load, nothing twice.

The traces were recorded from the libraries on a real mount (`tests.prefetch.traces`); here the pattern, and then the
whole prefetcher over real workers, sees the same reads again.
"""

from __future__ import annotations

import itertools
import json
import struct
from array import array
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from mfs.prefetch.pattern import BURST_BYTES, WEIGHTS_BYTES_MAX, WEIGHTS_BYTES_MIN, AccessPattern
from mfs.testing import ramp
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from tests.prefetch.test_engine import Model, running_model
from tests.prefetch.traces import FOLDER, REQUEST_BYTES, Step, Trace

ALL = sorted(path.stem for path in FOLDER.glob("*.trace"))
LOADS = [
    "safetensors_load_file-sharded", "safetensors_shuffled-sharded", "transformers_from_pretrained-sharded",
    "gguf_reader-gguf", "torch_load_mmap-torch_file", "onnx_external_data-onnx_external",
    "accelerate_dispatch-dispatched",
]  # fmt: skip
"""Whole models, and small enough to be moved for real."""


def requests(step: Step) -> list[ByteRange]:
    """A read of the trace, cut as the kernel cuts it."""
    stop = step.start + step.length
    return [ByteRange(at, min(at + REQUEST_BYTES, stop)) for at in range(step.start, stop, REQUEST_BYTES)]


class Replay:
    """All patterns of a trace, and what they answered."""

    def __init__(self, trace: Trace) -> None:
        self.patterns = [AccessPattern(size) for _, size in trace.files]
        for number, table in trace.tables.items():
            self.patterns[number].set_table(array("Q", table))
        self.ahead: dict[int, list[ByteRange]] = defaultdict(list)
        self.taking_after: dict[int, int] = {}
        """By file: bytes that had been read of it when it was first taken for a load."""
        self.overdrawn_bytes = 0
        """The most that was ordered ahead of a file beyond what had been consumed of it."""
        consumed: dict[int, int] = defaultdict(int)
        for step in trace.steps:
            if step.op == "read":
                pattern = self.patterns[step.file]
                for span in requests(step):
                    ahead = pattern.note(span)
                    consumed[step.file] += len(span)
                    if ahead is not None:
                        assert 0 <= ahead.start < ahead.stop <= trace.files[step.file][1]
                        self.ahead[step.file].append(ahead)
                        ordered = sum(map(len, self.ahead[step.file]))
                        self.overdrawn_bytes = max(self.overdrawn_bytes, ordered - consumed[step.file])
                    if pattern.taking_weights:
                        self.taking_after.setdefault(step.file, consumed[step.file])


@pytest.mark.parametrize("name", ALL)
def test_orders_are_bounded_and_stay_in_their_tensor(name: str) -> None:
    """Each at most 64 MiB; where a table is known, none reaches past the tensor that was being read."""
    trace = Trace.read(name)
    replay = Replay(trace)
    for number, orders in replay.ahead.items():
        ends = {*trace.tables.get(number, ()), trace.files[number][1]}
        for order in orders:
            assert len(order) <= 64 << 20
            assert not any(order.start < end < order.stop for end in ends)


@pytest.mark.parametrize("name", ["safetensors_safe_open-llama", "safetensors_shuffled-llama"])
def test_a_load_is_known_for_one_before_a_tenth_of_it_was_read(name: str) -> None:
    """Whatever the order of the tensors; 419 MB in five shards. One whole tensor alone is no load: a shard that
    begins with an embedding of 65 MB is known for one after that, and the run through it is fetched ahead anyway."""
    trace = Trace.read(name)
    replay = Replay(trace)
    assert min(replay.taking_after.values()) <= WEIGHTS_BYTES_MAX <= trace.size / 10
    for number, table in trace.tables.items():
        if len(table) > 3:  # the last shard is one tensor
            largest = max(stop - start for start, stop in itertools.pairwise(table))
            assert replay.taking_after[number] <= max(WEIGHTS_BYTES_MAX, largest) + BURST_BYTES


def test_rows_taken_at_random_order_less_than_they_took() -> None:
    """numpy.memmap of rows in random order: nothing says what comes next, so little is bet on it."""
    trace = Trace.read("numpy_memmap-numpy_arrays")
    replay = Replay(trace)
    assert replay.overdrawn_bytes <= 0


def content_of(trace: Trace, number: int) -> bytes:
    """A file of the trace's size and with its tensor table, filled with the ramp."""
    _, size = trace.files[number]
    bounds = trace.tables.get(number)
    if bounds is None:
        return ramp(size, number)
    first, *stops = bounds
    table, start = {}, first
    for index, stop in enumerate(stops):
        offsets = [start - first, stop - first]
        table[f"{index:x}"] = {"dtype": "U8", "shape": [stop - start], "data_offsets": offsets}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    assert len(text) <= first - 8, "the header recorded was shorter than the shortest of its table"
    return struct.pack("<Q", first - 8) + text.ljust(first - 8) + ramp(size - first, number)


async def replay_on(model: Model, trace: Trace) -> list[ObjectId]:
    """All files put at the origin, all steps done; each read checked."""
    objects = []
    for number, (name, _) in enumerate(trace.files):
        objects.append(model.rig.put(name, content_of(trace, number)))
        model.shards.append(objects[-1])
    opened: dict[int, list[AsyncExitStack]] = defaultdict(list)
    states = {}
    for step in trace.steps:
        if step.op == "open":
            stack = AsyncExitStack()
            states[step.file] = await stack.enter_async_context(model.open(objects[step.file]))
            opened[step.file].append(stack)
        elif step.op == "close":
            await opened[step.file].pop().aclose()
        else:
            for span in requests(step):
                whole = model.prefetcher.note(states[step.file], span)
                begun = model.rig.cache.begin(states[step.file], span, whole_chunks=whole)
                pieces = await model.rig.cache.read(states[step.file], span, begun)
                assert b"".join(pieces) == model.rig.contents[objects[step.file]][span.start : span.stop]
    for stacks in opened.values():
        for stack in stacks:
            await stack.aclose()
    return objects


async def test_a_header_sweep_fetches_a_block_a_shard(tmp_path: Path) -> None:
    trace = Trace.read("safetensors_header_sweep-sharded")
    async with running_model(tmp_path) as model:
        objects = await replay_on(model, trace)
        assert [model.fetched(obj) for obj in objects] == [BLOCK_BYTES] * 5
        assert model.prefetcher.active_count == 0


@pytest.mark.parametrize("name", LOADS)
async def test_a_load_fetches_each_byte_once(name: str, tmp_path: Path) -> None:
    """Also where tensors are taken in shuffled order, and RAM (64 MiB of slots) is smaller than the model."""
    trace = Trace.read(name)
    async with running_model(tmp_path) as model:
        objects = await replay_on(model, trace)
        spans = sorted(model.rig.origin_reads())
        twice = sum(max(0, a[2] - b[1]) for a, b in itertools.pairwise(spans) if a[0] == b[0])
        assert twice == 0
        assert sum(map(model.fetched, objects)) <= trace.size


@pytest.mark.parametrize("name", LOADS)
async def test_a_load_without_an_ssd_does_not_thrash(name: str, tmp_path: Path) -> None:
    trace = Trace.read(name)
    async with running_model(tmp_path, ssd=False) as model:
        objects = await replay_on(model, trace)
        fetched = sum(map(model.fetched, objects))
        print(f"{name}: {fetched:,} bytes fetched for {trace.touched_bytes:,} of {trace.size:,}")
        assert fetched <= trace.size + 4 * CHUNK_BYTES


async def test_slices_of_a_quarter_fetch_little_more_than_the_kernel_asked_for(tmp_path: Path) -> None:
    """A tensor-parallel rank: the kernel's read-around is most of what it costs, not the prefetcher."""
    trace = Trace.read("safetensors_slices-sharded")
    async with running_model(tmp_path) as model:
        objects = await replay_on(model, trace)
        assert trace.touched_bytes < 0.8 * trace.size
        fetched = sum(map(model.fetched, objects))
        print(f"{fetched:,} bytes fetched for {trace.touched_bytes:,} of {trace.size:,}")
        assert fetched <= trace.size


async def test_a_load_of_one_file_makes_it_stream(tmp_path: Path) -> None:
    """sentence-transformers leaves a third of the embeddings untouched; the file was being taken all the same."""
    trace = Trace.read("sentence_transformers-minilm")
    async with running_model(tmp_path) as model:
        [obj] = await replay_on(model, trace)
        state = model.rig.cache.open(obj, 0)
        assert model.prefetcher._tracks[state].streaming
        model.rig.cache.close(state)
        assert model.fetched(obj) >= trace.touched_bytes
    assert trace.touched_bytes > WEIGHTS_BYTES_MIN

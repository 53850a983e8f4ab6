"""The conductor of one load: batches → source → ring of buffers → copy stream, overlapped, cancelled as one.

    feeder ──batch──> readers_count readers, each:   take a buffer, wait until its last copy is done   (thread)
                                                     fill it from the source, check it                  (thread)
                                                     queue the copies, put it back with their event     (trio)
                      lander: waits for the events in order, tells which transfers are complete         (thread)

A source that lends its bytes where the device reaches them fills no buffer: the copies are queued from there, and the
lander gives the loan back when their event has come. The bounded way to the lander bounds the loans.

Where the CPU reaches device memory (`device.is_direct`) a batch of plain runs is read straight into its place: the same
bytes by a shorter way, and tests/gpuload/moving/test_pipeline.py holds both to be equal. There are no stop flags: the
first failure cancels the nursery, and leaving it waits for the copies that are queued before any buffer is given back.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass

import trio

from gpuload.device.base import Device, Event, Stream
from gpuload.device.host import view_of
from gpuload.errors import one_error
from gpuload.moving.moves import Runs, plan_moves, plan_parts
from gpuload.moving.plan import Batch, Piece
from gpuload.moving.source import Loan, Source, copy_out
from gpuload.moving.staging import Buffer, Ring, open_ring
from gpuload.moving.timing import Timing

RunsOf = Callable[[Piece], Sequence[tuple[int, int]]]
"""Where a piece belongs: (address, nbytes) runs on the device, in order; empty where it is not wanted there."""

Check = Callable[[Piece, Sequence[memoryview]], None]
"""Looks at a piece's bytes before they count, in a reader's thread; raises to refuse them. The views, joined, are the
piece as it arrives; they die with the call."""


@dataclass(frozen=True)
class Limits:
    """How much a load may use at once."""

    buffer_bytes: int = 16 << 20
    """One staging buffer. At 50 GB/s a fill lasts 0.3 ms, ten times what a hop between threads costs."""
    buffers_count: int = 6
    readers_count: int = max(2, min(8, os.cpu_count() or 2))
    """Threads that fill buffers; 8 saturate the memory of the machines we know of."""
    ahead_bytes: int = 256 << 20
    """Tensors a stream makes ahead of its consumer: more than all buffers hold, so that the pipeline never runs dry."""
    step_timeout_s: float = 120.0
    """Longest wait for one buffer's copies; beyond it the device hangs."""


async def move_batches(
    batches: Sequence[Batch],
    *,
    source: Source,
    device: Device,
    runs_of: RunsOf,
    limits: Limits,
    check: Check | None = None,
    on_landed: Callable[[int], None] | None = None,
    admit: Callable[[Batch], Awaitable[None]] | None = None,
    lent: Ring | None = None,
    timing: Timing | None = None,
) -> None:
    """Move every batch; return when every byte is in its place.

    lent: a ring to use, whose buffers hold the largest batch; all its buffers are back in it afterwards, whatever
        happens. None: one is made for this call.
    runs_of: called on the trio thread where a copy is queued, in a reader's thread for direct reads.
    admit: awaited before each batch, in order: it may be read, and has a place to go to.
    timing: told how long copies were waited for.
    on_landed: told, on the trio thread, the index of each transfer as its last byte is in place, in no fixed order.
    Raises: what source, device or check raise. Cancellation: safe; the destination's bytes are undefined.
    """
    if not batches:
        return
    landing = _Landing(batches, on_landed)
    staged = not device.is_direct or any(not _is_plain(batch) for batch in batches)
    readers_count = min(limits.readers_count, len(batches))
    buffers_count = min(limits.buffers_count, len(batches)) if staged else 0
    threads = trio.CapacityLimiter(readers_count)
    feed_in, feed_out = trio.open_memory_channel[Batch](0)
    over = trio.Event()
    events_in, events_out = trio.open_memory_channel[tuple[Event, Batch, Loan | None]](max(1, buffers_count))
    buffer_bytes = max(batch.nbytes for batch in batches) if staged else 0
    if lent is not None and lent.buffer_bytes < buffer_bytes:
        raise ValueError(f"a batch of {buffer_bytes} bytes does not fit the lent buffers of {lent.buffer_bytes}")

    async def feed() -> None:
        async with feed_in:
            for batch in batches:
                if admit is not None:
                    await admit(batch)
                await feed_in.send(batch)

    async def read(own: trio.MemorySendChannel[tuple[Event, Batch, Loan | None]]) -> None:
        async with own:
            async for batch in feed_out:
                if device.is_direct and _is_plain(batch):
                    await trio.to_thread.run_sync(_read_direct, batch, source, runs_of, check, limiter=threads)
                    landing.add(batch)
                    continue
                buffer = await ring.take()
                try:
                    sources, loan = await trio.to_thread.run_sync(
                        _bring, batch, buffer, source, device, check, limits, limiter=threads
                    )
                    if loan is not None:
                        loans.add(loan)
                    event = queue_copies(stream, batch, sources, runs_of)
                    if loan is None:
                        buffer.pending = event
                finally:
                    ring.put(buffer)
                await own.send((event, batch, loan))

    async def land() -> None:
        async for event, batch, loan in events_out:
            with timing.within("copy") if timing is not None else nullcontext():
                await trio.to_thread.run_sync(event.wait, limits.step_timeout_s)
            if loan is not None:
                loan.release()
                loans.remove(loan)
            landing.add(batch)
        over.set()

    async def watch() -> None:
        try:
            await over.wait()
        except trio.Cancelled:
            source.interrupt()  # readers may wait there for what this very load holds
            raise

    with one_error():
        async with (
            _ring(lent, device, buffer_bytes, buffers_count) as ring,
            _no_loans_left() as loans,
            _open_stream(device) as stream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(feed)
            nursery.start_soon(land)
            nursery.start_soon(watch)
            async with events_in:
                for _ in range(readers_count):
                    nursery.start_soon(read, events_in.clone())


def move_one_by_one(
    batches: Iterable[Batch], *, source: Source, device: Device, runs_of: RunsOf, limits: Limits
) -> None:
    """`move_batches` in the caller's thread, without overlap: less to set up, so quicker for one small tensor."""
    for batch in batches:
        if device.is_direct and _is_plain(batch):
            _read_direct(batch, source, runs_of, None)
            continue
        with ExitStack() as held:
            staging = held.enter_context(closing(device.alloc_staging(batch.nbytes)))
            sources, loan = _bring(batch, Buffer(staging), source, device, None, limits)
            if loan is not None:
                held.callback(loan.release)
            stream = held.enter_context(closing(device.open_stream()))  # ends first: it may copy from the others
            queue_copies(stream, batch, sources, runs_of).wait(limits.step_timeout_s)


def queue_copies(stream: Stream, batch: Batch, sources: Runs, runs_of: RunsOf) -> Event:
    """Queue the copies of a batch that stands at `sources`; the event says when those may be used otherwise again."""
    for piece in batch.pieces:
        for move in plan_moves(piece, piece.start - batch.start, sources, runs_of(piece)):
            if move.rows_count == 1:
                stream.copy_in(move.dst, move.src, move.row_bytes)
            else:
                stream.copy_in_rows(
                    move.dst,
                    move.src,
                    row_bytes=move.row_bytes,
                    rows_count=move.rows_count,
                    pitch_bytes=move.pitch_bytes,
                )
    return stream.record()


def _bring(
    batch: Batch, buffer: Buffer, source: Source, device: Device, check: Check | None, limits: Limits
) -> tuple[Runs, Loan | None]:
    """Have a batch where `device` can copy from: in place, on a loan that is now the caller's, or in the buffer."""
    loan = source.borrow(batch.shard, batch.start, batch.stop)
    try:
        if loan is not None and all(device.reaches(address, nbytes) for address, nbytes in loan.runs):
            _look(batch, loan.runs, check)
            kept, loan = loan, None
            return kept.runs, kept
        buffer.settle(limits.step_timeout_s)
        view = buffer.staging.view[: batch.nbytes]
        if loan is not None:
            copy_out(loan.runs, [view])
        else:
            source.read_into(batch.shard, batch.start, [view])
    finally:
        if loan is not None:
            loan.release()
    sources = [(buffer.staging.address, batch.nbytes)]
    _look(batch, sources, check)
    return sources, None


def _look(batch: Batch, sources: Runs, check: Check | None) -> None:
    if check is not None:
        for piece in batch.pieces:
            check(piece, [view_of(*part) for part in plan_parts(piece, piece.start - batch.start, sources)])


def _read_direct(batch: Batch, source: Source, runs_of: RunsOf, check: Check | None) -> None:
    views: list[memoryview] = []
    begin = reached = batch.start
    for piece in batch.pieces:
        if piece.start != reached:  # a gap nobody wants: ask again behind it
            source.read_into(batch.shard, begin, views)
            views, begin = [], piece.start
        views.extend(view_of(address, nbytes) for address, nbytes in runs_of(piece))
        reached = piece.stop
    source.read_into(batch.shard, begin, views)
    if check is not None:
        for piece in batch.pieces:
            check(piece, [view_of(address, nbytes) for address, nbytes in runs_of(piece)])


def _is_plain(batch: Batch) -> bool:
    return all(piece.rows_count == 1 for piece in batch.pieces)


@asynccontextmanager
async def _ring(lent: Ring | None, device: Device, buffer_bytes: int, count: int) -> AsyncIterator[Ring]:
    if lent is None:
        async with open_ring(device, buffer_bytes=buffer_bytes, count=count) as ring:
            yield ring
        return
    try:
        yield lent
    finally:
        lent.forget_copies()  # the stream is closed by now; a failed copy must not fail the next load


@asynccontextmanager
async def _no_loans_left() -> AsyncIterator[set[Loan]]:
    """Where readers note what they borrowed; what is left at the end, when no stream copies any more, is given back."""
    loans: set[Loan] = set()
    try:
        yield loans
    finally:
        for loan in loans:
            loan.release()


@asynccontextmanager
async def _open_stream(device: Device) -> AsyncIterator[Stream]:
    stream = await trio.to_thread.run_sync(device.open_stream)
    try:
        yield stream
    finally:
        with trio.CancelScope(shield=True):  # what is queued must end before its buffers go; not on this thread
            await trio.to_thread.run_sync(stream.close)


class _Landing:
    """Counts the pieces of each transfer that are still on their way."""

    def __init__(self, batches: Sequence[Batch], on_landed: Callable[[int], None] | None) -> None:
        self._on_landed = on_landed
        self._waiting: dict[int, int] = {}
        for batch in batches:
            for piece in batch.pieces:
                self._waiting[piece.transfer] = self._waiting.get(piece.transfer, 0) + 1

    def add(self, batch: Batch) -> None:
        for piece in batch.pieces:
            self._waiting[piece.transfer] -= 1
            if not self._waiting[piece.transfer] and self._on_landed is not None:
                self._on_landed(piece.transfer)


def buffers_bytes(limits: Limits, wanted_bytes: int) -> int:
    """Host memory a staged load of `wanted_bytes` takes for its ring."""
    return min(limits.buffers_count, math.ceil(wanted_bytes / limits.buffer_bytes)) * limits.buffer_bytes

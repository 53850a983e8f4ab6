"""The conductor of one load: batches → source → ring of buffers → copy stream, overlapped, cancelled as one.

    readers_count threads, each:   take a buffer and a batch for it, wait until the buffer's last copy is done,
                                   fill it from the source, have it page-locked if it is new, check it,
                                   queue the copies, put it back with their event
    one thread more:               waits for the events in order, tells which transfers are complete

A thread stays with its work from the first batch to the last: handing each batch from thread to thread cost more than
a link needs for it (decisions/0007-link-speed.md).

A source that lends its bytes where the device reaches them fills no buffer: the copies are queued from there, and the
loan is given back when their event has come. The bounded way there bounds the loans.

Where the CPU reaches device memory (`device.is_direct`) a batch of plain runs is read straight into its place: the same
bytes by a shorter way, and tests/gpuload/moving/test_pipeline.py holds both to be equal. What fails or cancels a load
stops the way of the batches; the threads end after the batch they are at, and the copies that are queued before any
buffer is given back.
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass
from itertools import accumulate, count
from typing import NamedTuple

import trio

from gpuload.device.base import Device, Event, Stream
from gpuload.device.host import view_of
from gpuload.device.nodes import beside
from gpuload.errors import one_error
from gpuload.moving.moves import Move, Runs, plan_moves, plan_parts
from gpuload.moving.plan import Batch, Packing, Piece
from gpuload.moving.source import Loan, Source, copy_out
from gpuload.moving.staging import Buffer, Ring
from gpuload.moving.timing import Timing
from mfs.errors import MfsError

RunsOf = Callable[[Piece], Sequence[tuple[int, int]]]
"""Where a piece belongs: (address, nbytes) runs on the device, in order; empty where it is not wanted there."""

Check = Callable[[Piece, Sequence[memoryview]], None]
"""Looks at a piece's bytes before they count, in a reader's thread; raises to refuse them. The views, joined, are the
piece as it arrives; they die with the call."""


@dataclass(frozen=True)
class Limits:
    """How much a load may use at once."""

    buffer_bytes: int = 32 << 20
    """One staging buffer. At 50 GB/s a fill lasts 0.6 ms, three times what Python needs to see to it."""
    buffers_count: int = max(2, min(8, os.cpu_count() or 2)) + 4
    """One for each reader, and four whose copies are queued: 2 ms of a link at work while readers come and go."""
    readers_count: int = max(2, min(8, os.cpu_count() or 2))
    """Threads that fill buffers, hash, and queue copies. Six that read 10 GB/s each fill a link of 55."""
    ahead_bytes: int = 256 << 20
    """Tensors a stream makes ahead of its consumer: more than all buffers hold, so that the pipeline never runs dry."""
    step_timeout_s: float = 120.0
    """Longest wait for one buffer's copies; beyond it the device hangs."""


Decide = Callable[[Batch], None]
"""Told a batch that was checked, in its reader's thread, before `runs_of` is asked about its pieces."""


async def move_batches(
    batches: Sequence[Batch] | Packing,
    *,
    source: Source,
    device: Device,
    runs_of: RunsOf,
    limits: Limits,
    check: Check | None = None,
    checks_later: bool = False,
    decide: Decide | None = None,
    on_landed: Callable[[int], None] | None = None,
    admit: Callable[[Batch], Awaitable[None]] | None = None,
    lent: Ring | None = None,
    timing: Timing | None = None,
) -> None:
    """Move every batch; return when every byte is in its place.

    batches: in order; or, with `lent` and without `on_landed` and `admit`, what readers take them from, each as large
        as its buffer. Pieces are at most the ring's `first_bytes` then.
    lent: a ring to use, whose buffers hold the largest batch; all its buffers are back in it afterwards, whatever
        happens. None: one is made for this call.
    runs_of: called in a reader's thread.
    check: see `Check`. checks_later: it may look while the copy is under way, so that one costs no time of the other;
        bytes that it refuses may be in their place then.
    admit: awaited before each batch, in order: it may be read, and has a place to go to.
    timing: told how long copies were waited for.
    on_landed: told, in a thread of the load, the index of each transfer once all of it is in place, in no fixed order.
    Raises: what source, device or check raise. Cancellation: safe; the destination's bytes are undefined.
    """
    packing = batches if isinstance(batches, Packing) else None
    if packing is not None:
        assert lent is not None
        taken = (packing.take(lent.room) for _ in range(limits.readers_count))
        head = [batch for batch in taken if batch is not None]
    else:
        assert not isinstance(batches, Packing)
        head = list(batches)
    if not head:
        return
    readers_count = min(limits.readers_count, len(head))
    if lent is not None:
        ring, copies_most = lent, lent.count
    else:
        copies_most = min(limits.buffers_count, len(head))
        ring = Ring(device, buffer_bytes=max(batch.nbytes for batch in head), count=copies_most)
    ways = _Ways(head if admit is None else (), packing, ring, is_fed=admit is None, copies_most=copies_most)
    landing = _Landing(head if on_landed is not None else (), on_landed)
    readers_left = readers_count

    async def feed() -> None:
        assert admit is not None
        for batch in head:
            await admit(batch)
            ways.add(batch)
        ways.end_feeding()

    def read() -> None:
        try:
            with beside(device.node):
                read_all()
        except MfsError:
            if not ways.is_stopped:  # else the load has its end already, and the source was told to fail
                raise

    def next_one() -> tuple[Batch, Buffer | None] | None:
        """A batch, and the buffer that it fills: none where it is read straight into its place."""
        buffer, batch = None, None
        if device.is_direct:
            batch = ways.next_batch(ring.buffer_bytes)
            if batch is None or _is_plain(batch):
                return None if batch is None else (batch, None)
        buffer = ring.take()
        if buffer is None:
            return None
        try:
            batch = batch or ways.next_batch(buffer.room)
        finally:
            if batch is None:
                ring.put(buffer)
        return None if batch is None else (batch, buffer)

    def read_all() -> None:
        while (found := next_one()) is not None:
            batch, buffer = found
            if batch.nbytes > ring.buffer_bytes:
                raise ValueError(f"a batch of {batch.nbytes} bytes does not fit buffers of {ring.buffer_bytes}")
            if buffer is None:
                _read_direct(batch, source, runs_of, check)
                landing.add(batch)
                continue
            try:
                sources, loan = _bring(batch, buffer, source, device, limits)
                try:
                    if not checks_later:
                        _look(batch, sources, check)
                    if decide is not None:
                        decide(batch)
                    moves = _moves_of(batch, sources, runs_of)
                    with ways.queueing:
                        number, event = ways.next_number(), queue_moves(stream, moves)
                    if loan is None:
                        buffer.pending = event
                    else:
                        held.add(loan)
                finally:
                    if loan is not None and loan not in held:
                        loan.release()
                if checks_later:
                    _look(batch, sources, check)
            finally:
                ring.put(buffer)
            if not ways.add_copies(_Copies(number, event, batch, loan)):
                return

    async def run_reader() -> None:
        nonlocal readers_left
        await trio.to_thread.run_sync(read, limiter=threads)
        readers_left -= 1
        if not readers_left:
            ways.is_read()

    def wait(event: Event) -> None:
        with timing.within("copy") if timing is not None else nullcontext():
            event.wait(limits.step_timeout_s)

    def land() -> None:
        last: _Copies | None = None
        while (copies := ways.next_copies()) is not None:
            last = copies if last is None or copies.number > last.number else last
            if copies.loan is not None or on_landed is not None or timing is not None:
                wait(copies.event)
                landing.add(copies.batch)
            if copies.loan is not None:
                copies.loan.release()
                held.discard(copies.loan)
        if last is not None:
            wait(last.event)

    async def run_lander() -> None:
        await trio.to_thread.run_sync(land, limiter=threads)
        over.set()

    async def watch() -> None:
        try:
            await over.wait()
        finally:
            if not over.is_set():
                ways.stop()
                source.interrupt()  # readers may wait there for what this very load holds

    over, threads = trio.Event(), trio.CapacityLimiter(readers_count + 2)
    with one_error():
        async with (
            _at_rest(ring, is_lent=lent is not None),
            _no_loans_left() as held,
            _open_stream(device) as stream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(watch)
            nursery.start_soon(run_lander)
            for _ in range(readers_count):
                nursery.start_soon(run_reader)
            if admit is not None:
                nursery.start_soon(feed)


def move_one_by_one(
    batches: Sequence[Batch],
    *,
    source: Source,
    device: Device,
    runs_of: RunsOf,
    limits: Limits,
    ring: Ring | None = None,
    stream: Stream | None = None,
) -> None:
    """`move_batches` in the caller's thread, without overlap: less to set up, so quicker for one small tensor.

    ring, stream: both, that nobody else uses now, or none; a buffer of the ring holds the largest batch. With them
        nothing is page-locked for the call.
    """
    for batch in batches:
        if device.is_direct and _is_plain(batch):
            _read_direct(batch, source, runs_of, None)
            continue
        if ring is not None and stream is not None:
            _move_through(batch, ring, stream, source, device, runs_of, limits)
            continue
        with ExitStack() as held:
            staging = held.enter_context(closing(device.alloc_staging(batch.nbytes)))
            sources, loan = _bring(batch, Buffer(staging, batch.nbytes), source, device, limits)
            if loan is not None:
                held.callback(loan.release)
            stream = held.enter_context(closing(device.open_stream()))  # ends first: it may copy from the others
            queue_moves(stream, _moves_of(batch, sources, runs_of)).wait(limits.step_timeout_s)


def _move_through(
    batch: Batch, ring: Ring, stream: Stream, source: Source, device: Device, runs_of: RunsOf, limits: Limits
) -> None:
    buffer = ring.take()
    assert buffer is not None
    loan = None
    try:
        sources, loan = _bring(batch, buffer, source, device, limits)
        queue_moves(stream, _moves_of(batch, sources, runs_of)).wait(limits.step_timeout_s)
    finally:
        if loan is not None:
            loan.release()
        ring.put(buffer)


def _moves_of(batch: Batch, sources: Runs, runs_of: RunsOf) -> list[Move]:
    """The copies of a batch that stands at `sources`. What lies side by side at both ends is one copy, but none
    crosses two sources, which may be page-locked each by itself."""
    moves: list[Move] = []
    ends = list(accumulate(nbytes for _, nbytes in sources))
    edges = {address for address, _ in sources}
    dst_after = src_after = 0  # where the last copy ends, if it is one run
    for piece in batch.pieces:
        runs = runs_of(piece)
        nbytes, offset = piece.row_bytes, piece.start - batch.start
        at = bisect_right(ends, offset)
        room = ends[at] - offset if at < len(ends) else 0
        if piece.rows_count == 1 and len(runs) == 1 and nbytes <= room:  # nearly all; no cursors for those
            address, own_bytes = sources[at]
            own: Iterable[Move] = (Move(runs[0][0], address + own_bytes - room, nbytes, 1, nbytes),)
        else:
            own = plan_moves(piece, offset, sources, runs)
        for move in own:
            dst, src, nbytes, rows_count, _ = move
            if rows_count > 1:
                dst_after = src_after = 0
            elif dst == dst_after and src == src_after and src not in edges:
                nbytes += moves[-1].row_bytes
                moves[-1] = Move(moves[-1].dst, moves[-1].src, nbytes, 1, nbytes)
                dst_after, src_after = dst + move.row_bytes, src + move.row_bytes
                continue
            else:
                dst_after, src_after = dst + nbytes, src + nbytes
            moves.append(move)
    return moves


def queue_moves(stream: Stream, moves: Sequence[Move]) -> Event:
    """Queue copies; the event says when their sources may be used otherwise again."""
    stream.copy_all([(m.dst, m.src, m.row_bytes) for m in moves if m.rows_count == 1])
    for m in moves:
        if m.rows_count > 1:
            stream.copy_in_rows(m.dst, m.src, row_bytes=m.row_bytes, rows_count=m.rows_count, pitch_bytes=m.pitch_bytes)
    return stream.record()


def _bring(batch: Batch, buffer: Buffer, source: Source, device: Device, limits: Limits) -> tuple[Runs, Loan | None]:
    """Have a batch where `device` can copy from: in place, on a loan that is now the caller's, or in the buffer."""
    loan = source.borrow(batch.shard, batch.start, batch.stop)
    try:
        if loan is not None and all(device.reaches(address, nbytes) for address, nbytes in loan.runs):
            kept, loan = loan, None
            return kept.runs, kept
        buffer.settle(limits.step_timeout_s)
        view = buffer.staging.view[: batch.nbytes]
        if loan is not None:
            copy_out(loan.runs, [view])
        else:
            source.read_into(batch.shard, batch.start, [view])
        buffer.staging.lock(batch.nbytes)
    finally:
        if loan is not None:
            loan.release()
    return [(buffer.staging.address, batch.nbytes)], None


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


class _Copies(NamedTuple):
    """Of one batch, queued."""

    number: int
    """In the order of the stream."""
    event: Event
    batch: Batch
    loan: Loan | None


class _Ways:
    """Between the threads of one load: batches on their way to readers, queued copies on their way to the lander."""

    def __init__(
        self, batches: Sequence[Batch], packing: Packing | None, ring: Ring, *, is_fed: bool, copies_most: int
    ) -> None:
        """batches: the first ones, and after them what readers take from `packing`. is_fed: that is all; else `add`
        brings more and `end_feeding` says when that was all."""
        self.queueing = threading.Lock()
        """A stream belongs to one thread at a time."""
        self._ring = ring
        self._changed = threading.Condition()
        self._packing, self._planning = packing, threading.Lock()
        self._batches = deque(batches)
        self._is_fed = is_fed
        self._copies: deque[_Copies] = deque()
        self._copies_most = copies_most
        self._is_read = self._is_stopped = False
        self._numbers = count()

    def next_number(self) -> int:
        """Of copies that are queued now; `queueing` is the caller's."""
        return next(self._numbers)

    def add(self, batch: Batch) -> None:
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()

    def end_feeding(self) -> None:
        with self._changed:
            self._is_fed = True
            self._changed.notify_all()

    def next_batch(self, most_bytes: int) -> Batch | None:
        """Blocks; None when there are no more, or the load ends. most_bytes: of one that is still to be packed."""
        if self._packing is not None and not self._batches:
            with self._planning:
                return self._packing.take(most_bytes) if not self._is_stopped else None
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._is_fed or self._is_stopped)
            return self._batches.popleft() if self._batches and not self._is_stopped else None

    def add_copies(self, copies: _Copies) -> bool:
        """Blocks while the lander has too many; whether the load goes on."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._copies) < self._copies_most or self._is_stopped)
            self._copies.append(copies)
            self._changed.notify_all()
            return not self._is_stopped

    def is_read(self) -> None:
        with self._changed:
            self._is_read = True
            self._changed.notify_all()

    def next_copies(self) -> _Copies | None:
        """Blocks; None after the last, or when the load ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._copies or self._is_read or self._is_stopped)
            if self._is_stopped or not self._copies:
                return None
            copies = self._copies.popleft()
            self._changed.notify_all()
            return copies

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def stop(self) -> None:
        """The load ends early."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._ring.stop()


@asynccontextmanager
async def _at_rest(ring: Ring, *, is_lent: bool) -> AsyncIterator[None]:
    """Afterwards no stream copies from the ring any more: it is given back, or ready for the next load."""
    try:
        yield
    finally:
        if is_lent:
            ring.rest()  # a failed copy must not fail the next load
        else:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(ring.close)


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
    """Counts the pieces of each transfer that are still on their way. Thread-safe."""

    def __init__(self, batches: Iterable[Batch], on_landed: Callable[[int], None] | None) -> None:
        self._on_landed = on_landed
        self._lock = threading.Lock()
        self._waiting: dict[int, int] = {}
        if on_landed is not None:
            for batch in batches:
                for piece in batch.pieces:
                    self._waiting[piece.transfer] = self._waiting.get(piece.transfer, 0) + 1

    def add(self, batch: Batch) -> None:
        if self._on_landed is None:
            return
        with self._lock:
            for piece in batch.pieces:
                self._waiting[piece.transfer] -= 1
                if not self._waiting[piece.transfer]:
                    self._on_landed(piece.transfer)


def buffers_bytes(limits: Limits, wanted_bytes: int) -> int:
    """Host memory a staged load of `wanted_bytes` takes for its ring."""
    return min(limits.buffers_count, math.ceil(wanted_bytes / limits.buffer_bytes)) * limits.buffer_bytes

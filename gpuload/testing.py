"""For tests only: a suite that every device passes, faults on demand, files to load, and a server in a thread."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import trio
import trio.testing
from safetensors.torch import save_file

from gpuload.client.tensors import TORCH_DTYPES
from gpuload.device.base import Arena, Device, Event, Holder, Memory, Run, Staging, Stream
from gpuload.device.base import Mapping as DeviceMapping
from gpuload.device.host import HostDevice
from gpuload.errors import DeviceError, FitError, first_error
from gpuload.moving.source import Loan, Source
from gpuload.server.daemon import ServerConfig, serve
from gpuload.server.site import Site
from mfs.control.borrowing import LentFile
from mfs.errors import StoreError

T = TypeVar("T")


def ramp(nbytes: int, start: int = 0) -> bytes:
    """Byte i is i mod 251, counted from `start`: whoever is off by anything but 251 sees it."""
    return bytes((start + i) % 251 for i in range(nbytes))


def random_tensors(seed: int, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16") -> dict[str, torch.Tensor]:
    """Tensors of random bytes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        flat = torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype])
        flat.flatten().view(torch.uint8).random_(0, 256, generator=generator)
        made[name] = flat
    return made


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, whatever its type."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """Same names, types, shapes and bits."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(got[name]) == bits(tensor), name


def write(path: Path, made: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(made), path, metadata={"format": "pt"})
    return path


class DeviceSuite:
    """What any device must do; subclass it with a `device` fixture. Checks go around the stream under test."""

    @pytest.fixture
    def device(self) -> Device:
        raise NotImplementedError

    def test_copies_arrive_in_order(self, device: Device) -> None:
        arena, staging, stream = self._arena(device, 6), device.alloc_staging(8192), device.open_stream()
        staging.view[:] = ramp(8192)
        stream.copy_in(arena.address + 100, staging.address, 8192)
        stream.copy_within(arena.address + 3 * device.granule_bytes, arena.address + 100, 5000)
        stream.record().wait(30)
        assert device.read_back(arena.address + 100, 8192) == ramp(8192)
        assert device.read_back(arena.address + 3 * device.granule_bytes, 5000) == ramp(5000)
        self._close(stream, staging, arena)

    def test_what_is_copied_out_comes_back(self, device: Device) -> None:
        unit, size = device.granule_bytes, 3 * mmap.PAGESIZE
        arena, staging, stream = self._arena(device, 2), device.alloc_staging(size), device.open_stream()
        assert device.reaches(staging.address, size)
        staging.view[:] = ramp(size)
        stream.copy_in(arena.address, staging.address, mmap.PAGESIZE)
        stream.copy_out(staging.address + mmap.PAGESIZE, arena.address, mmap.PAGESIZE)
        stream.copy_in(arena.address + unit, staging.address + mmap.PAGESIZE, mmap.PAGESIZE)
        stream.record().wait(30)
        assert bytes(staging.view[: 2 * mmap.PAGESIZE]) == 2 * ramp(mmap.PAGESIZE)
        assert device.read_back(arena.address + unit, mmap.PAGESIZE) == ramp(mmap.PAGESIZE)
        self._close(stream, staging, arena)

    def test_rows_are_packed(self, device: Device) -> None:
        arena, staging, stream = self._arena(device, 1), device.alloc_staging(8192), device.open_stream()
        staging.view[:] = ramp(8192)
        stream.copy_in_rows(arena.address, staging.address + 3, row_bytes=17, rows_count=40, pitch_bytes=200)
        stream.record().wait(30)
        assert device.read_back(arena.address, 680) == b"".join(ramp(17, 3 + 200 * r) for r in range(40))
        self._close(stream, staging, arena)

    def test_close_finishes_what_is_queued(self, device: Device) -> None:
        arena, staging, stream = self._arena(device, 1), device.alloc_staging(4096), device.open_stream()
        staging.view[:] = ramp(4096)
        for at in range(0, 4096, 64):
            stream.copy_in(arena.address + at, staging.address + at, 64)
        stream.close()
        stream.close()
        assert device.read_back(arena.address, 4096) == ramp(4096)
        self._close(stream, staging, arena)

    def _numbered(self, device: Device) -> tuple[Arena, Staging, Stream]:
        """An arena whose five granules begin with their numbers."""
        arena, staging, stream = self._arena(device, 5), device.alloc_staging(16), device.open_stream()
        for granule in range(5):
            staging.view[:] = bytes([granule]) * 16
            stream.copy_in(arena.address + granule * device.granule_bytes, staging.address, 16)
            stream.record().wait(30)
        return arena, staging, stream

    def test_granules_are_mapped_in_the_order_asked(self, device: Device) -> None:
        unit = device.granule_bytes
        arena, staging, stream = self._numbered(device)
        runs: list[Run] = [(3, 1), (4, 1), (0, 1)]
        fds = arena.export(runs)
        mapping = device.attach(fds, runs)
        assert mapping.nbytes == 3 * unit
        for place, granule in enumerate((3, 4, 0)):
            assert device.read_back(mapping.address + place * unit, 16) == bytes([granule]) * 16
        mapping.close()
        trio_close(fds)
        self._close(stream, staging, arena)

    def test_other_granules_take_the_same_addresses(self, device: Device) -> None:
        unit = device.granule_bytes
        arena, staging, stream = self._numbered(device)

        def shown(address: int) -> list[int]:
            return [device.read_back(address + place * unit, 1)[0] for place in range(3)]

        runs: list[Run] = [(0, 1), (1, 1), (2, 1)]
        fds = arena.export(runs)
        mapping = device.attach(fds, runs)
        trio_close(fds)
        fds = arena.export([(3, 1), (1, 1), (4, 1)])
        runs = [(3, 1), (1, 1), (4, 1)]
        for is_same in (True, False):
            change = mapping.prepare(fds, runs, is_same=is_same)
            assert shown(mapping.address) == [0, 1, 2]
            change.exchange()
            assert shown(mapping.address) == [3, 1, 4]
            if is_same:
                change.exchange()
                assert shown(mapping.address) == [0, 1, 2]
            change.close()
            change.close()
        with pytest.raises(ValueError, match="3 granules that are shown"):
            mapping.prepare(fds[:2], runs[:2] if len(fds) > 1 else [(3, 2)], is_same=True)
        assert not mapping.is_hidden
        mapping.close()
        trio_close(fds)
        self._close(stream, staging, arena)

    def test_memory_of_others_is_copied_from_in_place(self, device: Device) -> None:
        """As the files of a mount come: a file in memory, mapped without the right to write, taken in two pieces."""
        size = 4 * mmap.PAGESIZE
        fd = os.memfd_create("gpuload-test")
        os.ftruncate(fd, size)
        os.pwrite(fd, ramp(size), 0)
        lent = LentFile(fd, size)
        os.close(fd)
        base = lent.address
        for piece in (base, base + size // 2, base):
            device.register(piece, size // 2)
        assert device.reaches(base, size // 2)
        assert device.reaches(base + size // 2 + 5, 100)
        arena, stream = self._arena(device, 2), device.open_stream()
        stream.copy_in(arena.address, base + 3, 5000)
        stream.copy_in_rows(arena.address + 5000, base + size // 2, row_bytes=17, rows_count=40, pitch_bytes=200)
        stream.record().wait(30)
        assert device.read_back(arena.address, 5000) == ramp(5000, 3)
        assert device.read_back(arena.address + 5000, 680) == b"".join(ramp(17, size // 2 + 200 * r) for r in range(40))
        device.unregister(base)
        assert device.reaches(base, size // 2), "it was registered twice"
        device.unregister(base)
        device.unregister(base + size // 2)
        stream.close()
        arena.close()
        lent.close()

    def test_an_arena_outlives_who_made_it(self, device: Device) -> None:
        """Its bytes are there for whoever has copies of its descriptors, who can write and hand out as its maker."""
        unit = device.granule_bytes
        arena, staging, stream = self._arena(device, 3), device.alloc_staging(4096), device.open_stream()
        staging.view[:] = ramp(4096)
        stream.copy_in(arena.address + unit, staging.address, 4096)
        stream.record().wait(30)
        copies = [os.dup(fd) for fd in arena.descriptors([(1, 1)])]
        shared = arena.shared()
        shared = None if shared is None else os.dup(shared)
        arena.close()
        before = len(os.listdir("/proc/self/fd"))
        heir = device.reserve_arena(3 * unit, shared)
        heir.adopt([(1, 1)], copies)
        heir.release([(0, 1), (2, 1)])
        heir.commit([(2, 1)])
        assert (heir.granules_count, heir.granule_bytes) == (3, unit)
        assert device.read_back(heir.address + unit, 4096) == ramp(4096)
        stream.copy_within(heir.address + 2 * unit, heir.address + unit, 4096)
        stream.record().wait(30)
        fds = heir.export([(2, 1), (1, 1)])
        mapping = device.attach(fds, [(2, 1), (1, 1)])
        trio_close(fds)
        assert device.read_back(mapping.address, 4096) == device.read_back(mapping.address + unit, 4096) == ramp(4096)
        heir.close()
        assert device.read_back(mapping.address, 4096) == ramp(4096), "who has it mapped keeps it"
        mapping.close()
        assert len(os.listdir("/proc/self/fd")) < before, "the copies are the heir's, and closed by it"
        stream.close()
        staging.close()

    def test_an_arena_larger_than_the_device_is_refused(self, device: Device) -> None:
        with pytest.raises(FitError) as caught:
            device.create_arena(device.memory().total_bytes * 2)
        assert caught.value.shortfall_bytes > 0

    def test_memory_comes_and_goes(self, device: Device) -> None:
        unit = device.granule_bytes
        arena, staging, stream = device.reserve_arena(8 * unit), device.alloc_staging(16), device.open_stream()
        staging.view[:] = ramp(16)
        for _ in range(3):
            arena.commit([(1, 1), (2, 1), (6, 1)])
            for granule in (1, 2, 6):
                stream.copy_in(arena.address + granule * unit, staging.address, 16)
            stream.record().wait(30)
            arena.release([(2, 1)])
            fds = arena.export([(6, 1), (1, 1)])
            mapping = device.attach(fds, [(6, 1), (1, 1)])
            assert device.read_back(mapping.address, 16) == device.read_back(mapping.address + unit, 16) == ramp(16)
            mapping.close()
            trio_close(fds)
            arena.release([(1, 1), (6, 1)])
        with pytest.raises(FitError) as caught:
            device.reserve_arena(device.memory().total_bytes * 2).commit([(0, device.memory().total_bytes * 2 // unit)])
        assert caught.value.shortfall_bytes > 0
        self._close(stream, staging, arena)

    def test_memory_is_told(self, device: Device) -> None:
        memory = device.memory()
        assert 0 < memory.free_bytes <= memory.total_bytes

    def test_a_run_is_handed_out_as_one(self, device: Device) -> None:
        """Pieces of several granules, mapped side by side in any order, and others in their place that are cut
        elsewhere."""
        unit = device.granule_bytes
        arena, staging, stream = device.reserve_arena(9 * unit), device.alloc_staging(16), device.open_stream()
        runs: list[Run] = [(0, 3), (4, 1), (5, 2), (7, 1)]
        arena.commit(runs)
        for granule in (0, 1, 2, 4, 5, 6, 7):
            staging.view[:] = bytes([granule]) * 16
            stream.copy_in(arena.address + granule * unit, staging.address, 16)
            stream.record().wait(30)

        def shown(address: int) -> list[int]:
            return [device.read_back(address + place * unit, 1)[0] for place in range(4)]

        fds = arena.export(runs[:2])
        assert len(fds) == (2 if arena.has_pieces else 1)
        mapping = device.attach(fds, runs[:2])
        trio_close(fds)
        assert shown(mapping.address) == [0, 1, 2, 4]
        others: list[Run] = [(7, 1), (5, 2), (4, 1)]
        fds = arena.export(others)
        change = mapping.prepare(fds, others, is_same=True)
        for expected in ([7, 5, 6, 4], [0, 1, 2, 4], [7, 5, 6, 4]):
            change.exchange()
            assert shown(mapping.address) == expected
        change.close()
        trio_close(fds)
        mapping.close()
        arena.release(runs)
        self._close(stream, staging, arena)

    def _arena(self, device: Device, granules: int) -> Arena:
        arena = device.reserve_arena(granules * device.granule_bytes)
        arena.commit([(granule, 1) for granule in range(granules)])
        return arena

    def _close(self, stream: Stream, staging: Staging, arena: Arena) -> None:
        stream.close()
        staging.close()
        arena.close()


def trio_close(fds: Sequence[int]) -> None:
    from gpuload.wire import close_all

    close_all(fds)


class Gate:
    """Lets the first `passes` callers through, then runs `then` for each: raise, or block until `opened`."""

    def __init__(self, passes: int, *, blocks: bool = False) -> None:
        self._passes, self._blocks, self._lock = passes, blocks, threading.Lock()
        self.reached = threading.Event()
        self.opened = threading.Event()

    def pass_or(self, error: Exception) -> None:
        with self._lock:
            self._passes -= 1
            if self._passes >= 0:
                return
        self.reached.set()
        if not self._blocks:
            raise error
        assert self.opened.wait(60)


class FaultySource:
    """A source around a source, with a gate in front of every read."""

    def __init__(self, inner: Source, gate: Gate) -> None:
        self._inner, self._gate = inner, gate

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        return None

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        self._gate.pass_or(StoreError("the source failed, as asked"))
        self._inner.read_into(shard, start, views)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def close(self) -> None:
        self._inner.close()


class LendingSource:
    """A source around a source that lends out of memory of its own: in two runs where there are two bytes or more, with
    a hole between them. `gate`, if any, stands in front of every loan."""

    def __init__(self, inner: Source, gate: Gate | None = None) -> None:
        self._inner, self._gate = inner, gate
        self._lock = threading.Lock()
        self.loans_count = 0
        self.loans_most = 0

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        if self._gate is not None:
            self._gate.pass_or(StoreError("the source failed, as asked"))
        nbytes, cut = stop - start, (stop - start) // 3
        memory = bytearray(nbytes + 64)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        views = [memoryview(memory)[:cut], memoryview(memory)[cut + 64 :]]
        self._inner.read_into(shard, start, views)
        with self._lock:
            self.loans_count += 1
            self.loans_most = max(self.loans_most, self.loans_count)
        runs = [(base, cut), (base + cut + 64, nbytes - cut)]
        return _CountedLoan(self, memory, [run for run in runs if run[1]])

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        self._inner.read_into(shard, start, views)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def close(self) -> None:
        self._inner.close()


class _CountedLoan:
    def __init__(self, source: LendingSource, memory: bytearray, runs: list[tuple[int, int]]) -> None:
        self._source, self._memory, self.runs = source, memory, runs
        self._is_held = True

    def release(self) -> None:
        with self._source._lock:
            if self._is_held:
                self._source.loans_count -= 1
                self._memory[:] = b"\xee" * len(self._memory)  # whoever still copies from here copies that
            self._is_held = False


class FaultyDevice:
    """A device around a device, with a gate in front of every copy; never direct, so that every byte is copied."""

    is_direct = False

    def __init__(self, inner: Device, gate: Gate) -> None:
        self._inner, self._gate = inner, gate
        self.name, self.granule_bytes = inner.name, inner.granule_bytes
        self.identity, self.exports_read_only = inner.identity, inner.exports_read_only
        self.node = inner.node
        self.staging_count = 0

    def memory(self) -> Memory:
        return self._inner.memory()

    def open_stream(self) -> Stream:
        return _GatedStream(self._inner.open_stream(), self._gate)

    def alloc_staging(self, nbytes: int, *, is_locked: bool = True) -> Staging:
        self.staging_count += 1
        return _CountedStaging(self._inner.alloc_staging(nbytes, is_locked=is_locked), self)

    def reserve_arena(self, nbytes: int, shared: int | None = None) -> Arena:
        return self._inner.reserve_arena(nbytes, shared)

    def create_arena(self, nbytes: int) -> Arena:
        return self._inner.create_arena(nbytes)

    def holders(self) -> Sequence[Holder]:
        return self._inner.holders()

    def attach(self, fds: Sequence[int], runs: Sequence[Run]) -> DeviceMapping:
        return self._inner.attach(fds, runs)

    def register(self, address: int, nbytes: int) -> None:
        self._inner.register(address, nbytes)

    def unregister(self, address: int) -> None:
        self._inner.unregister(address)

    def reaches(self, address: int, nbytes: int) -> bool:
        return self._inner.reaches(address, nbytes)

    def read_back(self, address: int, nbytes: int) -> bytes:
        return self._inner.read_back(address, nbytes)

    def close(self) -> None:
        self._inner.close()


class _CountedStaging:
    def __init__(self, inner: Staging, device: FaultyDevice) -> None:
        self._inner, self._device = inner, device
        self.address, self.view, self.lock = inner.address, inner.view, inner.lock

    def close(self) -> None:
        self._device.staging_count -= 1
        self._inner.close()


class _GatedStream:
    """The gate stands in the stream's own thread for the host: a copy function that raises fails its stream."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        self._inner, self._gate = inner, gate

    def copy_in(self, dst: int, src: int, nbytes: int) -> None:
        def copy() -> None:
            self._gate.pass_or(DeviceError("the device failed, as asked"))
            ctypes.memmove(dst, src, nbytes)

        self._inner._queue.put(copy)

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        for copy in copies:
            self.copy_in(*copy)

    def copy_in_rows(self, dst: int, src: int, *, row_bytes: int, rows_count: int, pitch_bytes: int) -> None:
        self._inner.copy_in_rows(dst, src, row_bytes=row_bytes, rows_count=rows_count, pitch_bytes=pitch_bytes)

    def copy_out(self, dst: int, src: int, nbytes: int) -> None:
        self.copy_in(dst, src, nbytes)

    def copy_within(self, dst: int, src: int, nbytes: int) -> None:
        self.copy_in(dst, src, nbytes)

    def record(self) -> Event:
        event: Event = self._inner.record()
        return event

    def close(self) -> None:
        self._inner.close()


class ServerThread:
    """A server at work in a thread of this process."""

    def __init__(self, sites: Mapping[str, Site], token: trio.lowlevel.TrioToken, socket_path: str) -> None:
        self.sites, self.socket_path = sites, socket_path
        self.ended = threading.Event()
        self._token = token

    def on_loop(self, work: Callable[[], T]) -> T:
        """Run `work` on the server's trio thread."""
        return trio.from_thread.run_sync(work, trio_token=self._token)

    def settle(self) -> None:
        """Return when the server has nothing left to do: connections that we closed are closed there too."""
        trio.from_thread.run(trio.testing.wait_all_tasks_blocked, 0.01, trio_token=self._token)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether it comes true in time: what a cancelled load ends in a thread, the loop knows nothing of."""
        until = time.monotonic() + 30
        while not condition():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def gauges(self, device: str = "cpu") -> dict[str, int]:
        self.settle()
        return self.on_loop(self.sites[device].catalog.gauges)


@contextmanager
def running_server(config: ServerConfig, open_one: Callable[[str], Device] | None = None) -> Iterator[ServerThread]:
    """A server in a thread; stopped, and its thread joined, at the end."""
    started: list[ServerThread] = []
    ready = threading.Event()
    errors: list[BaseException] = []
    scope = trio.CancelScope()

    async def main() -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                sites = await nursery.start(serve, config, open_one or (lambda _: HostDevice()))
                started.append(ServerThread(sites, trio.lowlevel.current_trio_token(), config.socket_path))
                ready.set()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            errors.append(first_error(error))
        finally:
            ready.set()
            for one in started:
                one.ended.set()

    thread = threading.Thread(target=run, name="gpuload-test-server")
    thread.start()
    ready.wait()
    try:
        if errors:
            raise errors[0]
        yield started[0]
    finally:
        if started:
            with suppress(trio.RunFinishedError):  # it ended by itself, with an error
                trio.from_thread.run_sync(scope.cancel, trio_token=started[0]._token)
        thread.join()
    if errors:
        raise errors[0]

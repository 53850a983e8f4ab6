"""The pool path against the file path, on a real mount: the same bits, leases given back, versions not mixed."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file

import gpuload
import gpuload.client.attached
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach
from gpuload.device.base import Event, Stream
from gpuload.device.host import HostDevice, view_of
from gpuload.errors import DeviceError
from gpuload.moving import kept as kept_module
from gpuload.moving.kept import KeptFiles
from gpuload.moving.pipeline import Limits, move_batches
from gpuload.moving.plan import Placement, plan_batches, plan_transfers
from gpuload.moving.pool import Mapper, Place, PoolSource, open_source
from gpuload.moving.shards import Shard, close_shards, open_shards
from gpuload.moving.source import FileSource
from gpuload.server.catalog import Catalog
from gpuload.server.daemon import ServerConfig
from gpuload.testing import FaultyDevice, Gate, assert_same, running_server
from mfs.control import borrowing
from mfs.control.borrowing import Borrower, LentFile, Opened
from mfs.control.lending_door import CONNECTIONS_MAX
from mfs.errors import ChangedError, NotFoundError, StoreError, TransientStoreError, UsageError
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.types import CHUNK_BYTES

_RAMP_BYTES = 3 * CHUNK_BYTES + 7


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestMount]:
    folder = tmp_path / "registry" / "model"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors = {f"layer.{i}": torch.randn(512, 700 + i) for i in range(12)} | {"half": torch.randn(33).bfloat16()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "ramp.bin").write_bytes(ramp(_RAMP_BYTES))
    with TestMount(tmp_path / "m", str(folder.parent)) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        yield mount


def door(mount: TestMount) -> Borrower:
    found = borrowing.find(str(mount.path / "model" / "ramp.bin"))
    assert found is not None
    assert found[1] == "model/ramp.bin"
    return Borrower(found[0])


def test_a_mounted_file_loads_out_of_ram_and_is_the_same(mount: TestMount, tmp_path: Path) -> None:
    file = mount.path / "model" / "model.safetensors"
    shards = open_shards([file])
    try:
        source = open_source(shards)
        assert isinstance(source, PoolSource)
        source.close()
    finally:
        close_shards(shards)
    loaded = gpuload.load_file(file)
    expected = reference_load_file(tmp_path / "registry" / "model" / "model.safetensors")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor)


def test_a_file_elsewhere_is_read_as_a_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    shards = open_shards([tmp_path / "a.safetensors"])
    try:
        assert isinstance(open_source(shards), FileSource)
    finally:
        close_shards(shards)


def test_every_range_is_exact(mount: TestMount) -> None:
    reader = door(mount)
    file = reader.open("model/ramp.bin")
    size = file.file.size
    assert size == _RAMP_BYTES
    edges = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 99, size - 1, size)
    for start in edges:
        for stop in (e for e in edges if start <= e <= start + reader.lease_bytes_max):
            with reader.lease(file, start, stop) as view:
                assert view == ramp(stop - start, start)
                assert file.file.view[start:stop] == view, "it stands at its own offset"
    reader.close()


def test_what_is_lent_cannot_be_written_by_a_borrower(mount: TestMount) -> None:
    reader = door(mount)
    with reader.lease(reader.open("model/ramp.bin"), 0, 10) as view, pytest.raises(TypeError):
        view[0] = 1
    reader.close()


def test_a_borrower_that_vanishes_gives_its_leases_back(mount: TestMount) -> None:
    reader = door(mount)
    file = reader.open("model/ramp.bin")
    reader._ask({"file": file.number, "start": 0, "stop": CHUNK_BYTES})
    assert mount.client.status()["ram"]["slots_leased"] == 1
    reader.close()
    assert mount.wait_for(lambda: mount.client.status()["ram"]["slots_leased"] == 0)


def test_what_cannot_be_asked_is_refused_and_the_door_stays_open(mount: TestMount) -> None:
    reader = door(mount)
    with pytest.raises(NotFoundError):
        reader.open("model/nothing")
    with pytest.raises(ChangedError):
        reader.open("model/ramp.bin", inode=os.stat("/").st_ino + 123456)
    file = reader.open("model/ramp.bin")
    size = file.file.size
    for start, stop in ((5, 4), (0, size + 1), (-1, 3)):
        with pytest.raises(UsageError), reader.lease(file, start, stop):
            pass
    for nonsense in (b"[]", b"{", b'{"lease": 1}', b'{"release": 99}', b"[" * 60_000):
        reader._socket.send(nonsense)
        with pytest.raises(UsageError):
            borrowing._checked(reader._socket.recv(1 << 16))
    with reader.lease(file, 0, 4) as view:
        assert view == ramp(4)
    reader.close()


def test_the_daemon_dies_under_a_load(mount: TestMount) -> None:
    reader = door(mount)
    file = reader.open("model/ramp.bin")
    held = reader.borrow(file, 0, 100)
    mount.kill()
    with pytest.raises(StoreError), reader.lease(file, 0, 4):
        pass
    assert held.view == ramp(100), "what was lent stays what it is: the mapping keeps the file"
    held.release()
    held.release()
    reader.close()


# -- copied from in place


@pytest.fixture
def shards(mount: TestMount) -> Iterator[list[Shard]]:
    opened = open_shards([mount.path / "model" / "model.safetensors"])
    yield opened
    close_shards(opened)


def leased(mount: TestMount) -> int:
    count: int = mount.client.status()["ram"]["slots_leased"]
    return count


class WatchedDevice(HostDevice):
    """A host device that behaves as a GPU does, and notes where every copy came from."""

    def __init__(self, refusal: str = "") -> None:
        super().__init__(is_direct=False)
        self.sources: list[tuple[int, int]] = []
        self._refusal = refusal

    def open_stream(self) -> Stream:  # type: ignore[override]
        return _WatchedStream(super().open_stream(), self.sources)

    def register(self, address: int, nbytes: int) -> None:
        if self._refusal:
            raise DeviceError(self._refusal)
        super().register(address, nbytes)


class _WatchedStream:
    def __init__(self, inner: Stream, sources: list[tuple[int, int]]) -> None:
        self._inner, self._sources = inner, sources

    def copy_in(self, dst: int, src: int, nbytes: int) -> None:
        self._sources.append((src, nbytes))
        self._inner.copy_in(dst, src, nbytes)

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        for copy in copies:
            self.copy_in(*copy)

    def copy_in_rows(self, dst: int, src: int, *, row_bytes: int, rows_count: int, pitch_bytes: int) -> None:
        self._sources.append((src, row_bytes * rows_count))
        self._inner.copy_in_rows(dst, src, row_bytes=row_bytes, rows_count=rows_count, pitch_bytes=pitch_bytes)

    def copy_within(self, dst: int, src: int, nbytes: int) -> None:
        raise AssertionError

    def record(self) -> Event:
        return self._inner.record()

    def close(self) -> None:
        self._inner.close()


class Watching(KeptFiles):
    """Remembers the mapping, to tell its addresses from staging's, and what was said when a piece was touched."""

    def __init__(self, devices: Sequence[HostDevice]) -> None:
        super().__init__(devices)
        self.found: dict[int, set[bool]] = {}

    def map(self, fd: int, size: int, place: Place) -> LentFile:
        self.file = super().map(fd, size, place)
        return self.file

    def touched(self, file: LentFile, start: int, stop: int, slots: Sequence[int]) -> bool:
        is_current = super().touched(file, start, stop, slots)
        for piece in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            self.found.setdefault(piece, set()).add(is_current)
        return is_current

    def shares(self, sources: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(bytes copied out of the mount's RAM, bytes copied from elsewhere)"""
        first, last = self.file.address, self.file.address + self.file.size
        inside = sum(n for at, n in sources if first <= at < last)
        return inside, sum(n for _, n in sources) - inside


def load(shards: list[Shard], device: HostDevice | FaultyDevice, mapper: Mapper, world: int = 1) -> bytes:
    """Everything (of rank 1, cut by columns, of `world`), one tensor after the other, over `mapper`'s files."""
    placement = Placement(rank=1 if world > 1 else 0, world=world, rules={"layer.*": 1})
    transfers = [t for t in plan_transfers([s.header for s in shards], placement) if world == 1 or t.name != "half"]
    starts = [sum(t.nbytes for t in transfers[:i]) for i in range(len(transfers))]
    memory = bytearray(sum(t.nbytes for t in transfers))
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    async def main() -> None:
        with closing(open_source(shards, mapper)) as source:
            assert isinstance(source, PoolSource)
            await move_batches(
                plan_batches(transfers, buffer_bytes=1 << 20),
                source=source,
                device=device,
                runs_of=lambda p: [(base + starts[p.transfer] + p.offset, p.nbytes)],
                limits=Limits(1 << 20, 3, 3, 30),
            )

    trio.run(main)
    return bytes(memory)


def test_a_process_that_stays_copies_out_of_ram_once_it_is_locked(mount: TestMount, shards: list[Shard]) -> None:
    """The first load goes by staging, for nobody waits for page-locking; the next ones by no CPU copy at all."""
    device = WatchedDevice()
    want = Path(shards[0].path).read_bytes()[shards[0].header.data_start :]
    with ExitStack() as stack:
        kept = Watching([device])
        stack.callback(kept.close)
        assert load(shards, device, kept) == want
        kept.wait_idle()
        assert kept.locked_bytes > len(want)
        device.sources.clear()
        assert load(shards, device, kept) == want
        assert kept.shares(device.sources) == (len(want), 0)
        device.sources.clear()
        assert kept.mapped_count == 1
        assert leased(mount) == 0
    assert not device._registered._starts, "something stays page-locked"


def evicted(mount: TestMount, path: str) -> bool:
    """Evict a file from RAM; False while some of it is still being written to SSD."""
    mount.client.evict([path], "ram")
    return bool(mount.client.stat(path)["ram_bytes"] == 0)


@pytest.mark.parametrize("watches", [True, False])
def test_what_the_mount_has_dropped_is_not_copied_from_where_it_was_locked(
    mount: TestMount, shards: list[Shard], monkeypatch: pytest.MonkeyPatch, watches: bool
) -> None:
    """Locked pages stay what they were when the daemon drops them and brings the same place back in other ones. Whether
    seen or, in between two looks, not: that is found by the number of the slot, copied by staging and locked anew.
    """
    monkeypatch.setattr(kept_module, "WATCH_S", 0.05 if watches else 3600)
    device = WatchedDevice()
    want = Path(shards[0].path).read_bytes()[shards[0].header.data_start :]
    with ExitStack() as stack:
        kept = Watching([device])
        stack.callback(kept.close)
        other = stack.enter_context(closing(door(mount)))
        opened = other.open("model/model.safetensors")  # else it would be another file afterwards
        assert load(shards, device, kept) == want
        kept.wait_idle()
        locked = kept.locked_bytes
        assert locked > len(want)
        assert mount.wait_for(lambda: evicted(mount, "model/model.safetensors"))
        if watches:
            assert mount.wait_for(lambda: kept.locked_bytes == 0), "dropped memory stays page-locked"
            assert mount.wait_for(lambda: kept.mounts()[0]["mapped_bytes"] == 0), "nobody needs the mapping"
        else:  # brought back by somebody else, the file does not tell
            for start in range(0, opened.file.size, CHUNK_BYTES):
                other.borrow(opened, start, min(start + CHUNK_BYTES, opened.file.size)).release()
            assert kept.locked_bytes == locked
        kept.found.clear()
        assert load(shards, device, kept) == want
        assert all((False in said) != watches for said in kept.found.values()), "old pages pass for the file's"
        kept.wait_idle()
        device.sources.clear()
        kept.found.clear()
        assert load(shards, device, kept) == want
        assert all(said == {True} for said in kept.found.values())
        assert kept.shares(device.sources) == (len(want), 0)
    assert not device._registered._starts


def test_columns_are_copied_out_of_ram_too(mount: TestMount, shards: list[Shard], tmp_path: Path) -> None:
    """A rank's columns, over the edges of pieces: the same bits as of the tensor, by strided copies in place."""
    wide = tmp_path / "registry" / "model" / "wide.safetensors"
    whole = torch.arange(1500 * 6000, dtype=torch.int32).reshape(1500, 6000)
    save_file({"layer.w": whole}, wide)
    mount.client.refresh()
    device = WatchedDevice()
    opened = open_shards([mount.path / "model" / "wide.safetensors"])
    kept = Watching([device])
    try:
        for _ in range(2):
            device.sources.clear()
            assert load(opened, device, kept, world=2) == whole[:, 3000:].contiguous().numpy().tobytes()
            kept.wait_idle()
        assert kept.shares(device.sources) == (whole.nbytes // 2, 0)
    finally:
        kept.close()
        close_shards(opened)


def test_a_driver_that_refuses_to_lock_costs_a_copy_and_nothing_else(mount: TestMount, shards: list[Shard]) -> None:
    device = WatchedDevice(refusal="cuMemHostRegister_v2 failed: CUDA_ERROR_NOT_SUPPORTED (801)")
    want = Path(shards[0].path).read_bytes()[shards[0].header.data_start :]
    kept = Watching([device])
    for _ in range(2):
        device.sources.clear()
        assert load(shards, device, kept) == want
        kept.wait_idle()
        assert kept.shares(device.sources) == (0, len(want))
    kept.close()
    assert leased(mount) == 0


@pytest.mark.parametrize("ending", ["cancel", "failure"])
def test_leases_end_after_the_copies_and_all_of_them(mount: TestMount, shards: list[Shard], ending: str) -> None:
    """A load that is cancelled, or whose device fails, with copies queued out of the mount's RAM."""
    gate = Gate(1, blocks=ending == "cancel")
    device = FaultyDevice(HostDevice(), gate)
    scope = trio.CancelScope()
    transfers = plan_transfers([s.header for s in shards], Placement())
    memory = HostDevice().alloc_staging(sum(t.nbytes for t in transfers))

    async def main() -> None:
        async def cancel() -> None:
            await trio.to_thread.run_sync(gate.reached.wait, 30)
            if ending == "cancel":
                assert await trio.to_thread.run_sync(leased, mount) > 0
                scope.cancel()
                gate.opened.set()

        with closing(open_source(shards)) as source:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel)
                with scope:
                    await move_batches(
                        plan_batches(transfers, buffer_bytes=1 << 20),
                        source=source,
                        device=device,
                        runs_of=lambda p: [(memory.address, p.nbytes)],
                        limits=Limits(1 << 20, 3, 3, 30),
                    )
            assert await trio.to_thread.run_sync(mount.wait_for, lambda: leased(mount) == 0), "while still connected"

    if ending == "failure":
        with pytest.raises(ExceptionGroup) as caught:
            trio.run(main)
        assert caught.group_contains(DeviceError, match="as asked")
    else:
        trio.run(main)
        assert scope.cancelled_caught
    memory.close()
    assert mount.wait_for(lambda: leased(mount) == 0)
    assert not [t for t in threading.enumerate() if t.name == "gpuload-host-stream"]


def test_the_daemon_dies_while_a_device_copies_out_of_its_ram(mount: TestMount, shards: list[Shard]) -> None:
    """One clear error, no hang, and what was copied was the file's."""
    gate = Gate(1, blocks=True)
    device = FaultyDevice(HostDevice(), gate)
    transfers = plan_transfers([s.header for s in shards], Placement())
    memory = HostDevice().alloc_staging(sum(t.nbytes for t in transfers))
    want = Path(shards[0].path).read_bytes()[shards[0].header.data_start :][: 1 << 20]

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.to_thread.run_sync(gate.reached.wait, 30)
                mount.kill(detach=False)
                gate.opened.set()

            nursery.start_soon(kill)
            with closing(open_source(shards)) as source:
                await move_batches(
                    plan_batches(transfers, buffer_bytes=1 << 20),
                    source=source,
                    device=device,
                    runs_of=lambda p: [(memory.address + (p.start - shards[0].header.data_start), p.nbytes)],
                    limits=Limits(1 << 20, 3, 1, 30),
                )

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    assert caught.group_contains(StoreError, match="the mount's daemon")
    assert bytes(view_of(memory.address, 1 << 20)) == want
    memory.close()
    mount.detach()


def test_files_of_a_daemon_that_ended_do_not_stay_in_memory(mount: TestMount, shards: list[Shard]) -> None:
    device = WatchedDevice()
    kept = KeptFiles([device])
    load(shards, device, kept)
    kept.wait_idle()
    assert (kept.mapped_count, kept.locked_bytes > 0) == (1, True)
    mount.stop(check=False)
    assert mount.wait_for(lambda: kept.mapped_count == 0)
    assert not device._registered._starts
    kept.close()


def test_a_device_that_fails_to_unlock_does_not_keep_a_dead_mount_in_memory(
    mount: TestMount, shards: list[Shard]
) -> None:
    class Failing(WatchedDevice):
        def unregister(self, address: int) -> None:
            raise DeviceError("the driver has gone")

    failing, sound = Failing(), WatchedDevice()
    kept = KeptFiles([failing, sound])
    load(shards, failing, kept)
    kept.wait_idle()
    [file] = [one.file for one in kept._kept[0]._files.values()]
    assert file.size
    kept.close()
    assert not sound._registered._starts
    assert not file.view


def test_a_borrower_that_is_killed_gives_its_leases_back(mount: TestMount) -> None:
    script = (
        "import sys; from mfs.control import borrowing as c; found = c.find(sys.argv[1]);"
        "reader = c.Borrower(found[0]); held = reader.borrow(reader.open(found[1]), 0, 9_000_000);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(mount.path / "model" / "ramp.bin")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as borrower:
        assert borrower.stdout is not None
        assert borrower.stdout.readline() == "held\n"
        assert leased(mount) == 3
        borrower.send_signal(signal.SIGKILL)
    assert mount.wait_for(lambda: leased(mount) == 0)


def test_borrowers_cannot_starve_the_readers_of_the_mount(mount: TestMount, tmp_path: Path) -> None:
    """All that is lent is held for good: everybody else reads the mount as before, far more than RAM holds."""
    big = tmp_path / "registry" / "model" / "big.bin"
    big.write_bytes(ramp(80 << 20))
    mount.client.refresh()
    lent_most = mount.client.status()["ram"]["slots_count"] // 4
    with ExitStack() as stack:
        for _ in range(lent_most):
            reader = stack.enter_context(closing(door(mount)))
            reader.borrow(reader.open("model/ramp.bin"), 0, 10)
        assert mount.call(_sha256, mount.path / "model" / "big.bin") == hashlib.sha256(big.read_bytes()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_loader_that_is_lent_nothing_reads_the_file(
    mount: TestMount, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Borrower, opened: Opened, start: int, stop: int) -> borrowing.Loan:
        raise TransientStoreError("others hold all the slots that are lent, for 10 s already")

    monkeypatch.setattr(Borrower, "borrow", refuse)
    want = Path(shards[0].path).read_bytes()[shards[0].header.data_start :]
    assert load(shards, HostDevice(), Mapper()) == want


def _hold_all(mount: TestMount, stack: ExitStack) -> Borrower:
    """A connection that holds all that is lent of the mount."""
    reader = stack.enter_context(closing(door(mount)))
    file = reader.open("model/ramp.bin")
    for _ in range(mount.client.status()["ram"]["slots_count"] // 4):
        stack.callback(reader.borrow(file, 0, 10).release)
    return reader


class _Asking(threading.Thread):
    """Borrows in a thread; `outcome` is the loan or the error."""

    def __init__(self, reader: Borrower, file: Opened) -> None:
        super().__init__()
        self._reader, self._file = reader, file
        self.outcome: borrowing.Loan | Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._reader.borrow(self._file, 0, 10)
        except Exception as error:
            self.outcome = error


def test_a_release_is_heard_while_the_same_connection_waits(mount: TestMount) -> None:
    """Else a loader with more readers than there are slots to lend would wait for itself."""
    with ExitStack() as stack:
        reader = stack.enter_context(closing(door(mount)))
        file = reader.open("model/ramp.bin")
        loans = [reader.borrow(file, 0, 10) for _ in range(mount.client.status()["ram"]["slots_count"] // 4)]
        asking = _Asking(reader, file)
        asking.join(0.2)
        assert asking.is_alive(), "more was lent than the share"
        loans.pop().release()
        asking.join(5)
        assert isinstance(asking.outcome, borrowing.Loan)


def test_a_question_can_be_stopped_and_the_connection_goes_on(mount: TestMount) -> None:
    with ExitStack() as stack:
        _hold_all(mount, stack)
        reader = stack.enter_context(closing(door(mount)))
        file = reader.open("model/ramp.bin")
        asking = _Asking(reader, file)
        while asking.is_alive():  # the stop may come before the question, which is then not there to be stopped
            reader.stop()
            asking.join(0.05)
        assert isinstance(asking.outcome, TransientStoreError)
        assert reader.open("model/ramp.bin").file.size == _RAMP_BYTES


def test_more_borrowers_than_the_door_takes_are_told_so(mount: TestMount, shards: list[Shard]) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            stack.enter_context(closing(door(mount)))
        with pytest.raises(TransientStoreError, match="64 borrowers are connected already"):
            door(mount)
        source = open_source(shards)
        assert isinstance(source, FileSource), "who is not let in reads the file"


def locked_bytes(device: HostDevice) -> int:
    return sum(stop - start for start, (stop, _) in device._registered._held.items())


def _retire_all(catalog: Catalog) -> None:
    for model in list(catalog.models.values()):
        model.retire()


def test_the_server_loads_from_ram_and_keeps_nothing_leased(
    mount: TestMount, config: ServerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hashed on the way, in place once it is locked: the same model under the same digest, load after load."""
    devices: list[WatchedDevice] = []

    def open_one(name: str) -> WatchedDevice:
        devices.append(WatchedDevice())
        return devices[-1]

    monkeypatch.setattr(gpuload.client.attached, "open_device", lambda name: HostDevice())
    want = reference_load_file(tmp_path / "registry" / "model" / "model.safetensors")
    path = mount.path / "model" / "model.safetensors"
    limits = Limits(1 << 20, 3, 3, 30)
    with running_server(replace(config, arena_bytes={"cpu": 64 << 20}, limits=limits), open_one) as server:
        digests = set()
        for _ in range(3):
            load_resident(path, "m", "cpu", socket_path=server.socket_path)
            held = attach("m", socket_path=server.socket_path)
            assert_same(held, want)
            digests.add(held.digest)
            del held
            gc.collect()
            server.settle()
            server.on_loop(partial(_retire_all, server.sites["cpu"].catalog))
            assert leased(mount) == 0
            assert mount.wait_for(
                lambda: (
                    sum(stop - start for start, (stop, _) in devices[0]._registered._held.items()) > path.stat().st_size
                )
            )
            last = list(devices[0].sources)
            devices[0].sources.clear()
        assert last
        assert all(devices[0]._registered.holds(at, nbytes) for at, nbytes in last), "copied over staging"
        assert len(digests) == 1
        assert server.gauges()["leases"] == 0
        (told,) = ask({"op": "status"}, socket_path=config.socket_path)["mounts"]
        assert told["door"].endswith(".loans")
        assert path.stat().st_size < told["locked_bytes"] < told["mapped_bytes"] + 4096
    assert not devices[0]._registered._starts, "the server left something page-locked"

"""What makes a load fast, seen in the modelled driver's own log: what overlaps what, how often what is called.

No clock is compared with another: the model's times say in which order things happened.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from gpuload.client import opened, rings
from gpuload.client.asking import load_resident
from gpuload.device import cuda
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.device.host import view_of
from gpuload.moving.pipeline import Limits, move_batches
from gpuload.moving.plan import Batch, Packing, Piece, Placement, pack_transfers, plan_batches, plan_transfers
from gpuload.moving.shards import close_shards, open_shards
from gpuload.moving.slabs import ALIGN_BYTES, SLAB_BYTES, SMALL_BYTES, plan_slabs
from gpuload.moving.source import FileSource
from gpuload.moving.staging import Ring
from gpuload.server import leaving, ram_tier
from gpuload.server.daemon import ServerConfig
from gpuload.testing import bits, random_tensors, running_server, write

SOURCE = Path(__file__).parent / "standin" / "libcuda.c"
COPY, PIN, OUT = 1, 2, 5


class _Entry(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int), ("card", ctypes.c_int), ("thread", ctypes.c_long), ("asked_s", ctypes.c_double),
        ("began_s", ctypes.c_double), ("ended_s", ctypes.c_double), ("dst", ctypes.c_ulonglong),
        ("src", ctypes.c_ulonglong), ("nbytes", ctypes.c_ulonglong),
    ]  # fmt: skip


class Model:
    """A driver with prices, small enough that a test ends soon, and its log."""

    def __init__(self, path: Path) -> None:
        self.driver = cu.Driver(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.standin_count.restype = ctypes.c_long

    def count(self, name: str) -> int:
        return int(self._library.standin_count(name.encode()))

    def log(self, kind: int) -> list[_Entry]:
        entries = (_Entry * 4096)()
        return [e for e in entries[: self._library.standin_log(entries, 4096)] if e.kind == kind]

    def device(self) -> CudaDevice:
        return CudaDevice(0, granule_bytes=65536, driver=self.driver)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here: the stand-in driver cannot be built")
    out = tmp_path_factory.mktemp("modelled") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread", "-o", out, SOURCE], check=True)
    return out


@pytest.fixture
def model(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    for name, value in {"PRICES": "1", "LINK_GB_S": "0.05", "REGISTER_S_GB": "100", "CALL_US": "0"}.items():
        monkeypatch.setenv(f"STANDIN_{name}", value)
    own = tmp_path / "libcuda.so.1"  # another file is another library: its log and prices are this test's alone
    shutil.copy(built, own)
    made = Model(own)
    monkeypatch.setattr(rings, "open_device", lambda name: made.device())
    monkeypatch.setattr(opened, "open_device", lambda name: made.device())
    monkeypatch.setattr(opened, "check_there", lambda name: None)
    yield made
    rings.let_go()


def _load(model: Model, path: Path, limits: Limits, *, apart: int = 0, ring: Ring | None = None) -> bool:
    """Load a file into an arena, tensors side by side or `apart`; whether every byte is there. ring: one whose buffers
    grow, to load by."""
    shards = open_shards([path])
    transfers = plan_transfers([shard.header for shard in shards], Placement(device="cuda:0"))
    device = model.device()
    arena = device.create_arena(4 << 20)
    starts, at = [], arena.address
    for t in transfers:
        starts.append(at)
        at += t.nbytes + apart

    def runs_of(piece: Piece) -> list[tuple[int, int]]:
        return [(starts[piece.transfer] + piece.offset, piece.nbytes)]

    batches: Sequence[Batch] | Packing = plan_batches(transfers, buffer_bytes=limits.buffer_bytes)
    if ring is not None:
        batches = pack_transfers(transfers, piece_bytes=ring.first_bytes)

    async def move() -> None:
        await move_batches(
            batches, source=FileSource(shards), device=device, runs_of=runs_of, limits=limits, lent=ring
        )  # fmt: skip

    trio.run(move)
    raw = path.read_bytes()
    same = all(bytes(view_of(s, t.nbytes)) == raw[t.start : t.stop] for s, t in zip(starts, transfers, strict=True))
    arena.close()
    close_shards(shards)
    return same


def test_copies_begin_while_the_ring_is_still_page_locked(model: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {f"t{i}": (65536,) for i in range(16)}, "U8"))
    assert _load(model, path, Limits(buffer_bytes=65536, buffers_count=6, readers_count=2, step_timeout_s=60))
    assert min(e.asked_s for e in model.log(COPY)) < max(e.began_s for e in model.log(PIN))


def test_of_a_new_buffer_little_is_filled_and_all_when_it_comes_round_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, whole, count = 1 << 15, 1 << 17, 1  # of more, some may not be needed
    monkeypatch.setattr(cuda, "LOCKED_BYTES", (4096, first))
    path = write(tmp_path / "a.safetensors", random_tensors(1, {f"t{i}": (20000,) for i in range(100)}, "U8"))
    limits = Limits(buffer_bytes=whole, buffers_count=count, readers_count=2, step_timeout_s=60)
    ring = Ring(model.device(), buffer_bytes=whole, count=count, first_bytes=first)
    assert _load(model, path, limits, ring=ring)
    pins = [e.nbytes for e in sorted(model.log(PIN), key=lambda e: e.began_s)]
    assert pins[0] == first, "the link begins after a little"
    assert sorted(pins) == [first] * count + [whole] * count
    copied = max(e.nbytes for e in model.log(COPY))
    assert first < copied <= whole, "and goes on with more"
    before = model.count("cuMemcpyHtoDAsync_v2")
    assert _load(model, path, limits, ring=ring)
    assert model.count("cuMemcpyHtoDAsync_v2") - before == -(-100 // (whole // 20000)), "from now on as much as goes in"
    assert len(model.log(PIN)) == len(pins)
    assert not model.log(4), "a copy came from memory that is not page-locked"
    ring.close()
    assert model.count("cuMemHostUnregister") == model.count("cuMemHostRegister_v2")


def test_the_next_copy_is_queued_before_the_last_one_ends(model: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {f"t{i}": (65536,) for i in range(24)}, "U8"))
    assert _load(model, path, Limits(buffer_bytes=65536, buffers_count=6, readers_count=2, step_timeout_s=60))
    copies = sorted(model.log(COPY), key=lambda e: e.began_s)
    waiting = [later for earlier, later in itertools.pairwise(copies) if later.asked_s < earlier.ended_s]
    assert len(waiting) > len(copies) // 2, "the engine had nothing to do after most copies"


def test_small_tensors_side_by_side_are_one_copy(model: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {f"t{i:03}": (512,) for i in range(200)}, "U8"))
    limits = Limits(buffer_bytes=65536, buffers_count=3, readers_count=2, step_timeout_s=60)
    assert _load(model, path, limits)
    assert model.count("cuMemcpyHtoDAsync_v2") == 2, "100 KiB in buffers of 64"
    assert _load(model, path, limits, apart=512)
    assert model.count("cuMemcpyHtoDAsync_v2") == 202


def test_a_buffer_is_filled_again_only_when_nothing_copies_from_it(model: Model, tmp_path: Path) -> None:
    """The model reads a source when its copy ends: one buffer less waited for, and bytes would be another batch's."""
    path = write(tmp_path / "a.safetensors", random_tensors(7, {f"t{i}": (20000,) for i in range(40)}, "U8"))
    assert _load(model, path, Limits(buffer_bytes=20000, buffers_count=2, readers_count=4, step_timeout_s=60), apart=96)
    assert not model.log(4), "a copy came from memory that is not page-locked"


def test_tensor_by_tensor_one_buffer_and_one_stream_do_for_all(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = random_tensors(1, {f"t{i}": (300 + i,) for i in range(10)}, "U8")
    path = write(tmp_path / "a.safetensors", made)
    memory = bytearray(4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    class Somewhere:
        def data_ptr(self) -> int:
            return address

    monkeypatch.setattr(opened, "make_all", lambda transfers: [Somewhere()])
    monkeypatch.setattr(opened, "Limits", lambda: Limits(buffer_bytes=65536, buffers_count=4, readers_count=2))
    with opened.safe_open(path, device="cuda:0") as file:
        for name, tensor in made.items():
            file.get_tensor(name)
            assert bytes(memory[: tensor.nbytes]) == tensor.numpy().tobytes()
    assert len(model.log(PIN)) == 1
    assert model.count("cuStreamCreate") == 1


def test_a_ring_is_kept_from_load_to_load_and_not_after_an_error(model: Model) -> None:
    limits = Limits(buffer_bytes=65536, buffers_count=2, readers_count=2)
    with rings.lent("cuda:0", limits) as first:
        first.ring.grow()
        with rings.lent("cuda:0", limits) as second:
            assert second is not first, "two loads share no ring"
    with rings.lent("cuda:0", limits) as again:
        assert again is first or again is second
        again.ring.grow()
    assert model.count("cuMemHostRegister_v2") <= 4
    with pytest.raises(ValueError, match="as asked"), rings.lent("cuda:0", limits) as failed:
        raise ValueError("as asked")
    with rings.lent("cuda:0", limits) as fresh:
        assert fresh is not failed
    rings.let_go()
    assert model.count("cuMemHostUnregister") == model.count("cuMemHostRegister_v2")


def test_who_loads_little_has_little_page_locked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LOCKED_BYTES", (8192, 16384))
    device = model.device()
    arena, stream = device.create_arena(65536), device.open_stream()
    ring = Ring(device, buffer_bytes=65536, count=1)
    for nbytes in (100, 8192, 9000, 16384, 20000, 65536):
        buffer = ring.take()
        assert buffer is not None
        buffer.settle(60)
        buffer.staging.view[:nbytes] = b"x" * nbytes
        buffer.staging.lock(nbytes)
        stream.copy_in(arena.address, buffer.staging.address, nbytes)
        buffer.pending = stream.record()
        ring.put(buffer)
    stream.close()
    assert [e.nbytes for e in model.log(PIN)] == [8192, 16384, 65536]
    assert not model.log(4), "a copy came from memory that is not page-locked"
    assert device.read_back(arena.address, 65536) == b"x" * 65536
    ring.close()
    arena.close()


def test_a_ring_grows_in_several_threads_to_its_size_and_no_further(model: Model) -> None:
    ring = Ring(model.device(), buffer_bytes=4096, count=5)
    growing = [threading.Thread(target=ring.grow) for _ in range(4)]
    for thread in growing:
        thread.start()
    for thread in growing:
        thread.join()
    assert len(model.log(PIN)) == 5
    ring.close()


def test_slabs_hold_what_is_small_aligned_and_of_one_shard(tmp_path: Path) -> None:
    sizes = {"a": 300, "b": 512, "c": SMALL_BYTES + 2, "d": 100, **{f"e{i}": SMALL_BYTES for i in range(12)}}
    shards = open_shards(
        [write(tmp_path / "a.safetensors", random_tensors(1, {n: (s,) for n, s in sizes.items()}, "U8"))]
    )
    transfers = plan_transfers([shards[0].header, shards[0].header][:1], Placement(device="cuda:0"))
    places, slabs = plan_slabs(transfers)
    close_shards(shards)
    reached: dict[int, int] = {}
    for t, place in zip(transfers, places, strict=True):
        assert (place is None) == (t.nbytes > SMALL_BYTES), t.name
        if place is not None:
            assert place.offset % ALIGN_BYTES == 0
            assert place.offset >= reached.get(place.slab, 0), "two tensors overlap"
            reached[place.slab] = place.offset + t.nbytes
    assert slabs == [reached[i] for i in range(len(slabs))]
    assert max(slabs) <= SLAB_BYTES
    assert len(slabs) == 2


def test_what_is_evicted_leaves_beside_what_comes_and_before_it_is_overwritten(
    model: Model, config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram_tier, "SLAB_BYTES", 1 << 18)
    monkeypatch.setattr(ram_tier, "SLOT_BYTES", 1 << 16)
    monkeypatch.setattr(leaving, "COPY_BYTES", 1 << 17)
    shapes = {"a": (5 << 16,), "b": (5 << 16,)}  # 640 KiB each: ten granules
    one, two = (write(tmp_path / f"{i}.safetensors", random_tensors(i, shapes)) for i in (1, 2))
    limits = Limits(buffer_bytes=1 << 17, buffers_count=3, readers_count=2)
    config = replace(config, arena_bytes={"cuda:0": 21 << 16}, ram_tier_bytes=3 << 20, limits=limits)
    with running_server(config, lambda _: model.device()) as server:
        site = server.sites["cuda:0"]
        assert site.tier is not None
        while site.tier.locked_bytes < site.tier.nbytes:
            server.settle()

        def load(path: Path) -> dict[str, int]:
            report: dict[str, int] = load_resident(path, path.name, "cuda:0", socket_path=config.socket_path)["report"]
            return report

        load(one)
        before = len(model.log(COPY))
        load(two)
        while site.leaving is not None and site.leaving.pending_count:
            server.settle()
        into, out = model.log(COPY)[before:], model.log(OUT)
        assert sum(e.nbytes for e in into) == sum(e.nbytes for e in out) == 20 << 16
        assert min(e.began_s for e in into) < max(e.ended_s for e in out), "side by side"
        for e in into:
            for left in out:
                if left.src < e.dst + e.nbytes and e.dst < left.src + left.nbytes:
                    assert left.ended_s <= e.began_s, "nothing is overwritten before it is out"
        report = load(one)
        assert report["bytes_from_ram"] == report["bytes_total"]
        (part,) = site.catalog.models[one.name].parts
        device = model.device()
        held = b"".join(device.read_back(*run) for b in part.blocks for run in site.runs(b, 0, b.nbytes))
        assert sorted(held[at : at + (10 << 16)] for at in (0, 10 << 16)) == sorted(
            bits(tensor) for tensor in random_tensors(1, shapes).values()
        )

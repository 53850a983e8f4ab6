"""The resident server through its socket: sharing, survival, swaps by difference, refusals, hostile clients."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpuload import wire
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import Attached, attach, open_resident
from gpuload.device.base import Arena, Memory
from gpuload.device.host import HostDevice
from gpuload.errors import AwayError, BusyError, DeviceError, FitError, ServerError, from_wire, to_wire
from gpuload.server import catalog, estate, operations, succession
from gpuload.server.daemon import ServerConfig
from gpuload.testing import FaultyDevice, Gate, ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import ChangedError, MfsError, UsageError

LARGE = {f"l.{i}.w": (8, 2048) for i in range(8)}  # 32 KiB in BF16: a block each
SMALL = {f"l.{i}.norm": (100,) for i in range(8)}


def load(server: ServerThread, path: Path, model: str = "m", **options: object) -> dict[str, object]:
    return load_resident(path, model, "cpu", socket_path=server.socket_path, options=options)


def swap(server: ServerThread, path: Path, model: str = "m", **options: object) -> dict[str, int]:
    reply = load_resident(path, model, "cpu", is_swap=True, socket_path=server.socket_path, options=options)
    return reply["report"]


def attached(server: ServerThread, model: str = "m") -> Attached:
    return attach(model, socket_path=server.socket_path)


def base_model(seed: int = 1) -> dict[str, torch.Tensor]:
    return random_tensors(seed, {**LARGE, **SMALL, "scalar": (), "nothing": (0, 3)})


def test_a_resident_model_is_the_file(server: ServerThread, tmp_path: Path) -> None:
    want = base_model()
    path = write(tmp_path / "a.safetensors", want)
    report = load(server, path)["report"]
    assert report["bytes_copied"] == report["bytes_total"] == sum(t.nbytes for t in want.values())
    one, two = attached(server), attached(server)
    assert_same(one, want)
    assert_same(two, want)
    assert server.gauges()["leases"] == 2
    assert all(t.data_ptr() % 256 == 0 for t in one.values() if t.numel())


def test_a_lease_lasts_as_long_as_any_view(server: ServerThread, tmp_path: Path) -> None:
    want = base_model()
    load(server, write(tmp_path / "a.safetensors", want))
    view = attached(server)["l.3.w"][2:4].t()
    gc.collect()
    assert server.gauges()["leases"] == 1
    ask({"op": "unload", "model": "m"}, socket_path=server.socket_path)
    load(server, write(tmp_path / "b.safetensors", base_model(2)), "other")
    assert torch.equal(view.contiguous().view(torch.uint8), want["l.3.w"][2:4].t().contiguous().view(torch.uint8))
    assert server.gauges()["retired"] == 1
    del view
    gc.collect()
    assert (server.gauges()["retired"], server.gauges()["leases"]) == (0, 0)


def test_a_writing_client_changes_only_its_own_copy(server: ServerThread, tmp_path: Path) -> None:
    want = base_model()
    load(server, write(tmp_path / "a.safetensors", want))
    one, two = attached(server), attached(server)
    one["l.0.w"].zero_()
    assert_same(two, want)
    assert_same(attached(server), want)


def test_a_swap_moves_what_differs(server: ServerThread, tmp_path: Path) -> None:
    old = base_model()
    load(server, write(tmp_path / "a.safetensors", old))
    held = attached(server)
    new = dict(old)
    new["l.5.w"] = random_tensors(9, {"x": (8, 2048)})["x"]
    new["l.2.norm"] = random_tensors(9, {"x": (100,)})["x"]
    report = swap(server, write(tmp_path / "b.safetensors", new))
    assert report["bytes_copied"] == 32768 + 200
    assert report["bytes_kept"] == 7 * 32768, "large tensors that are equal stay where they are"
    assert report["bytes_moved_inside"] == 7 * 200 + 2, "small ones beside a changed one move inside the device"
    assert report["bytes_total"] == sum(report[k] for k in ("bytes_copied", "bytes_kept", "bytes_moved_inside"))
    assert_same(held, old)
    now = attached(server)
    assert_same(now, new)
    assert (held.generation, now.generation) == (1, 2)
    assert held.digest != now.digest


def test_equal_tensors_match_wherever_they_stand_and_whatever_they_are_called(
    server: ServerThread, tmp_path: Path
) -> None:
    old = base_model()
    load(server, write(tmp_path / "a.safetensors", old))
    renamed = {f"other.{n}": t for n, t in reversed(old.items())}
    renamed["aaa.first"] = random_tensors(8, {"x": (777,)})["x"]  # shifts every offset
    report = load(server, write(tmp_path / "b.safetensors", renamed), "n")["report"]
    assert report["bytes_copied"] == 777 * 2
    assert_same(attached(server, "n"), renamed)


def test_same_shapes_other_bytes_are_never_mistaken(server: ServerThread, tmp_path: Path) -> None:
    one, two = base_model(1), base_model(2)
    load(server, write(tmp_path / "a.safetensors", one), "one")
    report = load(server, write(tmp_path / "b.safetensors", two), "two")["report"]
    assert report["bytes_kept"] == report["bytes_moved_inside"] == 0
    assert_same(attached(server, "one"), one)
    assert_same(attached(server, "two"), two)


def test_a_file_rewritten_in_place_is_read_again(server: ServerThread, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", base_model(1))
    load(server, path)
    stat = path.stat()
    new = base_model(2)
    write(path, new)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UsageError, match="other content; swap it"):
        load(server, path)
    swap(server, path)
    assert_same(attached(server), new)


def test_a_files_own_strings_are_content_too(server: ServerThread, tmp_path: Path) -> None:
    """Programs read settings there (format, quantisation): those of the old file beside the new one's name mislead."""
    tensors = base_model()
    for name, said in (("a", "old"), ("b", "new")):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"said": said})
    load(server, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="other content"):
        load(server, tmp_path / "b.safetensors")
    report = swap(server, tmp_path / "b.safetensors")
    assert report["bytes_kept"] == report["bytes_total"]
    assert attached(server).metadata == [{"said": "new"}]


def test_the_same_bytes_again_cost_nothing(server: ServerThread, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", base_model())
    load(server, path)
    report = load(server, path, "twin")["report"]
    assert (report["bytes_kept"], report["bytes_hashed_before"]) == (report["bytes_total"], 0)
    with open(path, "rb") as file:
        opened = open_resident([file.fileno()], ["a"], "cpu", socket_path=server.socket_path)
    assert opened.report is not None
    assert opened.report["bytes_hashed_before"] == 0
    assert opened.model in ("m", "twin")
    assert_same(opened, base_model())


def test_least_recently_used_goes_first_and_pins_stay(server: ServerThread, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.safetensors", random_tensors(i, {"w": (4, 40, 1024)})) for i in range(4)]
    load(server, paths[0], "pinned", pinned=True)
    load(server, paths[1], "old")
    load(server, paths[2], "older")
    assert attached(server, "old").model == "old"  # a use; gone again at once
    server.settle()
    report = load(server, paths[3], "new")["report"]  # 80 granules each, 256 in all: three fit
    assert report["evicted"] == ["older"]
    status = ask({"op": "status"}, socket_path=server.socket_path)
    assert {m["model"] for m in status["devices"][0]["models"]} == {"pinned", "old", "new"}


def test_a_refusal_names_the_shortfall_and_touches_nothing(server: ServerThread, tmp_path: Path) -> None:
    half = random_tensors(1, {"w": (150, 2048)})  # 150 granules
    load(server, write(tmp_path / "a.safetensors", half), "a")
    held = attached(server, "a")
    other = write(tmp_path / "b.safetensors", random_tensors(2, {"w": (150, 2048)}))
    with pytest.raises(FitError, match=r"needs .* short by .* nothing was evicted") as caught:
        load(server, other, "b")
    assert caught.value.shortfall_bytes == (150 - 106) * 4096
    with pytest.raises(FitError):
        swap(server, other, "a")
    with pytest.raises(FitError):
        swap(server, other, "a", allow_gap=True)  # leased: there is no gap to be had
    assert_same(attached(server, "a"), half)
    del held
    gc.collect()
    server.settle()
    report = load(server, other, "b")["report"]
    assert report["evicted"] == ["a"]


def test_a_refusal_names_some_of_many_models(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "NAMES_MAX", 3)
    monkeypatch.setattr(operations, "NAMES_MAX", 3)
    file = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (4,)}))
    for number in range(5):
        load_resident(file, f"m{number}", "cpu", socket_path=server.socket_path)
    for op, more in (("attach", {"device": "cpu"}), ("attach", {}), ("unload", {}), ("resize", {"bytes": 0})):
        with pytest.raises(MfsError, match=r" m\d, m\d, m\d and 2 more"):
            ask({"op": op, "model": "x", **more}, socket_path=server.socket_path)


def test_no_more_models_than_can_be_left_to_a_successor(
    config: ServerConfig, small_granules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estate, "SLOT_BYTES", 4096)
    file = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (4,)}))

    there = set[str]()

    def load(*numbers: int) -> None:
        for name in (f"{number:0200}" for number in numbers):
            load_resident(file, name, "cpu", socket_path=server.socket_path)
            there.add(name)

    def said() -> set[str]:
        fds = [int(name) for name in os.listdir("/proc/self/fd") if _leads_to(name) == "/memfd:gpuload-index (deleted)"]
        index = estate.Index(os.dup(fds[-1]))
        with contextlib.closing(index):
            return {name for _, name, *_ in succession.parsed(index.content)["models"]}

    with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
        with pytest.raises(BusyError, match="evict some"):
            load(*range(100))
        assert said() == there
        while there:
            ask({"op": "unload", "model": there.pop()}, socket_path=server.socket_path)
        load(100)
        assert said() == there


def _leads_to(fd: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


def test_a_swap_with_a_gap_where_both_do_not_fit(server: ServerThread, tmp_path: Path) -> None:
    load(server, write(tmp_path / "a.safetensors", random_tensors(1, {"w": (150, 2048)})), pinned=True)
    new = random_tensors(2, {"w": (150, 2048)})
    path = write(tmp_path / "b.safetensors", new)
    with pytest.raises(FitError):
        swap(server, path)
    assert swap(server, path, allow_gap=True)["had_gap"]
    status = ask({"op": "status"}, socket_path=server.socket_path)
    assert status["devices"][0]["models"][0]["pinned"], "a pin belongs to the name"
    assert_same(attached(server), new)


def test_a_rank_holds_its_part_only(server: ServerThread, tmp_path: Path) -> None:
    want = random_tensors(1, {"a.q_proj.weight": (64, 32), "a.o_proj.weight": (32, 64)}, "F32")
    path = write(tmp_path / "a.safetensors", want)
    rules = {"*q_proj*": 0, "*o_proj*": 1}
    report = load(server, path, rank=1, world=2, rules=rules)["report"]
    assert report["bytes_total"] == sum(t.nbytes for t in want.values()) // 2
    got = attached(server)
    assert torch.equal(got["a.q_proj.weight"].view(torch.int32), want["a.q_proj.weight"][32:].view(torch.int32))
    part = want["a.o_proj.weight"][:, 32:].contiguous()
    assert torch.equal(got["a.o_proj.weight"].view(torch.int32), part.view(torch.int32))
    swap(server, path, rank=0, world=2, rules=rules)
    assert_same(attached(server), {n: t.chunk(2, i)[0].contiguous() for i, (n, t) in enumerate(want.items())})


CHILD = """
import sys
import gpuload.client.attached
from gpuload.device.host import HostDevice
gpuload.client.attached.open_device = lambda name: HostDevice(granule_bytes=4096)
held = gpuload.client.attached.attach("m", socket_path=sys.argv[1])
print(int(held["l.1.w"].view(__import__("torch").uint8).to(__import__("torch").int64).sum()), flush=True)
sys.stdin.read()
"""


def child(server: ServerThread) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, server.socket_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_weights_survive_the_death_of_the_process_that_used_them(server: ServerThread, tmp_path: Path) -> None:
    want = base_model()
    load(server, write(tmp_path / "a.safetensors", want))
    total = int(want["l.1.w"].view(torch.uint8).to(torch.int64).sum())
    for _ in range(2):
        with child(server) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == total
            assert server.gauges()["leases"] == 1
            process.send_signal(signal.SIGKILL)
        assert server.gauges()["leases"] == 0
    assert_same(attached(server), want)


def test_a_client_keeps_its_weights_when_the_server_dies(tmp_path: Path, small_granules: None) -> None:
    path = str(tmp_path / "s.sock")
    code = (
        "import sys; from gpuload.server.daemon import *; from gpuload.device.host import HostDevice;"
        "run(ServerConfig(sys.argv[1], arena_bytes={'cpu': 1 << 20}), lambda n: HostDevice(granule_bytes=4096),"
        " lambda: print('ready', flush=True))"
    )
    want = base_model()
    file = write(tmp_path / "a.safetensors", want)
    for round_number in range(2):  # the second finds the dead one's socket and lock
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            load_resident(file, "m", "cpu", socket_path=path)
            held = attach("m", socket_path=path)
            process.send_signal(signal.SIGKILL if round_number == 0 else signal.SIGTERM)
        assert_same(held, want)
        with pytest.raises(AwayError):
            attach("m", socket_path=path)
    assert process.returncode == 0
    assert not os.path.exists(path), "a server that is told to end removes its socket"


def test_a_server_killed_under_load_is_an_error_and_its_successor_starts_clean(
    tmp_path: Path, small_granules: None
) -> None:
    path = str(tmp_path / "s.sock")
    code = (
        "import sys, threading\n"
        "from gpuload.server.daemon import ServerConfig, run\n"
        "from gpuload.device.host import HostDevice\n"
        "from gpuload.testing import FaultyDevice, Gate\n"
        "gate = Gate(int(sys.argv[2]), blocks=True)\n"
        "def tell():\n"
        "    gate.reached.wait()\n"
        "    print('reached', flush=True)\n"
        "threading.Thread(target=tell, daemon=True).start()\n"
        "run(ServerConfig(sys.argv[1], arena_bytes={'cpu': 1 << 20}),\n"
        "    lambda n: FaultyDevice(HostDevice(granule_bytes=4096), gate), lambda: print('ready', flush=True))\n"
    )
    want = base_model()
    file = write(tmp_path / "a.safetensors", want)
    with subprocess.Popen([sys.executable, "-c", code, path, "3"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_resident, file, "m", "cpu", socket_path=path)
            assert process.stdout.readline() == "reached\n"
            process.send_signal(signal.SIGKILL)
            with pytest.raises(AwayError):
                loading.result(timeout=60)
    with subprocess.Popen([sys.executable, "-c", code, path, "999999"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        load_resident(file, "m", "cpu", socket_path=path)
        assert_same(attach("m", socket_path=path), want)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_a_client_that_leaves_cancels_its_load(config: ServerConfig, tmp_path: Path, small_granules: None) -> None:
    gate = Gate(3, blocks=True)
    device = FaultyDevice(HostDevice(granule_bytes=4096), gate)
    path = write(tmp_path / "a.safetensors", base_model())
    with running_server(config, lambda _: device) as server:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(config.socket_path)
        with open(path, "rb") as file:
            request = {"op": "load", "model": "m", "device": "cpu", "files": ["a"]}
            wire.send_blocking(sock, request, [file.fileno()])
            assert gate.reached.wait(30)
        sock.close()
        server.settle()
        gate.opened.set()
        assert server.wait_for(lambda: set(server.gauges().values()) == {0})
        load(server, path)
        assert_same(attached(server), base_model())
    assert device.staging_count == 0, "the server's ring is given back when it ends"


def test_a_file_that_changes_while_it_is_loaded_is_an_error(
    config: ServerConfig, tmp_path: Path, small_granules: None
) -> None:
    """Half of it would be of the old version: nothing known of its bytes could tell."""
    gate = Gate(3, blocks=True)
    device = FaultyDevice(HostDevice(granule_bytes=4096), gate)
    path = write(tmp_path / "a.safetensors", base_model())
    other = write(tmp_path / "b.safetensors", base_model(2)).read_bytes()
    with running_server(config, lambda _: device) as server, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, server, path)
        assert gate.reached.wait(30)
        with open(path, "r+b") as file:
            file.write(other)
        gate.opened.set()
        with pytest.raises(ChangedError, match="changed while it was loaded"):
            loading.result(60)
        assert set(server.gauges().values()) == {0}
        load(server, path)
        assert_same(attached(server), base_model(2))


@pytest.mark.parametrize("passes", [0, 1, 5, 10])
def test_a_swap_that_fails_leaves_the_old_one_serving(
    passes: int, config: ServerConfig, tmp_path: Path, small_granules: None
) -> None:
    gate = Gate(1 << 30)
    device = FaultyDevice(HostDevice(granule_bytes=4096), gate)
    old, new = base_model(1), base_model(2)
    with running_server(config, lambda _: device) as server:
        load(server, write(tmp_path / "a.safetensors", old))
        before = server.gauges()
        gate._passes = passes
        path = write(tmp_path / "b.safetensors", new)
        with pytest.raises(DeviceError, match="as asked"):
            swap(server, path)
        assert server.gauges() == before
        assert_same(attached(server), old)
        gate._passes = 1 << 30
        swap(server, path)
        assert_same(attached(server), new)


class FullDevice(HostDevice):
    """A device on which others hold all but 4 MiB of 1 GiB."""

    def memory(self) -> Memory:
        return Memory(1 << 30, 4 << 20)


@pytest.mark.parametrize(
    ("floors", "short"),
    [
        ({"cpu": 3 << 20, "cpu:1": 1 << 20}, 2 * 2 * (4 << 20)),  # the floors fit; their staging does not
        ({"cuda:0": 5 << 20}, 1 << 20),  # a card's arena is not in host memory
    ],
)
def test_a_server_that_does_not_fit_beside_others_takes_nothing(
    config: ServerConfig, floors: dict[str, int], short: int
) -> None:
    taken: list[int] = []

    class Watched(FullDevice):
        def reserve_arena(self, nbytes: int, shared: int | None = None) -> Arena:
            taken.append(nbytes)
            return super().reserve_arena(nbytes)

    match = r"others hold 1.0 G, free are 4.0 M; short by \d.*; nothing was taken"
    with (
        pytest.raises(FitError, match=match) as caught,
        running_server(
            replace(config, arena_bytes=floors, floor_bytes=floors), lambda n: Watched(name=n, granule_bytes=4096)
        ),
    ):
        raise AssertionError("it started")
    assert caught.value.shortfall_bytes == short
    assert not taken
    assert not os.path.exists(config.socket_path)


def test_one_server_per_socket(server: ServerThread, config: ServerConfig) -> None:
    with pytest.raises(BusyError, match="already running"), running_server(config):
        raise AssertionError("a second server started")


def test_errors_cross_the_wire_as_they_are() -> None:
    again = from_wire(to_wire(FitError("x", shortfall_bytes=7)))
    assert isinstance(again, FitError)
    assert again.shortfall_bytes == 7
    assert isinstance(from_wire({"error": "Nonsense"}), ServerError)
    assert isinstance(from_wire(to_wire(ZeroDivisionError("x"))), ServerError)

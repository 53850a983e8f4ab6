"""Swaps whose incoming digests nobody knows: one pass over the files, and over the bus only what differs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach, open_resident
from gpuload.device.base import Stream
from gpuload.device.host import HostDevice
from gpuload.errors import DeviceError
from gpuload.server import versions
from gpuload.server.daemon import ServerConfig
from gpuload.server.digest_files import decode, encode
from gpuload.testing import FaultyDevice, Gate, ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import ChangedError, UsageError

LARGE = {f"l.{i}.w": (8, 2048) for i in range(8)}  # 32 KiB in BF16: a block each
SMALL = {f"l.{i}.norm": (100,) for i in range(8)}


class CountingDevice(FaultyDevice):
    """Counts the bytes that cross its bus, around everything that reports say; never direct."""

    def __init__(self) -> None:
        super().__init__(HostDevice(granule_bytes=4096), Gate(1 << 30))
        self.bytes_over_the_bus = 0

    def open_stream(self) -> Stream:
        return _CountingStream(super().open_stream(), self)


class _CountingStream:
    def __init__(self, inner: Any, device: CountingDevice) -> None:
        self._inner, self._device = inner, device
        self.copy_within, self.record, self.close = inner.copy_within, inner.record, inner.close

    def copy_in(self, dst: int, src: int, nbytes: int) -> None:
        self._device.bytes_over_the_bus += nbytes
        self._inner.copy_in(dst, src, nbytes)

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        for copy in copies:
            self.copy_in(*copy)

    def copy_in_rows(self, dst: int, src: int, *, row_bytes: int, rows_count: int, pitch_bytes: int) -> None:
        self._device.bytes_over_the_bus += row_bytes * rows_count
        self._inner.copy_in_rows(dst, src, row_bytes=row_bytes, rows_count=rows_count, pitch_bytes=pitch_bytes)


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture
def forgetful(
    config: ServerConfig, device: CountingDevice, small_granules: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerThread]:
    """A server that trusts no file system, so remembers nothing."""
    monkeypatch.setattr(versions, "CHANGE_STAMPED", set())
    with running_server(config, lambda _: device) as running:
        yield running
        gc.collect()
        for model in list(running.sites["cpu"].catalog.models.values()):
            running.on_loop(model.retire)
        assert set(running.gauges().values()) == {0}


def load(server: ServerThread, path: Path, model: str = "m", **options: object) -> dict[str, Any]:
    return load_resident(path, model, "cpu", socket_path=server.socket_path, options=options)["report"]


def swap(server: ServerThread, path: Path, model: str = "m", **options: object) -> dict[str, Any]:
    return load_resident(path, model, "cpu", is_swap=True, socket_path=server.socket_path, options=options)["report"]


def relative(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fine-tune: one large and one small tensor differ."""
    return {**old, **random_tensors(9, {"l.5.w": (8, 2048), "l.2.norm": (100,)})}


def test_one_pass_and_only_what_differs_crosses_the_bus(
    forgetful: ServerThread, device: CountingDevice, tmp_path: Path
) -> None:
    old = random_tensors(1, {**LARGE, **SMALL})
    load(forgetful, write(tmp_path / "a.safetensors", old))
    device.bytes_over_the_bus = 0
    new = relative(old)
    report = swap(forgetful, write(tmp_path / "b.safetensors", new))
    assert device.bytes_over_the_bus == report["bytes_copied"] == 32768 + 200
    assert report["bytes_kept"] == 7 * 32768, "blocks that turned out to be equal are shared in place"
    assert report["bytes_moved_inside"] == 7 * 200
    assert (report["bytes_hashed"], report["bytes_hashed_before"]) == (report["bytes_total"], 0), "read once"
    assert_same(attach("m", socket_path=forgetful.socket_path), new)
    granules = forgetful.gauges()["granules_used"]
    assert granules == 8 * 8 + 1, "what was reserved for bytes that were there was given back"


def test_the_same_bytes_under_another_name_or_again_leave_no_trace(
    forgetful: ServerThread, device: CountingDevice, tmp_path: Path
) -> None:
    old = random_tensors(1, {**LARGE, **SMALL})
    path = write(tmp_path / "a.safetensors", old)
    load(forgetful, path)
    before = forgetful.gauges()
    device.bytes_over_the_bus = 0
    assert load(forgetful, path)["bytes_kept"] == sum(t.nbytes for t in old.values())
    assert forgetful.gauges() == before
    with open(path, "rb") as file:
        opened = [open_resident([file.fileno()], ["x"], "cpu", socket_path=forgetful.socket_path) for _ in range(2)]
    assert {o.model for o in opened} == {"m"}
    assert device.bytes_over_the_bus == 0
    assert_same(opened[1], old)


def test_a_name_with_other_bytes_is_refused_and_nothing_is_left_of_it(forgetful: ServerThread, tmp_path: Path) -> None:
    old = random_tensors(1, {**LARGE, **SMALL})
    load(forgetful, write(tmp_path / "a.safetensors", old))
    before = forgetful.gauges()
    with pytest.raises(UsageError, match="other content; swap it"):
        load(forgetful, write(tmp_path / "b.safetensors", relative(old)))
    assert forgetful.gauges() == before


def test_where_it_might_not_fit_the_bytes_are_known_before_anybody_goes(
    forgetful: ServerThread, device: CountingDevice, tmp_path: Path
) -> None:
    """256 granules: old 96, bystander 96, new 96 of which 64 are shared. Blind, the bystander would have to go."""
    shapes = {f"l.{i}.w": (32, 2048) for i in range(3)}  # 32 granules each
    old = random_tensors(1, shapes)
    new = {**old, **random_tensors(2, {"l.1.w": (32, 2048)})}
    load(forgetful, write(tmp_path / "x.safetensors", random_tensors(3, shapes)), "bystander")
    load(forgetful, write(tmp_path / "a.safetensors", old))
    device.bytes_over_the_bus = 0
    report = swap(forgetful, write(tmp_path / "b.safetensors", new))
    assert report["evicted"] == []
    assert report["bytes_hashed_before"] == report["bytes_hashed"] == report["bytes_total"]
    assert device.bytes_over_the_bus == report["bytes_copied"] == 32 * 4096
    assert_same(attach("m", socket_path=forgetful.socket_path), new)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_failure_in_the_pass_leaves_the_old_one_serving(
    forgetful: ServerThread, device: CountingDevice, passes: int, tmp_path: Path
) -> None:
    old = random_tensors(1, {**LARGE, **SMALL})
    load(forgetful, write(tmp_path / "a.safetensors", old))
    before = forgetful.gauges()
    device._gate._passes = passes
    new = {**old, **random_tensors(2, {f"l.{i}.w": (8, 2048) for i in range(5)})}
    path = write(tmp_path / "b.safetensors", new)
    with pytest.raises(DeviceError, match="as asked"):
        swap(forgetful, path)
    assert forgetful.gauges() == before
    assert_same(attach("m", socket_path=forgetful.socket_path), old)
    device._gate._passes = 1 << 30
    assert swap(forgetful, path)["bytes_copied"] == 5 * 32768


def test_bytes_that_were_found_stay_though_their_model_goes_meanwhile(
    forgetful: ServerThread, device: CountingDevice, tmp_path: Path
) -> None:
    old = random_tensors(1, {**LARGE, **SMALL})
    load(forgetful, write(tmp_path / "a.safetensors", old), "old")
    gate = device._gate
    gate._passes, gate._blocks = 0, True
    first = {"a.first": (8, 2048)}  # differs, and stands first in the file: the pass waits for its copy at the end
    new = {**random_tensors(2, first), **relative(old)}
    path = write(tmp_path / "b.safetensors", new)
    reports: list[dict[str, Any]] = []
    loading = threading.Thread(target=lambda: reports.append(load(forgetful, path, "new")))
    loading.start()
    assert gate.reached.wait(30)
    ask({"op": "unload", "model": "old"}, socket_path=forgetful.socket_path)
    gate.opened.set()
    loading.join()
    assert_same(attach("new", socket_path=forgetful.socket_path), new)
    assert sum(reports[0][k] for k in ("bytes_copied", "bytes_kept", "bytes_moved_inside")) == reports[0]["bytes_total"]


def test_a_remembered_digest_that_is_wrong_moves_nothing_and_is_forgotten(
    config: ServerConfig, small_granules: None, tmp_path: Path
) -> None:
    """Bytes that move are hashed again: an entry made wrong by hand is an error once, in memory and on disk."""
    config = replace(config, digests_folder=str(tmp_path / "d"))
    old, new = random_tensors(1, LARGE), random_tensors(2, LARGE)
    path = write(tmp_path / "a.safetensors", new)
    for round_number in range(2):
        with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
            if round_number == 0:
                load(server, path)  # remembers
                continue
            (kept,) = (tmp_path / "d").iterdir()
            raw = kept.read_bytes()
            key = raw[16 : 16 + int.from_bytes(raw[8:12], "little")]
            rows = decode(raw, key)
            assert rows
            kept.write_bytes(encode(key, dict.fromkeys(rows, b"?" * 32)))
            load(server, write(tmp_path / "o.safetensors", old), "other")
            with pytest.raises(ChangedError, match="changed while it was loaded; load it again"):
                load(server, path)
            report = load(server, path)
            assert report["bytes_copied"] == report["bytes_total"]
            assert_same(attach("m", socket_path=server.socket_path), new)


def test_digests_outlive_the_server(config: ServerConfig, small_granules: None, tmp_path: Path) -> None:
    config = replace(config, digests_folder=str(tmp_path / "d"))
    old = random_tensors(1, {**LARGE, **SMALL})
    new = relative(old)
    paths = [write(tmp_path / f"{n}.safetensors", t) for n, t in (("a", old), ("b", new))]
    for round_number in range(2):
        with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
            load(server, paths[0])
            report = swap(server, paths[1])
            assert report["bytes_hashed"] == (0 if round_number else report["bytes_total"])
            assert report["bytes_copied"] == 32768 + 200
            assert_same(attach("m", socket_path=server.socket_path), new)

"""The pool path against the file path, on a real mount: the same bits, leases given back, versions not mixed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file

import gpuload
from gpuload.pool import PoolSource, open_source
from gpuload.shards import close_shards, open_shards
from gpuload.source import FileSource
from mfs.control import slots_client
from mfs.control.slots_client import SlotReader
from mfs.errors import ChangedError, NotFoundError, StoreError, UsageError
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


def door(mount: TestMount) -> SlotReader:
    found = slots_client.find(str(mount.path / "model" / "ramp.bin"))
    assert found is not None
    assert found[1] == "model/ramp.bin"
    return SlotReader(found[0])


def test_a_mounted_file_loads_through_the_slots_and_is_the_same(mount: TestMount, tmp_path: Path) -> None:
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
    file, size, _ = reader.open("model/ramp.bin")
    assert size == _RAMP_BYTES
    edges = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 99, size - 1, size)
    for start in edges:
        for stop in (e for e in edges if start <= e <= start + reader.lease_bytes_max):
            with reader.lease(file, start, stop) as views:
                assert b"".join(views) == ramp(stop - start, start)
    reader.close()


def test_slots_cannot_be_written_or_shrunk_by_a_borrower(mount: TestMount) -> None:
    reader = door(mount)
    file, _, _ = reader.open("model/ramp.bin")
    with reader.lease(file, 0, 10) as views, pytest.raises(TypeError):
        views[0][0] = 1
    reader.close()


def test_a_borrower_that_vanishes_gives_its_leases_back(mount: TestMount) -> None:
    reader = door(mount)
    file, _, _ = reader.open("model/ramp.bin")
    reader._ask({"file": file, "start": 0, "stop": CHUNK_BYTES})
    assert mount.client.status()["ram"]["slots_leased"] == 1
    reader.close()
    assert mount.wait_for(lambda: mount.client.status()["ram"]["slots_leased"] == 0)


def test_what_cannot_be_asked_is_refused_and_the_door_stays_open(mount: TestMount) -> None:
    reader = door(mount)
    with pytest.raises(NotFoundError):
        reader.open("model/nothing")
    with pytest.raises(ChangedError):
        reader.open("model/ramp.bin", inode=os.stat("/").st_ino + 123456)
    file, size, _ = reader.open("model/ramp.bin")
    for start, stop in ((5, 4), (0, size + 1), (-1, 3)):
        with pytest.raises(UsageError), reader.lease(file, start, stop):
            pass
    for nonsense in (b"[]", b"{", b'{"lease": 1}', b'{"release": 99}'):
        reader._socket.send(nonsense)
        with pytest.raises(UsageError):
            slots_client._checked(reader._socket.recv(1 << 16))
    with reader.lease(file, 0, 4) as views:
        assert b"".join(views) == ramp(4)
    reader.close()


def test_the_daemon_dies_under_a_load(mount: TestMount) -> None:
    reader = door(mount)
    file, _, _ = reader.open("model/ramp.bin")
    mount.kill()
    with pytest.raises(StoreError), reader.lease(file, 0, 4):
        pass
    reader.close()

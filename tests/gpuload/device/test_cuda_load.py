"""The whole loader on a real GPU, against safetensors' own bits there; skipped, and said so, where there is none.

tools/gpu/run runs it. Nothing here needs a network, a mount or root.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file

import gpuload
from gpuload.client.asking import load_resident
from gpuload.client.attached import attach
from gpuload.client.tensors import TORCH_DTYPES
from gpuload.device import open_device
from gpuload.errors import FitError
from gpuload.moving.pipeline import Limits
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, random_tensors, running_server, write
from mfs.safetensors import DTYPE_BITS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: torch sees no GPU on this machine")
DEVICE = "cuda:0"
GIB = 1 << 30


def raw_file(path: Path, dtype: str) -> Path:
    """One tensor of any dtype behind one odd byte."""
    nbytes = 3 * 4 * 6 * DTYPE_BITS[dtype] // 8
    table = {
        "lead": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": dtype, "shape": [3, 4, 6], "data_offsets": [1, 1 + nbytes]},
    }
    header = json.dumps(table).encode()
    data = bytes(i % (2 if dtype == "BOOL" else 251) for i in range(1 + nbytes))
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_is_bit_identical(dtype: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", dtype)
    want = reference_load_file(path)
    got = gpuload.load_file(path, DEVICE)
    assert {t.device.type for t in got.values()} == {"cuda"}
    assert_same(got, want)
    assert_same(dict(gpuload.stream(path, DEVICE)), want)
    with gpuload.safe_open(path, device=DEVICE) as f:
        assert_same({name: f.get_tensor(name) for name in f.keys()}, want)  # noqa: SIM118


def test_rows_columns_and_many_batches(tmp_path: Path) -> None:
    """Larger than all staging buffers, cut by rows and by columns, into memory that kernels have just let go."""
    made = random_tensors(1, {"a.q_proj.weight": (4096, 2048), "a.o_proj.weight": (2048, 4096), "n": (77,)})
    path = write(tmp_path / "x.safetensors", made)
    limits = Limits(buffer_bytes=1 << 20, buffers_count=3)
    for rank in range(4):
        busy = [torch.randn(2048, 2048, device=DEVICE) for _ in range(4)]
        for _ in range(20):
            busy[0] = busy[0] @ busy[1]
        del busy
        got = gpuload.load_model(path, DEVICE, rank=rank, world=4, limits=limits)
        assert torch.equal(
            got["a.q_proj.weight"].cpu().view(torch.int16), made["a.q_proj.weight"].chunk(4, 0)[rank].view(torch.int16)
        )
        assert torch.equal(
            got["a.o_proj.weight"].cpu().view(torch.int16),
            made["a.o_proj.weight"].chunk(4, 1)[rank].contiguous().view(torch.int16),
        )
    with gpuload.safe_open(path, device=DEVICE) as f:
        assert torch.equal(
            f.get_slice("a.o_proj.weight")[:, 5:99].cpu().view(torch.int16),
            made["a.o_proj.weight"][:, 5:99].view(torch.int16),
        )


def test_the_callers_device_stays_current(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", random_tensors(1, {"a": (1000, 1000)}))
    before = torch.cuda.current_device()
    gpuload.load_file(path, torch.cuda.device_count() - 1)
    assert torch.cuda.current_device() == before
    assert float(torch.ones(3, device=DEVICE).sum()) == 3


def test_an_arena_that_does_not_fit_is_refused() -> None:
    device = open_device(DEVICE)
    with pytest.raises(FitError):
        device.create_arena(device.memory().total_bytes * 2)
    device.close()


@pytest.fixture
def server(config: ServerConfig) -> Iterator[ServerThread]:
    with running_server(replace(config, arena_bytes={DEVICE: 2 * GIB}, limits=Limits()), open_device) as running:
        yield running


ATTACHED = """
import sys, time, torch
from gpuload.client.attached import attach
from gpuload.testing import bits
import hashlib
torch.cuda.init()
began = time.monotonic()
held = attach(sys.argv[1], socket_path=sys.argv[2])
seconds = time.monotonic() - began
total = sum(float(t.to(torch.float32).abs().nan_to_num(0, 0, 0).sum() >= 0) for t in held.values())  # kernels read all
print(seconds, int(total), hashlib.sha256(b"".join(bits(held[n]) for n in sorted(held))).hexdigest(), flush=True)
sys.stdin.read()
"""


def test_a_fresh_process_attaches_computes_and_dies(server: ServerThread, tmp_path: Path) -> None:
    """Zero-copy tensors of another process; its death by SIGKILL gives the lease back, and the weights stay."""
    import hashlib

    from gpuload.testing import bits

    made = random_tensors(1, {f"w.{i}": (1024, 4096) for i in range(20)})
    path = write(tmp_path / "x.safetensors", made)
    load_resident(path, "m", DEVICE, socket_path=server.socket_path)
    command = [sys.executable, "-c", ATTACHED, "m", server.socket_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        _, count, digest = child.stdout.readline().split()
        assert int(count) == len(made)
        assert digest == hashlib.sha256(b"".join(bits(made[n]) for n in sorted(made))).hexdigest()
        assert server.gauges(DEVICE)["leases"] == 1
        os.kill(child.pid, signal.SIGKILL)
    server.settle()
    assert server.gauges(DEVICE)["leases"] == 0
    held = attach("m", socket_path=server.socket_path)
    assert_same(held, made)
    del held
    gc.collect()


def test_a_swap_moves_what_differs(server: ServerThread, tmp_path: Path) -> None:
    old = random_tensors(1, {f"w.{i}": (1024, 4096) for i in range(20)})
    new = old | {"w.7": random_tensors(2, {"x": (1024, 4096)})["x"]}
    where = {"socket_path": server.socket_path}
    load_resident(write(tmp_path / "a.safetensors", old), "m", DEVICE, **where)
    held = attach("m", **where)
    report = load_resident(write(tmp_path / "b.safetensors", new), "m", DEVICE, is_swap=True, **where)["report"]
    assert report["bytes_copied"] == new["w.7"].nbytes
    now = attach("m", **where)
    assert_same(held, old)
    assert_same(now, new)
    del held, now
    gc.collect()

"""The hook in real, unmodified programs: safetensors and transformers in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import gpuload
from gpuload.testing import ServerThread, random_tensors, write

one_way = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])
"""Processes are slow to start: the staged way has its own tests."""

SITE = Path(gpuload.__file__).parent / "hooks" / "site"


def run(code: str, *args: object, socket_path: str | None, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, with the hook on, as `gpuload run` starts it."""
    environment = {**os.environ, "GPULOAD_AUTO": "1", "PYTHONPATH": str(SITE), **env}
    environment["GPULOAD_SOCKET"] = socket_path or "/nonexistent/gpuload.sock"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return done


USE = """
import sys
{early}
import torch
import gpuload.client
from gpuload.device.host import HostDevice
gpuload.client.open_device = lambda name: HostDevice(granule_bytes=4096)
from safetensors.torch import load_file
from safetensors import safe_open
def digest(t):
    return t.contiguous().flatten().view(torch.uint8).to(torch.int64).mul(torch.arange(t.nbytes) % 1009).sum().item()
path = sys.argv[1]
one = load_file(path)
print("load_file", {{k: digest(t) for k, t in sorted(one.items())}})
with safe_open(path, "pt") as f:
    print("get_tensor", digest(f.get_tensor("w")), f.keys(), f.metadata())
    s = f.get_slice("w")
    print("get_slice", digest(s[3:9, 5:]), s.get_shape(), s.get_dtype())
with safe_open(path, "np") as f:
    print("numpy", f.get_tensor("h").sum())
try:
    with safe_open(path, "pt") as f:
        f.get_tensor("absent")
except Exception as e:
    print(type(e).__name__, e)
one["w"].zero_()
print("again", digest(load_file(path)["w"]))
"""


@one_way
@pytest.mark.parametrize(
    "early",
    [
        "",
        "from safetensors import safe_open; from safetensors.torch import load_file",
        "import importlib.util as u; assert u.find_spec('safetensors') and u.find_spec('safetensors')",
    ],
    ids=["late", "imported before", "asked for before"],
)
def test_unmodified_safetensors_is_served_and_cannot_tell(server: ServerThread, tmp_path: Path, early: str) -> None:
    path = write(
        tmp_path / "a.safetensors", {**random_tensors(1, {"w": (64, 200)}), **random_tensors(2, {"h": (9,)}, "F32")}
    )
    code = USE.format(early=early)
    plain = run(code, path, socket_path=None, GPULOAD_AUTO="0")
    served = run(code, path, socket_path=server.socket_path)
    assert served.stdout == plain.stdout
    gauges = server.gauges()
    assert (gauges["models"], gauges["leases"]) == (1, 0), "the file is resident, and nobody holds it any more"


def test_without_a_server_it_is_silent_but_for_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (64, 200), "h": (9,)}, "F32"))
    code = USE.format(early="")
    plain = run(code, path, socket_path=None, GPULOAD_AUTO="0")
    alone = run(code, path, socket_path=None)
    assert alone.stdout == plain.stdout
    lines = [line for line in alone.stderr.splitlines() if line]
    assert len(lines) == 1, alone.stderr
    assert "without the server" in lines[0]


REPLACED = """
import os, sys
import gpuload.client
from gpuload.device.host import HostDevice
gpuload.client.open_device = lambda name: HostDevice(granule_bytes=4096)
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as f:
    os.replace(sys.argv[2], sys.argv[1])
    print(f.get_tensor("w").tolist())
with safe_open(sys.argv[1], "pt") as f:
    print(f.get_tensor("w").tolist())
"""


@one_way
def test_a_file_replaced_while_open_is_not_mixed_with_the_new_one(server: ServerThread, tmp_path: Path) -> None:
    made = [random_tensors(i, {"w": (4,)}, "I32") for i in (1, 2)]
    old, new = (write(tmp_path / f"{i}.safetensors", t) for i, t in enumerate(made))
    out = run(REPLACED, old, new, socket_path=server.socket_path).stdout.splitlines()
    assert out == [str(t["w"].tolist()) for t in made]


def test_a_program_that_loads_nothing_pays_nothing() -> None:
    code = "import sys; print([m for m in ('torch', 'safetensors', 'trio', 'gpuload.client') if m in sys.modules])"
    assert run(code, socket_path=None).stdout.strip() == "[]"


def test_the_hidden_sitecustomize_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.hidden_ran = True")
    code = "import sys; print(sys.hidden_ran, any('gpuload.hooks.auto' == m for m in sys.modules))"
    assert run(code, socket_path=None, PYTHONPATH=f"{SITE}:{tmp_path}").stdout.split() == ["True", "True"]


TRANSFORMERS = """
import sys, torch
import gpuload.client
from gpuload.device.host import HostDevice
gpuload.client.open_device = lambda name: HostDevice(granule_bytes=4096)
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
total = sum(p.detach().double().abs().sum().item() for p in model.parameters())
with torch.no_grad():
    out = model(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state
print(repr(total), repr(out.double().sum().item()))
if len(sys.argv) > 2:
    import os
    held = sum("gpuload-arena" in line for line in open("/proc/self/maps"))
    print("mapped", held > 0)
"""


@one_way
def test_transformers_loads_through_the_pool(server: ServerThread, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    assert load_file(tmp_path / "bert" / "model.safetensors")
    plain = run(TRANSFORMERS, tmp_path / "bert", socket_path=None, GPULOAD_AUTO="0")
    served = run(TRANSFORMERS, tmp_path / "bert", "mapped", socket_path=server.socket_path)
    assert served.stdout.splitlines()[0] == plain.stdout.splitlines()[0]
    assert server.gauges()["models"] == 1

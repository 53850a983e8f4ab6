"""Run:ai's streamer and InstantTensor, the real packages, in hooked processes; tools/hooks/run installs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gpuload.testing import ServerThread, random_tensors, write
from mfs.testing.mounting import TestMount
from tests.gpuload.hooks.conftest import run_hooked


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed: tools/hooks/run runs these"
    )


SAID = """
import hashlib, sys, torch
def said(name, t):
    raw = t.detach().cpu().contiguous().flatten()
    raw = raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""
    return name, str(t.dtype), tuple(t.shape), str(t.device), hashlib.sha256(raw).hexdigest()
def told(work):
    try:
        return work()
    except Exception as e:
        return type(e).__name__, str(e)
"""

STREAM = (
    SAID
    + """
from runai_model_streamer import SafetensorsStreamer
from runai_model_streamer.safetensors_streamer.safetensors_streamer import SafetensorsStreamer as same
assert same is SafetensorsStreamer
files = sys.argv[1:]
def all_of(streamer):
    shown = [[(m.name, m.dtype, m.shape, m.get_bytesize()) for m in ms]
        for _, ms in sorted(streamer.files_to_tensors_metadata.items())]
    return shown, streamer.total_size, sorted(said(*item) for item in streamer.get_tensors())
with SafetensorsStreamer() as streamer:
    streamer.stream_files(files)
    print(all_of(streamer))
    streamer.stream_file(files[0], device="cpu")
    print(all_of(streamer))
    streamer.stream_files(paths=files, tensor_names=["w.1"])
    print(all_of(streamer))
    print(told(lambda: streamer.stream_files(files, tensor_names=["absent"])))
    print(told(lambda: streamer.stream_files([files[0] + ".absent"]))[0])
import gpuload.hooks.counts as c
print(repr(c.counts), file=sys.stderr)
"""
)


def model_files(folder: Path) -> list[Path]:
    made = [random_tensors(i, {f"w.{i}": (30, 40), f"b.{i}": (3,)}) for i in range(3)]
    made[1] |= random_tensors(9, {"e": (0, 3), "s": ()}, "F32")
    folder.mkdir(parents=True)
    return [write(folder / f"{i}.safetensors", part) for i, part in enumerate(made)]


@needs("runai_model_streamer")
def test_runais_streamer_gives_the_same_and_cannot_tell(
    resident: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server, from a mount without one, and by itself: names, types, shapes, bits, tables and errors."""
    files = model_files(tmp_path / "registry" / "model")
    plain = run_hooked(STREAM, *files, socket_path=None, GPULOAD_AUTO="0")
    served = run_hooked(STREAM, *files, socket_path=resident.socket_path)
    assert served.stdout == plain.stdout
    assert "served 10, streamed 0" in served.stderr, (
        "eight of all files and two of the first; a choice is the library's"
    )
    alone = run_hooked(STREAM, *files, socket_path=None)
    assert alone.stdout == plain.stdout
    assert "served 0, streamed 0" in alone.stderr
    with TestMount(tmp_path / "m", str(tmp_path / "registry")) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        mounted = run_hooked(STREAM, *(mount.path / "model" / file.name for file in files), socket_path=None)
    assert mounted.stdout == plain.stdout
    assert "served 0, streamed 10" in mounted.stderr


INSTANT = (
    SAID
    + """
from types import SimpleNamespace
import torch
torch.cuda.mem_get_info = lambda *_: (1 << 34, 1 << 34)
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(is_integrated=False)
from instanttensor import safe_open
import os
if os.environ["GPULOAD_AUTO"] == "1":  # the card's part is played by host memory
    from gpuload.hooks import streamers
    plain = streamers.weights_of
    streamers.has_arena = lambda device: device == "cuda:0"
    streamers.weights_of = lambda files, device, by_index: plain(files, device="cpu", by_index=by_index)
files = sys.argv[1:]
opened = safe_open(list(files), "pt", "cuda:0", load_now=False)
print(opened.keys() == opened.offset_keys(), opened.keys(), opened.metadata(), opened.total_tensor_size)
print([opened.get_tensor_metadata(name) for name in opened.keys()], opened.filename, opened.device, opened.copy)
for given in ({"device": "cpu"}, {"framework": "np"}, {"tensor_name_match_mode": "nonsense"},
        {"filename": files[0] + ".absent"}):
    usual = {"filename": files, "framework": "pt", "device": "cuda:0", "load_now": False}
    print(told(lambda: safe_open(**usual | given).device))
if os.environ["GPULOAD_AUTO"] == "1":
    with opened as f:
        got = [said(*item) for item in f.tensors()]
        print("once", told(lambda: list(f.tensors())), file=sys.stderr)
    from safetensors.torch import load  # of bytes, which is the library's own
    want = {}
    for file in files:
        with open(file, "rb") as f:
            want |= {name: said(name, tensor) for name, tensor in load(f.read()).items()}
    assert sorted(got) == sorted(want.values())
    import gpuload.hooks.counts as c
    print(repr(c.counts), file=sys.stderr)
"""
)


@needs("instanttensor")
def test_instanttensor_gives_what_the_files_hold_and_its_own_tables(resident: ServerThread, tmp_path: Path) -> None:
    """It loads to cards alone, so its own tensors are not to be had here: tables and errors are."""
    files = model_files(tmp_path / "model")
    plain = run_hooked(INSTANT, *files[::-1], socket_path=None, GPULOAD_AUTO="0")
    served = run_hooked(INSTANT, *files[::-1], socket_path=resident.socket_path)
    assert served.stdout == plain.stdout
    assert "served 8, streamed 0" in served.stderr
    assert "once ('RuntimeError'," in served.stderr

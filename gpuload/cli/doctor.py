"""What this machine lacks for gpuload, one finding per line, each with what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpuload.hooks import pth
from gpuload.paths import default_digests, default_socket
from mfs.errors import MfsError
from mfs.units import format_size


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    """'ok', 'note' (works, with a limit), or 'bad' (that part cannot work)."""
    detail: str


def examine(socket_path: str | None = None) -> Iterator[Finding]:
    """Look at everything; changes nothing, never raises for what it finds."""
    yield Finding("python", "ok", sys.version.split()[0])
    for package in ("torch", "safetensors", "blake3", "trio"):
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "bad", "not installed: pip install 'mfs[gpuload]'")
    yield _shared_memory()
    yield _cuda()
    yield _descriptors()
    yield _maps()
    yield _digests()
    yield _server(socket_path)
    installed = pth.is_installed()
    yield Finding("hook", "ok" if installed else "note", str(pth.location()) if installed else "no .pth installed")


def _shared_memory() -> Finding:
    from gpuload.device.host import HostDevice
    from gpuload.wire import close_all

    device = HostDevice()
    try:
        arena = device.create_arena(device.granule_bytes)
        fds = arena.export([(0, 1)])
        device.attach(fds, [(0, 1)]).close()
        close_all(fds)
        arena.close()
    except (MfsError, OSError) as error:
        return Finding("shared memory", "bad", f"sealed memfds do not work here: {error}")
    memory = device.memory()
    return Finding("shared memory", "ok", f"{format_size(memory.free_bytes)} free of {format_size(memory.total_bytes)}")


def _cuda() -> Finding:
    from gpuload.device.cuda import CudaDevice

    try:
        device = CudaDevice(0)
        memory = device.memory()
        detail = f"{device.model_name()}, {format_size(memory.free_bytes)} free of {format_size(memory.total_bytes)}"
        device.close()
    except MfsError as error:
        return Finding("cuda", "note", f"{error}; device 'cpu' works")
    return Finding("cuda", "ok", detail)


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} open files allowed (hard limit {hard})"
    if soft < 4096:
        return Finding(
            "descriptors", "note", f"{detail}; a 16 GB model on CUDA is passed in 2000: raise it (ulimit -n)"
        )
    return Finding("descriptors", "ok", detail)


def _maps() -> Finding:
    try:
        with open("/proc/sys/vm/max_map_count") as file:
            count = int(file.read())
    except (OSError, ValueError) as error:
        return Finding("mappings", "note", f"cannot read vm.max_map_count: {error}")
    return Finding("mappings", "ok" if count >= 65530 else "note", f"vm.max_map_count is {count}")


def _digests() -> Finding:
    from gpuload.server.digest_files import trouble_with

    folder = Path(default_digests())
    if not folder.exists():
        return Finding("digests", "ok", f"none kept in {folder} yet; `gpuload digest MODEL` computes them ahead")
    trouble = trouble_with(folder)
    if trouble is not None:
        return Finding("digests", "note", f"not used: {trouble}; every swap reads its files whole")
    return Finding("digests", "ok", f"of {sum(1 for _ in folder.glob('*.digests'))} files in {folder}")


def _server(socket_path: str | None) -> Finding:
    from gpuload.client.asking import ask

    path = socket_path or default_socket()
    try:
        reply = ask({"op": "ping"}, socket_path=path, timeout_s=5)
    except MfsError as error:
        state = "bad" if os.path.exists(path) else "note"
        return Finding("server", state, str(error))
    return Finding("server", "ok", f"process {reply['pid']} at {path}")

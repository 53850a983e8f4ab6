"""What this machine lacks for gpuload, in the words of `mfs.findings`; `doctor_cuda` has driver, wheel and cards."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpuload.cli import doctor_cuda
from gpuload.cli.doctor_cuda import Compatibility
from gpuload.hooks import pth
from gpuload.paths import default_digests, default_socket
from mfs import limits
from mfs.errors import MfsError
from mfs.findings import Finding, fault, note, ok, warning
from mfs.planning import machine
from mfs.units import format_size


def examine(
    socket_path: str | None = None, wanted: Sequence[str] = (), table: Compatibility | None = None
) -> Iterator[Finding]:
    """Look at everything; changes nothing, never raises for what it finds.

    wanted: devices that somebody means to use. table: is filled in with what fits what.
    """
    yield ok("python", sys.version.split()[0])
    for package in ("safetensors", "blake3", "trio"):
        try:
            yield ok(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield fault(package, "not installed", "pip install 'mfs[gpuload]'")
    yield _shared_memory()
    yield from doctor_cuda.examine(table if table is not None else Compatibility(), wanted)
    yield _host_copies()
    yield _page_locking()
    yield _descriptors()
    yield machine.mappings()
    yield _digests()
    yield _server(socket_path)
    installed = pth.is_installed()
    yield (
        ok("hook", str(pth.location())) if installed else note("hook", "no .pth installed: `gpuload run` works without")
    )


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
        return fault("shared memory", f"sealed memfds do not work here: {error}", "Linux 5.1 or newer, and no seccomp "
                     "filter in the way")  # fmt: skip
    memory = device.memory()
    return ok("shared memory", f"{format_size(memory.free_bytes)} free of {format_size(memory.total_bytes)}")


def _host_copies() -> Finding:
    from gpuload.device.host import HostDevice

    try:
        rate = doctor_cuda.copy_speed(HostDevice())
    except MfsError as error:
        return warning("cpu: copies", f"could not be measured: {error}", "free some memory")
    return ok("cpu: copies", f"{rate / 1e9:.1f} GB/s inside host memory, by one stream")


def _page_locking() -> Finding:
    """What staging takes; the driver locks it, and a control group counts it."""
    from gpuload.moving.pipeline import Limits

    ring, found = Limits().buffer_bytes * Limits().buffers_count, limits.available()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
    free = f"{format_size(found.free_bytes)} free ({found.bound_by})"
    value = f"a load stages in {format_size(ring)}; {free}, memlock {locked}"
    if ring > found.free_bytes:
        return fault("page-locked memory", value, "free some memory, or raise that limit")
    return ok("page-locked memory", value)


def _descriptors() -> Finding:
    """The server and its clients raise the soft limit to the hard one by themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft} open files allowed (hard limit {hard})"
    if hard != resource.RLIM_INFINITY and hard < machine.DESCRIPTORS_LOW:
        return warning(
            "descriptors",
            value,
            "a 16 GB model on CUDA is passed in 2000: raise the hard limit (systemd: LimitNOFILE=)",
        )
    return ok("descriptors", value)


def _digests() -> Finding:
    from gpuload.server.digest_files import trouble_with

    folder = Path(default_digests())
    if not os.path.exists(folder):
        return ok("digests", f"none kept in {folder} yet; `gpuload digest MODEL` computes them ahead")
    trouble = trouble_with(folder)
    if trouble is not None:
        return warning(
            "digests", f"not used: {trouble}", f"chmod go-w {folder}: until then every swap reads its files whole"
        )
    return ok("digests", f"of {sum(1 for _ in folder.glob('*.digests'))} files in {folder}")


def _server(socket_path: str | None) -> Finding:
    from gpuload.client.asking import ask

    path = socket_path or default_socket()
    try:
        reply = ask({"op": "ping"}, socket_path=path, timeout_s=5)
    except MfsError as error:
        if socket_path or os.path.exists(path):  # somebody asked for it, or it was there
            return fault("server", str(error), _server_advice(path))
        return note("server", str(error), "loading without one works")
    return ok("server", f"process {reply['pid']} at {path}")


def _server_advice(path: str) -> str:
    try:
        owner = os.stat(path).st_uid
    except OSError:
        return "start it: gpuload serve"
    if owner != os.geteuid():
        return f"the socket belongs to uid {owner}: `gpuload serve --mode 666` lets others attach"
    return "it has ended: start it again with gpuload serve"

"""What the machine, its limits and its control groups leave to a mount: memory, processors, descriptors, mappings."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from mfs import limits
from mfs.cache.ram import PROCESS_BYTES, RamConfig, RamTier
from mfs.errors import ConfigError
from mfs.findings import Finding, fault, note, ok, warning
from mfs.planning.wanted import Wanted
from mfs.tracing import settings
from mfs.units import format_size

DESCRIPTORS_LOW = 4096
"""The daemon keeps one for each object in RAM, and what is open by passthrough; usual hard limits are far above."""
MAPPINGS_LOW = 65_530
"""The kernel's default of vm.max_map_count, of which a mount uses half for its objects."""
PROCESSES_LOW = 512
"""A mount has some 100 threads in its workers; whoever reads beside it has his own."""


def examine(wanted: Wanted, root: Path = Path("/")) -> Iterator[Finding]:
    """root: of the tree that /proc and /sys are read from."""
    yield descriptors()
    yield memlock()
    yield mappings(root)
    yield _processes(root)
    yield _file_size(wanted)
    yield from _memory(wanted)
    yield _cpus(wanted, root)
    yield _huge_pages(root)


def descriptors() -> Finding:
    """RLIMIT_NOFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{_limit(soft)} open files, up to {_limit(hard)}"
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS_LOW:
        return warning(
            "descriptors", value,
            f"raise the hard limit to {DESCRIPTORS_LOW} or more (ulimit -Hn; systemd: LimitNOFILE=; "
            f"docker: --ulimit nofile=)",
        )  # fmt: skip
    return ok("descriptors", value)


def memlock() -> Finding:
    """RLIMIT_MEMLOCK. mfs locks nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited")
    value = f"{format_size(soft)}, up to {'unlimited' if hard == resource.RLIM_INFINITY else format_size(hard)}"
    return ok("locked memory", f"{value}; mfs locks none, CUDA's own locking is not counted by it")


def mappings(root: Path = Path("/")) -> Finding:
    """vm.max_map_count."""
    try:
        count = int((root / "proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError) as error:
        return note("mappings", f"vm.max_map_count cannot be read: {error}")
    if count < MAPPINGS_LOW:
        return warning("mappings", f"vm.max_map_count is {count}", f"as root: sysctl vm.max_map_count={MAPPINGS_LOW}")
    return ok("mappings", f"vm.max_map_count is {count}")


def _processes(root: Path) -> Finding:
    found = limits.processes(root)
    if math.isinf(found.value):
        return ok("processes", "no limit can be seen")
    value = f"{found.value:,.0f} more processes and threads: {found.bound_by}"
    if found.value < PROCESSES_LOW:
        return warning("processes", value, "raise that limit (systemd: TasksMax=; docker: --pids-limit)")
    return ok("processes", value)


def _file_size(wanted: Wanted) -> Finding:
    """RLIMIT_FSIZE, up to which a mount raises its own: an object of the cache or of RAM is one file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hard == resource.RLIM_INFINITY:
        return ok("file size", "unlimited")
    value = f"files of {format_size(hard)} at most (ulimit -f)"
    return fault("file size", value, "a model's file is one file here too: ulimit -f unlimited (systemd: LimitFSIZE=)")


def _memory(wanted: Wanted) -> Iterator[Finding]:
    found = limits.available()
    value = f"{format_size(found.free_bytes)} free of {format_size(found.total_bytes)}: {found.bound_by}"
    is_traced = settings.is_wanted(os.environ) and not settings.fault(os.environ)
    beside = PROCESS_BYTES * (1 + wanted.workers_count + is_traced)
    try:
        tier = RamTier(RamConfig(wanted.ram_bytes, beside))
    except ConfigError:
        yield fault(
            "memory", f"{value}; --ram-size {format_size(wanted.ram_bytes)} and {format_size(beside)} for processes "
            f"do not fit", "lower --ram-size, raise the limit or free memory",
        )  # fmt: skip
        return
    lacks = tier.note
    tier.close()
    yield ok("memory", f"{value}; --ram-size {format_size(wanted.ram_bytes)} fits")
    if lacks:
        yield note("memory of a mount", lacks, "mount as root, on Linux 6.4 or newer")
    else:
        yield ok("memory of a mount", "in huge pages as far as there are any, never swapped out")


def _cpus(wanted: Wanted, root: Path) -> Finding:
    found = limits.cpus(root)
    value = f"{found.value:g} of {os.cpu_count()} processors: {found.bound_by}"
    if found.value < 1:
        return warning(
            "processors", value, "a quota below one processor throttles every read: raise it, or take it away"
        )
    if found.value < 1 + wanted.workers_count:
        return note("processors", value, "daemon and workers share them with whoever reads")
    return ok("processors", value)


def _huge_pages(root: Path) -> Finding:
    place = root / "sys/kernel/mm/transparent_hugepage"
    try:
        words = {name: _chosen((place / name).read_text()) for name in ("enabled", "shmem_enabled")}
    except OSError:
        return note("huge pages", "this kernel has no transparent huge pages", "reads from RAM cost more CPU")
    value = f"transparent: {words['enabled']}, for shared memory: {words['shmem_enabled']}"
    if words["shmem_enabled"] == "deny":
        return warning("huge pages", value, "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if os.geteuid() and words["shmem_enabled"] == "never":
        return note(
            "huge pages", value, "without root the RAM tier is a memfd, which has huge pages only by "
            "'echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled'",
        )  # fmt: skip
    return ok("huge pages", value)


def _chosen(text: str) -> str:
    """The word in brackets of 'always [madvise] never'."""
    return text.partition("[")[2].partition("]")[0] or text.strip()


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"

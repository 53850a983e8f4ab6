"""How much this process may still take: the machine's own word, and every control group above the process.

Whoever goes beyond a group's limit is killed by the kernel, so what is asked here is the least of all that bind: the
machine (MemAvailable), RLIMIT_AS, and of each control group from the process's own up to the root as far as it can be
seen, limit - (used - page cache that the kernel would drop first). Pages of files are dropped before anybody is killed;
those of shared memory (shmem, our slots among them) are not, and do not count as such.

Both versions of control groups, also beside each other, with and without a namespace of them. Groups above the root of
a namespace cannot be seen; where the kernel tells what they allow (v1: hierarchical_memory_limit), it is counted.
Sources: proc_pid_mountinfo(5), cgroups(7), cgroup_namespaces(7), Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst of the kernel.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUPS_MAX = 10_000
"""Directories looked into for a process whose place the kernel does not name; a large node has some thousand groups."""

_UNSEEN_ROOT = "sys/fs/cgroup"
"""Where a container's groups stand by custom, if the table of mounts says nothing that is there (gVisor, say)."""


@dataclass(frozen=True)
class Bound:
    """A number that may not be exceeded."""

    value: float
    bound_by: str
    """What sets it, for messages, as in `Available`."""


@dataclass(frozen=True)
class Available:
    """Memory, in bytes."""

    total_bytes: int
    """Of the machine, or the lowest limit if that is less."""
    free_bytes: int
    """What this process may still take, at least 0."""
    bound_by: str
    """What the free bytes come from, for messages: 'this machine', 'the control group /x (memory.max)'."""


def available(root: Path = Path("/"), pid: int | None = None) -> Available:
    """Read everything anew. What cannot be read does not bind.

    root: of the tree that /proc and the groups are read from. pid: whose limits; None is this process, whose RLIMIT_AS
    counts as well.
    """
    machine = _fields(root / "proc/meminfo")
    total = machine.get("MemTotal", 0) << 10
    bounds = [(total, machine.get("MemAvailable", 0) << 10, "this machine")]
    for group, is_own in groups(root, pid).items():
        bounds += _bounds(group, root, is_own=is_own)
    if pid is None:
        bounds += _address_space(root)
    least = min(bounds, key=lambda bound: bound[1])
    return Available(min(bound[0] for bound in bounds), max(0, least[1]), least[2])


def cpus(root: Path = Path("/"), pid: int | None = None) -> Bound:
    """How many processors a process may use at a time: its affinity, or the least quota of a group above it.

    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max), Documentation/scheduler/sched-bwc.rst (v1).
    """
    bounds = [Bound(len(os.sched_getaffinity(pid or 0)), "its affinity")]
    for group in groups(root, pid, "cpu"):
        for name, quota_us, period_us in _quotas(group):
            if quota_us > 0 and period_us > 0:
                bounds.append(Bound(quota_us / period_us, f"the control group {_shown(group, root)} ({name})"))
    return min(bounds, key=lambda bound: bound.value)


def processes(root: Path = Path("/"), pid: int | None = None) -> Bound:
    """How many processes and threads there may still be: of the machine, of the user, of every group above.

    Source: Documentation/admin-guide/cgroup-v2.rst (pids.max), getrlimit(2) (RLIMIT_NPROC, which does not bind root).
    """
    running = int((_read(root / "proc/loadavg").split() or ["", "", "", "0/0"])[3].partition("/")[2] or 0)
    bounds = []
    for name in ("pid_max", "threads-max"):
        most = _number(root / "proc/sys/kernel" / name)
        if most is not None:
            bounds.append(Bound(most - running, f"kernel.{name}"))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if pid is None and soft != resource.RLIM_INFINITY and os.geteuid():
        bounds.append(Bound(soft, "RLIMIT_NPROC (ulimit -u)"))
    for group in groups(root, pid, "pids"):
        most, used = _number(group / "pids.max"), _number(group / "pids.current")
        if most is not None:
            bounds.append(Bound(most - (used or 0), f"the control group {_shown(group, root)} (pids.max)"))
    return min(bounds, key=lambda bound: bound.value, default=Bound(float("inf"), "nothing that can be seen"))


def groups(root: Path = Path("/"), pid: int | None = None, controller: str = "memory") -> dict[Path, bool]:
    """The directories of the control groups that may bound a process: whether it is in them itself.

    controller: what they bound: 'memory', 'cpu', 'pids'.
    """
    own = root / "proc" / ("self" if pid is None else str(pid))
    number = os.getpid() if pid is None else pid
    found: dict[Path, bool] = {}
    places = list(_places(own / "cgroup", controller))
    for kind, mounted, mountpoint in _mounts(own / "mountinfo", controller):
        top = root / mountpoint.lstrip("/")
        for its_kind, path in places:
            group = _find(top, mounted, path, number) if its_kind == kind else None
            if group is not None:
                found[group] = True
                for above in group.parents[: len(group.parts) - len(top.parts)]:
                    found.setdefault(above, False)
    if not found:
        unseen = (root / _UNSEEN_ROOT, root / _UNSEEN_ROOT / controller)
        found = {place: True for place in unseen if place.is_dir()}
    return found


def _places(table: Path, controller: str) -> Iterator[tuple[str, str]]:
    """('cgroup2' or 'cgroup', path) of a process in the hierarchies that may have the controller."""
    for line in _read(table).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif controller in controllers.split(","):
            yield "cgroup", path


def _mounts(table: Path, controller: str) -> Iterator[tuple[str, str, str]]:
    """(kind, directory of the hierarchy that is mounted, mount point) of those hierarchies."""
    for line in _read(table).splitlines():
        fields = line.split(" ")
        try:
            dash = fields.index("-", 6)
            mounted, mountpoint, kind, options = fields[3], fields[4], fields[dash + 1], fields[dash + 3]
        except (ValueError, IndexError):
            continue
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            yield kind, _unescaped(mounted), _unescaped(mountpoint)


def _find(top: Path, mounted: str, path: str, pid: int) -> Path | None:
    """The directory of the group `path`, where the directory `mounted` of its hierarchy stands at `top`.

    Both are said from the root of the reader's namespace: '/../..' stands two groups above it, whose names are not
    told. None if the group is not below `top`, or is gone.
    """
    above, shown = _from_root(mounted)
    ups, parts = _from_root(path)
    if ups == above and parts[: len(shown)] == shown:
        below = parts[len(shown) :]
    elif ups < above and not shown:
        return _search(top, above - ups, parts, pid)
    else:
        return None
    place = top.joinpath(*below)
    return place if place.is_dir() else None


def _from_root(path: str) -> tuple[int, list[str]]:
    """('/../../a/b') -> (2, [a, b])."""
    parts = [part for part in path.split("/") if part]
    ups = sum(1 for _ in itertools.takewhile(lambda part: part == "..", parts))
    return ups, parts[ups:]


def _search(top: Path, depth: int, parts: list[str], pid: int) -> Path | None:
    """The group `parts` that holds the process, below some group that lies `depth` levels under `top`."""
    level, looked = [top], 0
    for _ in range(depth):
        below: list[Path] = []
        for folder in level:
            try:
                below += [Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
            if len(below) + looked > _GROUPS_MAX:
                return None
        level, looked = below, looked + len(below)
    for folder in level:
        place = folder.joinpath(*parts)
        if str(pid) in _read(place / "cgroup.procs").split():
            return place
    return None


def _bounds(group: Path, root: Path, *, is_own: bool) -> Iterable[tuple[int, int, str]]:
    """(limit, free, name) of every limit that this group sets."""
    cache = _fields(group / "memory.stat")
    limits: list[tuple[str, int | None, int | None]]
    name = _shown(group, root)
    if (used := _number(group / "memory.current")) is not None:  # version 2
        dropped = cache.get("inactive_file", 0) + cache.get("active_file", 0)
        # Beyond memory.high nobody is killed, but everybody is slowed down until they go back.
        limits = [(limit, _number(group / limit), used) for limit in ("memory.max", "memory.high")]
    elif is_own or _read(group / "memory.use_hierarchy").strip() != "0":  # before Linux 5.11 a group could stand alone
        dropped = cache.get("total_inactive_file", 0) + cache.get("total_active_file", 0)
        used = _number(group / "memory.usage_in_bytes")
        both = _number(group / "memory.memsw.usage_in_bytes")
        limits = [
            ("memory.limit_in_bytes", _number(group / "memory.limit_in_bytes"), used),
            ("memory.memsw.limit_in_bytes", _number(group / "memory.memsw.limit_in_bytes"), both),
            ("hierarchical_memory_limit", cache.get("hierarchical_memory_limit"), used),
        ]
    else:
        return
    for kind, limit, taken in limits:
        if limit is not None and taken is not None:
            yield limit, limit - max(0, taken - dropped), f"the control group {name} ({kind})"


def _quotas(group: Path) -> Iterable[tuple[str, int, int]]:
    """(name, quota, period), in microseconds, of what a group allows its processes of all processors."""
    words = _read(group / "cpu.max").split()  # version 2; 'max' instead of a number is no quota
    if len(words) == 2 and all(word.isdecimal() for word in words):
        yield "cpu.max", int(words[0]), int(words[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    if quota is not None and period is not None:  # -1 instead of a number is no quota
        yield "cpu.cfs_quota_us", quota, period


def _shown(group: Path, root: Path) -> str:
    return "/" + str(group.relative_to(root))


def _address_space(root: Path) -> Iterable[tuple[int, int, str]]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read(root / "proc/self/statm").split()
    if soft != resource.RLIM_INFINITY and pages:
        yield soft, soft - int(pages[0]) * resource.getpagesize(), "RLIMIT_AS (ulimit -v)"


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number, as in meminfo and memory.stat."""
    found = {}
    for line in _read(file).splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1])
    return found


def _number(file: Path) -> int | None:
    """None where there is no such file, or it says 'max'."""
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="surrogateescape")
    except OSError:  # no such controller, not ours to read, or gone meanwhile
        return ""


def _unescaped(field: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)

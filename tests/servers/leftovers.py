"""What a test must not leave behind: child processes, daemons and FUSE mounts. Reads /proc, changes only what it reaps.

A daemon that detached itself is no longer a descendant, so every process started during a test session carries
SESSION_VARIABLE in its environment and is known by it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

SESSION_VARIABLE = "MFS_TEST_SESSION"

SETTLE_S = 10.0
"""What a test ended may take to disappear (a daemon flushing its cache, say) before it counts as left behind."""

# Started by the standard library on first use, and meant to live as long as the interpreter.
_STDLIB_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


_older: set[int] = set()
"""Processes that were there before us, at the last look."""


def processes() -> dict[int, str]:
    """Live processes of this session, other than this one: pid -> command line."""
    return {pid: line for pid, (line, _) in _family().items()}


def _family() -> dict[int, tuple[str, int]]:
    """The same with each one's parent: pid -> (command line, parent)."""
    tag = f"{SESSION_VARIABLE}={os.environ[SESSION_VARIABLE]}".encode()
    parents: dict[int, int] = {}
    tagged: set[int] = set()
    _, _, began = _stat(os.getpid())
    alive = set(map(int, filter(str.isdigit, os.listdir("/proc"))))
    # Who was there before us is none of ours, and known by its number from then on: we look twice a test, on machines
    # with much else, and the kernel comes back to a number only after all the others.
    _older.intersection_update(alive)
    for pid in alive - _older:
        try:
            state, parent, at = _stat(pid)
            if at < began:
                _older.add(pid)
                continue
            if state in b"ZX":
                continue
            parents[pid] = parent
            if tag in _read(pid, "environ").split(b"\0"):
                tagged.add(pid)
        except OSError:
            continue  # ended meanwhile, or another user's
    ours = {pid for pid in parents if pid in tagged or _descends(pid, os.getpid(), parents)}
    found = {pid: (_command_line(pid), parents[pid]) for pid in ours - {os.getpid()}}
    return {pid: known for pid, known in found.items() if not any(helper in known[0] for helper in _STDLIB_HELPERS)}


def fuse_mounts(below: Path) -> set[str]:
    """Mount points of FUSE file systems at or below a directory."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        target = re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), left.split()[4])
        if right.split()[0].startswith("fuse") and Path(target).is_relative_to(below):
            found.add(target)
    return found


def settle_processes(before: dict[int, str]) -> list[str]:
    """Wait up to SETTLE_S for processes not in `before` to end; kill and describe those that did not."""
    deadline_s = time.monotonic() + SETTLE_S
    while (extra := _new_processes(before)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for pid in extra:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return [f"process {pid}: {line}" for pid, line in sorted(extra.items())]


def _new_processes(before: dict[int, str]) -> dict[int, str]:
    """Processes not in `before`. A server that was stopped and started again, with its command line, is not new; nor is
    what a server of `before` started: its workers are its own to end."""
    now = _family()
    gone = Counter(line for pid, line in before.items() if pid not in now)
    new = {}
    for pid, (line, parent) in now.items():
        while parent in now and parent not in before:
            parent = now[parent][1]
        if pid in before or parent in before:
            continue
        if gone[line]:
            gone[line] -= 1
        else:
            new[pid] = line
    return new


def unmount(targets: set[str]) -> list[str]:
    """Lazily unmount each target and describe it."""
    described = []
    for target in sorted(targets, reverse=True):  # inner mounts first
        done = subprocess.run(["fusermount3", "-u", "-z", target], capture_output=True, text=True, timeout=30)
        described.append(f"mount {target}" + (f" (still there: {done.stderr.strip()})" if done.returncode else ""))
    return described


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def _stat(pid: int) -> tuple[bytes, int, int]:
    """(state, parent, when it began in ticks since the boot). Raises: OSError."""
    # The command's name may hold spaces and brackets: the last ')' ends it. proc_pid_stat(5)
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def _read(pid: int, name: str) -> bytes:
    """Raises: OSError."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
    finally:
        os.close(fd)


def _command_line(pid: int) -> str:
    try:
        raw = _read(pid, "cmdline")
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()

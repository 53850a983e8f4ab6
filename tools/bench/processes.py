"""CPU seconds and memory of processes, from /proc; and running a command with a deadline."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """Something this benchmark needs is missing or failed; the message says what to do."""


def tree(pid: int) -> list[int]:
    """A process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:  # grows while it is walked
        found += children.get(parent, [])
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes so far, with that of children they have waited for."""
    seconds = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):  # it is gone
            seconds += time.clock_gettime(_cpu_clock(pid))
            seconds += sum(int(field) for field in _stat(pid)[13:15]) / _TICKS_PER_S
    return seconds


def user_seconds(pids: Iterable[int]) -> float:
    """Of that, what the kernel's ticks found outside of the kernel: a sample, good for whole seconds."""
    ticks = sum(int(field) for pid in pids for field in _stat(pid)[11:15:2])
    return ticks / _TICKS_PER_S


def _cpu_clock(pid: int) -> int:
    """The clock of a process' CPU time, in nanoseconds where /proc counts ticks. Source: Linux, posix-timers.h,
    make_process_cpuclock with CPUCLOCK_SCHED, as clock_getcpuclockid(3) has it.
    """
    return (~pid << 3) | 2


def resident_bytes(pid: int) -> dict[str, int]:
    """Resident memory by kind, from /proc/PID/status: all, anonymous, of files, shared (the RAM tier is that)."""
    kinds = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "RssFile", "RssShmem"):
            kinds[name] = int(value.split()[0]) << 10
    return kinds


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty if the process is gone. Source: proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def run(argv: Iterable[object], *, timeout_s: float = 120, env: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return its standard output. Raises: BenchError with the end of its stderr."""
    command = [str(word) for word in argv]
    # Not subprocess.run: a child that is stuck in a dead mount must not keep us for ever.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as error:
        process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BenchError(f"{' '.join(command)[:200]} took longer than {timeout_s:g} s") from error
        raise
    if process.returncode:
        raise BenchError(f"{' '.join(command)[:200]} ended with status {process.returncode}: {err.strip()[-800:]}")
    return out


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 60.0) -> None:
    """Poll until the condition holds. Raises: BenchError naming `what`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise BenchError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)

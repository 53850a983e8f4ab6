"""What processes cost, as the kernel counts it. Reads /proc: for a thread."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mfs.metrics.families import Families

_UTIME, _RSS = 11, 21  # fields of /proc/PID/stat behind the name in brackets; proc(5)


def add_processes(families: Families, prefix: str, pids: Mapping[str, int]) -> None:
    """CPU seconds and memory of these processes. pids: by what they are called."""
    tick_s, page_bytes = 1 / os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    cpu_s: dict[tuple[str, ...], float] = {}
    memory: dict[tuple[str, ...], float] = {}
    for name, pid in pids.items():
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        cpu_s[name,] = (int(fields[_UTIME]) + int(fields[_UTIME + 1])) * tick_s
        memory[name,] = int(fields[_RSS]) * page_bytes
    families.counter(
        f"{prefix}_process_cpu_seconds",
        "CPU time used, by the user's and the kernel's clock together.",
        cpu_s,
        ["process"],
    )
    families.gauge(
        f"{prefix}_process_resident_memory_bytes", "Memory in use, what is shared included.", memory, ["process"]
    )

"""Kernel settings of a fresh FUSE mount, which only sysfs can change: read-ahead and the queue of background requests.

libfuse cannot raise read-ahead at INIT (the kernel takes the smaller of both sides' wishes, fs/fuse/inode.c), and
above `max_background` the kernel drops read-ahead (fs/fuse/file.c). Both are set after INIT, by device number, without
touching the mount: its own process would deadlock on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

PASSTHROUGH_SINCE = (6, 9)
"""The first Linux with passthrough (whole files read by the kernel itself) and with notify_resend (a mount goes on with
another daemon). What a mount really has is agreed on at INIT: see `device`."""
READ_AHEAD_KB = 4096
"""Measured through pyfuse3 on two cores: 128 KiB 0.5-2.8 GB/s, 1 MiB 1.1-1.4, 4 MiB 4.1-4.8, 16 MiB 0.7-1.7 (dd)."""
MAX_BACKGROUND = 4096
"""Reads ahead under way. At this bound the kernel puts every reader of the mount to sleep (fs/fuse/dev.c,
fuse_block_alloc), whichever file fills it: so there must be room beside a model that hangs. A fault on a mapping makes
4 reads of 1 MiB, a plain read of 1 MiB two: with 128, 64 such readers of a dead origin stopped the whole mount.
Measured with 256 waiting reads: 3 MB of the daemon's memory."""
CONGESTION_THRESHOLD = 3072
"""From here on the kernel reads nothing ahead for anybody (fs/fuse/file.c)."""
TASKS_MAX = 2 * MAX_BACKGROUND
"""Handlers that may wait at once: all background reads, and as many readers that wait for a page each. A handler that
waits costs about 10 KB."""


@dataclass
class KernelSettings:
    """What is in force, and what could not be set."""

    read_ahead_kb: int = 0
    max_background: int = 0
    notes: list[str] = field(default_factory=list)


def tune(device: str) -> KernelSettings:
    """Set what can be set; `notes` says once what could not, with the command that would. INIT must be over.

    device: 'major:minor' of the mounted file system.
    """
    settings = KernelSettings()
    read_ahead = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    settings.read_ahead_kb = _set(read_ahead, READ_AHEAD_KB, settings.notes)
    connection = Path(f"/sys/fs/fuse/connections/{device.partition(':')[2]}")
    if connection.is_dir():
        settings.max_background = _set(connection / "max_background", MAX_BACKGROUND, settings.notes)
        _set(connection / "congestion_threshold", CONGESTION_THRESHOLD, settings.notes)
    else:
        settings.notes.append(
            "max_background could not be raised: /sys/fs/fuse/connections is empty; run as root: "
            "mount -t fusectl none /sys/fs/fuse/connections"
        )
    return settings


def _set(path: Path, value: int, notes: list[str]) -> int:
    """Write a number; the number now in force is returned."""
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        notes.append(
            f"{path.name} could not be set ({os.strerror(error.errno or 0)}); run as root: echo {value} > {path}"
        )
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0

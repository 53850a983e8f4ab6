"""kill -9 of a daemon under load, again and again: what its readers saw.

    python -m tests.mount.crash_soak --kills 200 [--readers 8]

Readers are processes that read files larger than the cache holds, past the page cache: half of them by pread, the
others through mappings; each also opens, lists and stats. Every byte is compared.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins

_FILES_COUNT, _FILE_BYTES = 8, (9 << 20) + 17
_PIECE_BYTES = 5000
_PAUSE_S = 0.1
"""Reads that take longer than that, while a daemon is started, are counted as pauses."""

TIRELESS = "from mfs import holder, one_child; one_child.WITHIN_S = 0.0; holder.main()"
"""A holder that counts no crashes."""


@dataclass
class Seen:
    """By all readers."""

    kills: int = 0
    reads: int = 0
    wrong: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    """The longest wait of any reader, of each kill."""

    def __str__(self) -> str:
        least, middle, most = min(self.pauses_s), statistics.median(self.pauses_s), max(self.pauses_s)
        found = f"{self.kills} kills, {self.reads} reads, {len(self.wrong)} errors or wrong bytes {self.wrong[:3]}"
        return f"{found}, pause min/median/max {least:.2f}/{middle:.2f}/{most:.2f} s"


def read_on(path: str, seed: int, is_mapped: bool, until: str) -> dict[str, Any]:
    """Read pieces of a ramp until the file `until` is there: how many, what was wrong, (when, how long) of waits."""
    count, wrong, waits = 0, [], []
    fd = os.open(path, os.O_RDONLY)
    inode, size = os.fstat(fd).st_ino, os.fstat(fd).st_size
    while not os.path.exists(until):
        offset = (count * 999_983 + seed) % (size - _PIECE_BYTES)
        since_s = time.monotonic()
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if is_mapped:
                with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
                    found = view[offset : offset + _PIECE_BYTES]
            else:
                found = os.pread(fd, _PIECE_BYTES, offset)
            if found != ramp(_PIECE_BYTES, offset + seed):
                wrong.append(f"other bytes at {offset}")
            with open(path, "rb") as again:
                if os.fstat(again.fileno()).st_ino != inode:
                    wrong.append("another inode")
            if len(os.listdir(os.path.dirname(path))) != _FILES_COUNT:
                wrong.append("other names")
        except OSError as error:
            wrong.append(str(error))
        took_s = time.monotonic() - since_s
        if took_s > _PAUSE_S:
            waits.append((since_s, took_s))
        count += 1
    os.close(fd)
    return {"reads": count, "wrong": wrong, "waits": waits}


def run(mount: TestMount, folder: origins.FolderOrigin, *, kills: int, readers: int, stop: Path) -> Seen:
    """Kill the daemon of a started mount `kills` times under load."""
    folder.put_all({f"m/{number}.bin": ramp(_FILE_BYTES, number) for number in range(_FILES_COUNT)})
    mount.client.refresh()
    outside = [mount.outside() for _ in range(readers)]
    for number, reader in enumerate(outside):
        seed = number % _FILES_COUNT
        reader.start(read_on, str(mount.path / "m" / f"{seed}.bin"), seed, number % 2 == 1, str(stop))
    chance, killed_at = random.Random(5), list[float]()
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 1.0))
        killed_at.append(time.monotonic())
        mount.wait_successor(mount.crash())
    time.sleep(1)
    stop.touch()
    found = [reader.finish(timeout_s=60) for reader in outside]
    seen = Seen(kills, sum(one["reads"] for one in found), [text for one in found for text in one["wrong"]])
    for at in killed_at:
        over = [took_s for one in found for since_s, took_s in one["waits"] if since_s - 1 < at < since_s + took_s]
        seen.pauses_s.append(max(over, default=0.0))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--readers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mfs-soak-") as place:
        folder = origins.FolderOrigin(Path(place) / "origin")
        mount = TestMount(Path(place) / "m", folder.url, cache_bytes=24 << 20)
        try:
            mount.start(program=TIRELESS)
            print(run(mount, folder, kills=options.kills, readers=options.readers, stop=Path(place) / "stop"))
            mount.stop()
        finally:
            mount.clean_up()


if __name__ == "__main__":
    from tests.mount import crash_soak  # under the name by which readers know it

    crash_soak.main()

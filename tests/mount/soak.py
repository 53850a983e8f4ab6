"""A million operations of readers while everything happens to a mount: how many gave other bytes, or an error.

    python -m tests.mount.soak --operations 1000000 [--readers 4] [--seed 1]

What happens, in a drawn order: files replaced at the origin and published, tiers evicted, files brought whole into
either, kill -9 of the daemon, handover, the cache's disk full, its files damaged and verified. Readers open, read by
pread or through mappings, past the page cache now and then, list and stat. Every byte is compared: it must be of a
version that the name has had, and of the one that was opened. ESTALE is no error where that version is gone.

Damage under a sealed file is beyond what is promised while the kernel reads it itself (SEMANTICS, "Verified"): so
readers pause for that one, and go on once `mfs verify` has been.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.crash_soak import TIRELESS

_FILES_COUNT, _FILE_BYTES = 8, (9 << 20) + 17
_PIECE_BYTES = 5000
_VERSIONS = 15
"""Of a file, one after the other and round again; as many ramps as 251 shifts give each of the files."""
_DISK_BYTES = 96 << 20
_READS_PER_OPEN = 20
_PATIENCE_S = 120.0
"""A soak runs for hours beside other work: how long a pause is, is measured elsewhere."""


def _shift(number: int, version: int) -> int:
    return number * _VERSIONS + version % _VERSIONS


def read_on(folder: str, seed: int, places: dict[str, str]) -> dict[str, Any]:
    """Read pieces until the file `places['stop']` is there, and not while `places['pause']` is.

    Writes its count into `places['count']` now and then. Result: {operations, stale, wrong}.
    """
    chance = random.Random(seed)
    found: dict[str, Any] = {"operations": 0, "stale": 0, "wrong": []}
    ramps = {shift: ramp(_PIECE_BYTES + 251, shift) for shift in range(251)}
    while not os.path.exists(places["stop"]):
        if os.path.exists(places["pause"]):
            Path(f"{places['count']}.{seed}.paused").touch()
            time.sleep(0.01)
            continue
        number = chance.randrange(_FILES_COUNT)
        path = f"{folder}/{number}.bin"
        try:
            _read_one(path, number, chance, ramps, found)
        except OSError as error:
            if error.errno == errno.ESTALE:
                found["stale"] += 1
            else:
                found["wrong"].append(f"{path}: {error}")
        Path(f"{places['count']}.{seed}").write_text(str(found["operations"]))
    return found


def _read_one(path: str, number: int, chance: random.Random, ramps: dict[int, bytes], found: dict[str, Any]) -> None:
    fd = os.open(path, os.O_RDONLY)
    view: mmap.mmap | None = None
    try:
        size = os.fstat(fd).st_size
        if chance.random() < 0.5:
            view = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        opened: int | None = None
        if chance.random() < 0.2:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(chance.randrange(1, _READS_PER_OPEN)):
            offset = chance.randrange(size - _PIECE_BYTES)
            # A fault that fails is SIGBUS, which no reader here may meet: mapped pieces are asked for by pread first.
            got = touching.read_on(fd, _PIECE_BYTES, offset)
            if view is not None:
                got = view[offset : offset + _PIECE_BYTES]
            found["operations"] += 1
            shift = (got[0] - offset) % 251
            expected = ramps[shift][offset % 251 :][:_PIECE_BYTES]
            if got != expected or shift // _VERSIONS != number:
                at = next((at for at in range(len(got)) if got[at] != expected[at]), len(got))
                how = "mapped" if view is not None else "read"
                found["wrong"].append(
                    f"{path}: {len(got)} bytes {how} at {offset} of file {shift // _VERSIONS}, "
                    f"others than expected from {at} on: {got[at : at + 8].hex()}"
                )
            elif opened not in (None, shift):
                found["wrong"].append(f"{path}: at {offset} of version {shift}, opened as {opened}")
            opened = shift
        if len(os.listdir(os.path.dirname(path))) != _FILES_COUNT:
            found["wrong"].append(f"{path}: other names beside it")
        found["operations"] += 3  # open, list, stat
    finally:
        if view is not None:
            view.close()
        os.close(fd)


class _Disturber:
    """What happens to the mount."""

    def __init__(self, mount: TestMount, folder: origins.FolderOrigin, places: dict[str, str], readers: int, seed: int):
        self._mount = mount
        self._folder = folder
        self._places = places
        self._readers = readers
        self._chance = random.Random(seed)
        self._versions = Counter[int]()
        self.done = Counter[str]()

    def disturb(self) -> None:
        """One thing, drawn."""
        kinds = (self.replace, self.evict, self.evict, self.bring, self.crash, self.hand_over, self.fill, self.damage)
        kind = self._chance.choice(kinds)
        kind()
        self.done[kind.__name__] += 1

    def replace(self) -> None:
        for number in self._chance.sample(range(_FILES_COUNT), 2):
            self._versions[number] += 1
            self._folder.put(f"m/{number}.bin", ramp(_FILE_BYTES, _shift(number, self._versions[number])))
        self._mount.client.refresh()

    def evict(self) -> None:
        tier: Any = self._chance.choice(["ram", "ssd", "all"])
        self._mount.client.evict(["m"], tier)

    def bring(self) -> None:
        tier: Any = self._chance.choice(["ram", "ssd"])
        list(self._mount.client.prefetch([f"m/{self._chance.randrange(_FILES_COUNT)}.bin"], tier, wait=True))

    def crash(self) -> None:
        self._mount.wait_successor(self._mount.crash(), timeout_s=_PATIENCE_S)

    def hand_over(self) -> None:
        self._mount.hand_over(program=TIRELESS)

    def fill(self) -> None:
        """The cache's disk is full for a moment."""
        filler = self._mount.folder / "cache" / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
            except OSError:
                pass
        time.sleep(self._chance.uniform(0.1, 1.0))
        filler.unlink()

    def damage(self) -> None:
        pause = Path(self._places["pause"])
        pause.touch()
        flags = [Path(f"{self._places['count']}.{number}.paused") for number in range(self._readers)]
        assert self._mount.wait_for(lambda: all(flag.exists() for flag in flags), timeout_s=_PATIENCE_S)
        try:
            for file in sorted((self._mount.folder / "cache/v2/objects").rglob("*")):
                if file.is_file() and self._chance.random() < 0.3:
                    with file.open("r+b") as opened:
                        opened.seek(self._chance.randrange(max(1, file.stat().st_size)))
                        opened.write(b"\xa5\x5a")
            list(self._mount.client.verify([""]))
        finally:
            pause.unlink()
            for flag in flags:
                flag.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mfs-soak-") as place:
        folder = origins.FolderOrigin(Path(place) / "origin")
        folder.put_all({f"m/{number}.bin": ramp(_FILE_BYTES, _shift(number, 0)) for number in range(_FILES_COUNT)})
        mount = TestMount(Path(place) / "m", folder.url, cache_bytes=48 << 20)
        places = {name: str(Path(place) / name) for name in ("stop", "pause", "count")}
        cache = mount.folder / "cache"
        cache.mkdir()
        # On a real file system of its own, so that it can be full.
        image = Path(place) / "disk"
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(cache)], check=True)
        try:
            mount.start(program=TIRELESS)
            outside = [mount.outside() for _ in range(options.readers)]
            for number, reader in enumerate(outside):
                reader.start(read_on, str(mount.path / "m"), number, places)
            disturber = _Disturber(mount, folder, places, options.readers, options.seed)
            counts = [Path(f"{places['count']}.{number}") for number in range(options.readers)]
            said_s = time.monotonic()
            while (reached := sum(int(c.read_text() or 0) for c in counts if c.exists())) < options.operations:
                disturber.disturb()
                time.sleep(disturber._chance.uniform(0, 0.5))
                if time.monotonic() > said_s + 60:
                    said_s = time.monotonic()
                    print(f"{reached} operations; {dict(disturber.done)}", flush=True)
            Path(places["stop"]).touch()
            found = [reader.finish(timeout_s=60) for reader in outside]
            wrong = [text for one in found for text in one["wrong"]]
            print(
                f"{sum(one['operations'] for one in found)} operations, {len(wrong)} wrong {wrong[:5]}, "
                f"{sum(one['stale'] for one in found)} of versions that were gone; {dict(disturber.done)}"
            )
            mount.stop()
        finally:
            mount.clean_up()
            subprocess.run(["umount", "-l", str(cache)], check=False)


if __name__ == "__main__":
    from tests.mount import soak  # under the name by which readers know it

    soak.main()

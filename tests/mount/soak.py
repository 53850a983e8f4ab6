"""A million operations of readers while everything happens to a mount: how many gave other bytes, or an error.

    python -m tests.mount.soak --operations 1000000 [--readers 4] [--seed 1]

What happens, in a drawn order: files replaced at the origin and published, tiers evicted, files brought whole into
either (and sealed), their pages dropped, kill -9 of a worker and of the daemon, handover, the cache's disk full, its
files damaged and verified. Readers (`soak_readers`) open, read, look at mappings, list and stat; some of what they open
stays open over all that. Every byte is compared with the version that was opened; there is no error but of a version
that is gone.

Two things are beyond what is promised, and so are not done. Damage under a sealed file, while the kernel reads that by
itself: for it readers have nothing open until `mfs verify` has been. And damage between a write and its record, which
sealing believes until the scrub comes by (decisions/0021): so `mfs verify` begins when no write is under way any more,
and what is damaged is of the versions that it looks at.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.errors import StoreError
from mfs.testing.mounting import MountFailedError, TestMount
from tests.mount import origins, touching
from tests.mount.crash_soak import TIRELESS
from tests.mount.soak_readers import FILES_COUNT, Board, Contents, Found, read_on, size_of

logger = logging.getLogger(__name__)

_DISK_BYTES, _CACHE_BYTES = 112 << 20, 64 << 20
_PATIENCE_S = 300.0
"""A soak runs for hours beside other work: how long a pause is, is measured elsewhere."""
_SAY_S = 60.0
_BETWEEN = 500
"""Operations between two things that happen, at most, beside those that are made during one."""


@dataclass
class Seen:
    """By all readers."""

    operations: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    """To the mount."""
    sealed_count: int = 0

    def add(self, found: Found) -> None:
        self.operations += found.operations
        self.met += found.met
        self.wrong += found.wrong

    def __str__(self) -> str:
        return (
            f"{self.operations.total()} operations {dict(self.operations)}, met {dict(self.met)}; "
            f"{dict(self.done)}, {self.sealed_count} sealed; {len(self.wrong)} wrong or errors"
        )


class _Disturber:
    """What happens to the mount."""

    def __init__(self, mount: TestMount, folder: origins.FolderOrigin, board: Board, chance: random.Random) -> None:
        self._mount = mount
        self._folder = folder
        self._board = board
        self._chance = chance
        self._contents = Contents()
        self._versions = [0] * FILES_COUNT
        self._sealed_counts: dict[int, int] = {}
        """By daemon."""
        self.done = Counter[str]()

    @property
    def sealed_count(self) -> int:
        """Objects that were sealed so far."""
        return sum(self._sealed_counts.values())

    def put_all(self) -> None:
        """The first versions."""
        for number in range(FILES_COUNT):
            self._put(number)

    def _put(self, number: int) -> None:
        self._folder.put(f"m/{number}.bin", self._contents.whole(number, self._versions[number]))

    def disturb(self) -> bool:
        """One thing, drawn, but each kind once before others come twice. Whether all have been done."""
        weights = {
            self.replace: 2, self.evict: 3, self.bring: 4, self.crash: 1, self.hand_over: 1, self.kill_worker: 1,
            self.fill: 1, self.damage: 2, self.damage_sums: 1, self.forget_pages: 1,
        }  # fmt: skip
        new = [kind for kind in weights if kind.__name__ not in self.done]
        kind = self._chance.choice(new) if new else self._chance.choices(list(weights), list(weights.values()))[0]
        logger.info("%s", kind.__name__)
        kind()
        self.done[kind.__name__] += 1
        self._count_sealed()
        return not new

    def _count_sealed(self) -> None:
        status = self._mount.client.status()
        self._sealed_counts[status["pid"]] = status["passthrough"]["sealed_count"]

    # -- the origin

    def replace(self) -> None:
        numbers = self._chance.sample(range(FILES_COUNT), 2)
        for number in numbers:
            self._versions[number] += 1
            self._board.note_newest(number, self._versions[number])
            self._put(number)
        self._mount.client.refresh()
        for number in numbers:
            self._board.note_oldest(number, self._versions[number])

    # -- the tiers

    def evict(self) -> None:
        tier: Any = self._chance.choice(["ram", "ssd", "all"])
        self._ask(lambda: self._mount.client.evict(self._some(), tier))

    def bring(self) -> None:
        """To SSD, where it is sealed then, or to RAM: from both the kernel may read it by itself."""
        tier: Any = self._chance.choice(["ram", "ssd"])
        self._ask(lambda: list(self._mount.client.prefetch(self._some(), tier, wait=True)))

    def _ask(self, command: Callable[[], object]) -> None:
        """Until it is done: a worker that is killed while it opens the tier costs that for half a minute."""

        def is_done() -> bool:
            try:
                command()
            except StoreError as error:
                logger.info("once more: %s", error)
                return False
            return True

        assert self._mount.wait_for(is_done, timeout_s=_PATIENCE_S)

    def _some(self) -> list[str]:
        return [f"m/{number}.bin" for number in self._chance.sample(range(FILES_COUNT), self._chance.randrange(1, 4))]

    def forget_pages(self) -> None:
        """Of the cache's own files: the next who reads one past us reads the disk."""
        for file in self._files():
            touching.drop_pages_if_there(str(file))

    # -- processes

    def crash(self) -> None:
        self._mount.wait_successor(self._mount.crash(), timeout_s=_PATIENCE_S)

    def hand_over(self) -> None:
        try:
            self._mount.hand_over(program=TIRELESS)
        except MountFailedError as error:  # too slow, on a busy machine: the old one serves on
            logger.info("not handed over: %s", error)
            self.done["hand_over given up"] += 1

    def kill_worker(self) -> None:
        os.kill(self._chance.choice(self._mount.worker_pids), signal.SIGKILL)

    # -- the disk

    def fill(self) -> None:
        """The cache's disk is full for a moment, in which other things happen. A daemon that has met it writes nothing
        for 30 s, in which little would be sealed; mostly another one comes.
        """
        filler = self._mount.folder / "cache" / "filler"
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
            except OSError:
                pass
        try:
            self._chance.choice((self.replace, self.evict, self.crash, lambda: time.sleep(0.5)))()
        finally:
            filler.unlink()
        self._chance.choice((self.crash, self.hand_over, lambda: None))()

    def damage(self) -> None:
        """Of whatever is in the tree, and verified then."""
        self._board.pause(True)
        assert self._mount.wait_for(lambda: self._board.all_paused, timeout_s=_PATIENCE_S)
        try:
            self._mount.client.refresh()
            tier = SsdTier(SsdConfig(self._mount.folder / "cache"))
            for file in self._files():
                if file.suffix or self._is_current(tier, file.name):
                    self._hit(file)
            assert self._mount.wait_for(lambda: not self._writes, timeout_s=_PATIENCE_S)
            self._ask(lambda: list(self._mount.client.verify([""])))
        finally:
            self._board.pause(False)

    def damage_sums(self) -> None:
        """Readers go on: what is promised is found to be damaged before anybody believes it."""
        for file in self._files():
            if file.suffix:
                self._hit(file)

    def _files(self) -> Iterator[Path]:
        """Data and sidecars, in no order that the seed knows."""
        return (file for file in (self._mount.folder / "cache/v2/objects").rglob("*") if file.is_file())

    def _is_current(self, tier: SsdTier, cache_id: str) -> bool:
        header = tier.header(cache_id)
        if header is None:
            return False
        number = int(json.loads(header.identity)[1].removeprefix("m/").removesuffix(".bin"))
        return header.object_bytes == size_of(self._versions[number])

    def _hit(self, file: Path) -> None:
        if self._chance.random() < 0.3:
            try:
                with file.open("r+b") as opened:
                    opened.seek(self._chance.randrange(os.fstat(opened.fileno()).st_size))
                    opened.write(b"\xa5\x5a")
            except FileNotFoundError:  # evicted meanwhile
                pass

    @property
    def _writes(self) -> int:
        """What workers have under way."""
        workers = self._mount.client.status()["workers"]
        return sum(worker["inflight"] for worker in workers) if workers else 1


def run(
    mount: TestMount, folder: origins.FolderOrigin, *, operations: int, readers: int, seed: int, between: int = _BETWEEN
) -> Seen:
    """Read from a mount that was not started yet, and disturb it, until so many operations were made and everything has
    happened to it.

    between: at most so many operations after one thing the next happens.
    """
    chance = random.Random(seed)
    board_path = str(mount.folder / "board")
    board = Board(board_path, readers, create=True)
    disturber = _Disturber(mount, folder, board, chance)
    disturber.put_all()
    mount.start(program=TIRELESS)
    outside = [mount.outside() for _ in range(readers)]
    for number, reader in enumerate(outside):
        reader.start(read_on, str(mount.path / "m"), number, chance.randrange(2**32), board_path, readers)
    said_s = time.monotonic()
    while not disturber.disturb() or board.operations < operations:
        until = board.operations + chance.randrange(between)
        assert mount.wait_for(lambda: board.operations >= until, timeout_s=_PATIENCE_S)  # noqa: B023
        if time.monotonic() > said_s + _SAY_S:
            said_s = time.monotonic()
            print(f"{board.operations} operations, {board.wrong} wrong; {dict(disturber.done)}", flush=True)
    board.end()
    seen = Seen(done=disturber.done, sealed_count=disturber.sealed_count)
    for reader in outside:
        seen.add(reader.finish(timeout_s=_PATIENCE_S))
    return seen


@contextmanager
def small_disk(cache: Path, image: Path) -> Iterator[None]:
    """A real file system at `cache`, so small that it can be full. Raises: CalledProcessError."""
    cache.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(cache)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=False)


def mount_of(folder: origins.FolderOrigin, place: Path) -> TestMount:
    """A mount that has a small disk at `place`/cache."""
    mount = TestMount(place, folder.url, cache_bytes=_CACHE_BYTES, workers_count=2, timeout_s=60.0)
    mount.ready_timeout_s = _PATIENCE_S
    return mount


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="where to put what the daemons and we logged")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mfs-soak-") as name:
        place = Path(name)
        folder = origins.FolderOrigin(place / "origin")
        mount = mount_of(folder, place / "m")
        logging.basicConfig(filename=mount.log_file, format="%(asctime)s soak: %(message)s", level=logging.INFO)
        with small_disk(mount.folder / "cache", place / "disk"):
            try:
                seen = run(mount, folder, operations=options.operations, readers=options.readers, seed=options.seed)
                print(seen, *seen.wrong, sep="\n", flush=True)
                mount.stop()
            finally:
                mount.clean_up()
                if options.log is not None:
                    shutil.copy(mount.log_file, options.log)


if __name__ == "__main__":
    from tests.mount import soak  # under the name by which readers know it

    soak.main()

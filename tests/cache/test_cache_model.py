"""The whole cache against a dict of bytes: generated reads, evictions, corruption, changes, kills and restarts.

Real workers, a real folder, sixteen slots for more than twice as many chunks; once more with a disk too small for half
of them. Whatever happens, a read gives exactly the bytes of the version it opened, or a clear error where the origin
changed; and in the end nothing is held.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mfs.cache.chunk_state import ObjectState
from mfs.cache.sealing import open_sealed
from mfs.errors import ChangedError, NotFoundError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from mfs.workers.frames import Frame
from mfs.workers.job import WorkerEndedError
from tests.workers.rig import Rig, running_rig, until

SIZES = [11 * CHUNK_BYTES + 5, 9 * CHUNK_BYTES + 3 * BLOCK_BYTES + 1, 14 * CHUNK_BYTES, CHUNK_BYTES, BLOCK_BYTES, 1]


@dataclass
class Model:
    """What is true: the handles open, the version of each file now, and what was changed since."""

    rig: Rig
    handles: list[ObjectState] = field(default_factory=list)
    current: dict[int, ObjectId] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    """Inodes of files of the tier that something befell. Who reads through us gets right bytes all the same; a file
    that was written and sealed in one life is what the disk makes of it, until it is verified."""

    def put(self, number: int, generation: int) -> None:
        self.current[number] = self.rig.put_ramp(f"{number}.bin", SIZES[number], start=31 * generation + number)

    @contextlib.contextmanager
    def state(self, dice: random.Random) -> Iterator[ObjectState]:
        """A handle: mostly on a file as it is now, now and then one opened long ago. Held as the kernel holds it."""
        if not self.handles or dice.random() < 0.3:
            obj = self.current[dice.randrange(len(SIZES))]
            self.handles.append(self.rig.cache.open(obj, 0))
        state = dice.choice(self.handles)
        state.users += 1
        try:
            yield state
        finally:
            self.rig.cache.close(state)

    async def read(self, dice: random.Random) -> None:
        with self.state(dice) as state:
            size = state.object.size
            start = dice.choice([dice.randrange(size), dice.randrange(size) // CHUNK_BYTES * CHUNK_BYTES])
            lengths = [1, 4096, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES, dice.randrange(1, 3 * CHUNK_BYTES)]
            length = dice.choice(lengths)
            for each in {start, max(0, size - length)}:
                span = ByteRange(each, min(size, each + length))
                await self._check(state, span, whole_chunks=dice.random() < 0.3)

    async def _check(self, state: ObjectState, span: ByteRange, *, whole_chunks: bool) -> None:
        try:
            begun = self.rig.cache.begin(state, span, whole_chunks=whole_chunks)
            pieces = await self.rig.cache.read(state, span, begun)
            assert b"".join(pieces) == self.rig.contents[state.object][span.start : span.stop], f"{state.object} {span}"
        except (ChangedError, NotFoundError):
            assert state.object not in self.current.values()

    async def read_together(self, dice: random.Random) -> None:
        """Many readers of one chunk: each block of it is fetched once."""
        with self.state(dice) as state:
            await self._read_together(state, dice)

    async def _read_together(self, state: ObjectState, dice: random.Random) -> None:
        span = state.object.chunk_range(dice.randrange(state.object.chunks_count))
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                start = dice.randrange(span.start, span.stop)
                part = ByteRange(start, min(span.stop, start + dice.randrange(1, CHUNK_BYTES)))
                nursery.start_soon(lambda part=part: self._check(state, part, whole_chunks=False))

    async def cancelled_read(self, dice: random.Random) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.read, dice)
                for _ in range(dice.randrange(4)):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    async def bring(self, dice: random.Random) -> None:
        with self.state(dice) as state:
            index = dice.randrange(state.object.chunks_count)
            try:
                await self.rig.cache.bring(state, index, to_ssd=dice.random() < 0.5, ahead=dice.random() < 0.5)
            except (ChangedError, NotFoundError):
                assert state.object not in self.current.values()

    async def evict_ram(self, dice: random.Random) -> None:
        obj = dice.choice(list(self.current.values()))
        before = self.rig.cache.resident_bytes(obj, 0)
        assert 0 <= self.rig.cache.evict(obj, 0) <= before

    async def evict_ssd(self, dice: random.Random) -> None:
        with self.state(dice) as state:
            await self._ask("evict", objects=[state.wire])
            self.rig.cache.note_unsaved(state.object, 0)

    async def enforce_budget(self, dice: random.Random) -> None:
        """What is written beside it may exceed the budget again at once: see `end`."""
        budget = dice.randrange(10 * CHUNK_BYTES)
        result = await self._ask("enforce_budget", budget_bytes=budget, target_bytes=budget // 2)
        assert result is None or bool(result["evicted_bytes"]) == bool(result["dropped"])

    async def verify(self, dice: random.Random) -> None:
        with self.state(dice) as state:
            await self._ask("verify", obj=state.wire)

    async def _ask(self, operation: str, **arguments: Any) -> Frame | None:
        """What a worker answers, None if it was killed meanwhile: such an order is its caller's to repeat."""
        with contextlib.suppress(WorkerEndedError):
            return await self.rig.pool.call(operation, **arguments)
        return None

    async def seal(self, dice: random.Random) -> None:
        """What is sealed is whole and right, and stays so in the hands of who has it open."""
        with self.state(dice) as state:
            for index in range(state.object.chunks_count) if dice.random() < 0.5 else ():
                with contextlib.suppress(ChangedError, NotFoundError):
                    await self.rig.cache.bring(state, index, to_ssd=True)
            await self._ask("seal", obj=state.wire, may_read=dice.random() < 0.5)
            fd = open_sealed(self.rig.ssd, state.object)
            if fd is None:  # not complete, or evicted since
                return
            await self._ask("evict", objects=[state.wire])
            self.rig.cache.note_unsaved(state.object, 0)
            with open(fd, "rb") as file:
                is_right = file.read() == self.rig.contents[state.object]
                assert is_right or os.fstat(file.fileno()).st_ino in self.damaged

    async def scrub(self, dice: random.Random) -> None:
        await self._ask("scrub", after=dice.choice(["", "8"]))

    async def damage(self, dice: random.Random) -> None:
        """Something befalls a file of the tier: a flipped byte, a cut, garbage, another one's content, its end."""
        files = sorted(path for path in (self.rig.cache_dir / "v2" / "objects").rglob("*") if path.is_file())
        if not files:
            return
        path, other, way = dice.choice(files), dice.choice(files), dice.randrange(6)
        try:
            self.damaged.add((other if way == 5 else path).stat().st_ino)
            size = path.stat().st_size
            if not size:  # it was cut before
                return
            match way:
                case 0 | 1:
                    with open(path, "r+b") as file:
                        file.seek(dice.randrange(size))
                        byte = file.read(1)
                        file.seek(-1, os.SEEK_CUR)
                        file.write(bytes([byte[0] ^ 0x55]))
                case 2:
                    os.truncate(path, dice.randrange(size))
                case 3:
                    path.write_bytes(dice.randbytes(5000))
                case 4:
                    path.unlink()
                case 5:
                    temporary = path.with_suffix(".swapped")
                    os.link(other, temporary)
                    temporary.rename(path)
        except OSError:  # evicted or replaced meanwhile, or no room: nothing befell it then
            path.with_suffix(".swapped").unlink(missing_ok=True)

    async def change(self, dice: random.Random) -> None:
        self.put(dice.randrange(len(SIZES)), dice.randrange(1, 1000))

    async def kill(self, dice: random.Random) -> None:
        workers = self.rig.pool.describe()
        if workers:
            os.kill(dice.choice(workers)["pid"], signal.SIGKILL)

    async def save(self, dice: random.Random) -> None:
        self.rig.cache.saver.save_quiet(older_than_s=0)
        if dice.random() < 0.5:
            await self.rig.cache.saver.wait_saved()

    async def close(self, dice: random.Random) -> None:
        if self.handles:
            self.rig.cache.close(self.handles.pop(dice.randrange(len(self.handles))))

    async def settle(self) -> None:
        """Nothing under way any more, and nothing held."""
        pool, cache = self.rig.pool, self.rig.cache
        await until(
            lambda: (
                not cache.fills_count and not any(pool.inflight(lane) for lane in ("origin", "ssd", "disk", "control"))
            ),
            "rest",
        )
        await cache.saver.wait_saved()
        self.rig.assert_idle()

    async def end(self) -> None:
        await self.settle()
        budget = 20 * CHUNK_BYTES
        result = await self._ask("enforce_budget", budget_bytes=budget, target_bytes=budget)
        assert result is not None
        assert result["used_bytes"] <= budget
        for handle in self.handles:
            self.rig.cache.close(handle)
        for obj in {chunk.state.object for chunk in self.rig.cache.slots.chunks}:
            self.rig.cache.evict(obj, 0)
        assert not self.rig.cache._states
        assert self.rig.memory.slots_free == self.rig.memory.slots_count
        assert self.rig.cache.unread_count == 0


OPERATIONS: list[Callable[[Model, random.Random], object]] = [
    *[Model.read] * 6, *[Model.read_together] * 2, Model.cancelled_read, *[Model.bring] * 2, Model.evict_ram,
    Model.evict_ssd, Model.enforce_budget, Model.verify, *[Model.seal] * 2, Model.scrub, *[Model.damage] * 2,
    Model.change, Model.kill, Model.save, Model.close,
]  # fmt: skip
"""Weighted by repetition."""

# A step is a few operations at once; a life is what happens between two starts of the daemon.
step = st.lists(st.tuples(st.sampled_from(range(len(OPERATIONS))), st.integers(0, 2**32)), min_size=1, max_size=4)
lives = st.lists(st.lists(step, min_size=1, max_size=12), min_size=1, max_size=3)


async def live(
    directory: Path, cache_dir: Path, life: list[list[tuple[int, int]]], contents: dict[ObjectId, bytes],
    damaged: set[int],
) -> None:  # fmt: skip
    async with running_rig(directory, cache_dir=cache_dir, workers_count=2) as rig:
        rig.contents = contents
        model = Model(rig, damaged=damaged)
        for number in range(len(SIZES)):
            if len(contents) < len(SIZES):  # the first life
                model.put(number, 0)
            path = f"{number}.bin"
            model.current[number] = [obj for obj in contents if obj.path == path][-1]
        for orders in life:
            async with trio.open_nursery() as nursery:
                for which, seed in orders:
                    nursery.start_soon(OPERATIONS[which], model, random.Random(seed))
        await model.end()


def run_lives(directory: Path, cache_dir: Path, given_lives: list[list[list[tuple[int, int]]]]) -> None:
    contents: dict[ObjectId, bytes] = {}
    damaged = set[int]()
    for life in given_lives:
        trio.run(live, directory, cache_dir, life, contents, damaged)


hypothesis_settings = settings(
    max_examples=10,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@hypothesis_settings
@given(lives)
def test_reads_are_exact_or_errors_whatever_happens(given_lives: list[list[list[tuple[int, int]]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run_lives(Path(directory), Path(directory) / "cache", given_lives)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@settings(hypothesis_settings, max_examples=6)
@given(lives)
def test_the_same_on_a_disk_that_is_full(small_disk: Path, given_lives: list[list[list[tuple[int, int]]]]) -> None:
    cache_dir = Path(tempfile.mkdtemp(dir=small_disk))
    with tempfile.TemporaryDirectory() as directory:
        run_lives(Path(directory), cache_dir, given_lives)
    subprocess.run(["rm", "-r", str(cache_dir)], check=True)

"""One measured reading, in a process of its own: a pattern over a folder. Prints JSON.

    python -m tools.bench.reader PATTERN FOLDER [--seed N] [--pretouch BYTES] [--truth FOLDER]
    python -m tools.bench.reader header FILE

The clock runs over the reading alone: not over imports, nor over the check of what was read. That check reads again
through the same open files, whose pages are still in the page cache: the very bytes that were read. Random faults keep
what they saw and compare it with `--truth`, a local copy.

Guest memory is touched and given back right before the clock starts. In a virtual machine the first touch of a page
that the host does not back yet runs at 0.4-1 GB/s, and freed pages go back to the host within seconds: without this,
every cold pass, ours and the peers', would measure the hypervisor.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

READERS = (1, 4, 16, 64)
_FAULTS_COUNT = 2_000
_PAGE_BYTES = 4 << 10
_READ_BYTES = 1 << 20
_PREAD_BYTES, _PREAD_THREADS = 8 << 20, 4
_STAT_EVERY_S = 0.002
_CROWD_S = 120.0
"""Until many readers are given up."""
_MADV_POPULATE_WRITE = 23

Figure = tuple[str, float]
"""What was measured (of FIGURES), and how much."""


@dataclass(frozen=True)
class Task:
    """What a pattern is given."""

    folder: Path
    seed: int
    pretouch_bytes: int
    truth: Path
    """The same folder on the local disk."""

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    @contextmanager
    def opened(self) -> Iterator[list[int]]:
        """Descriptors of all files."""
        fds = [os.open(path, os.O_RDONLY) for path in self.files]
        try:
            yield fds
        finally:
            for fd in fds:
                os.close(fd)


@dataclass(frozen=True)
class Measured:
    """What a pattern found."""

    bytes: int
    cpu_s: float
    """Of who reads, while the clock ran."""
    figures: Sequence[Figure]
    digest: str | None = None
    """Of the bytes of all tensors (see `digest`), where a pattern reads whole files."""


class Clock:
    """Seconds and CPU seconds from entering to leaving; memory is touched before."""

    def __init__(self, pretouch_bytes: int) -> None:
        self._pretouch_bytes = pretouch_bytes
        self.seconds = self.cpu_s = 0.0

    def __enter__(self) -> Clock:
        pretouch(self._pretouch_bytes)
        self._cpu_s, self._start = _cpu_s(), time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.cpu_s = _cpu_s() - self._cpu_s


def pretouch(size_bytes: int) -> None:
    """Have the host back this much memory in small pages, and as much in large ones, and free it again.

    The two come from different places: free fragments, which small pages take first, and whole blocks of 2 MiB, of
    which the page cache is made where files are read in order. (Shared memory would have small pages only.)
    """
    for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE) if size_bytes else ():
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
        memory.madvise(_MADV_POPULATE_WRITE)
        memory.close()


def digest(pieces: Iterable[memoryview]) -> str:
    """Hash of the bytes of all tensors, file after file, in the order in which they stand there."""
    import xxhash

    total = xxhash.xxh3_128()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def tensor_bytes(fds: Iterable[int]) -> Iterator[memoryview]:
    """What `digest` hashes of open safetensors files: all after their headers. A piece is valid until the next."""
    buffer = memoryview(bytearray(4 << 20))
    for fd in fds:
        offset = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
        while count := os.preadv(fd, [buffer], offset):
            yield buffer[:count]
            offset += count


# -- patterns over the shards of a model


def tensors(task: Task, *, name: str) -> Measured:
    """Every tensor through `safe_open`, mapped and cloned: what loaders do. Shuffled over all shards, or in order."""
    import torch  # an import costs seconds, and must not be on the clock
    from safetensors import safe_open

    size = 0
    with ExitStack() as stack:
        with Clock(task.pretouch_bytes) as clock:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in task.files]
            parts = [(file, tensor) for file in opened for tensor in sorted(file.keys())]
            order = parts if name == "inorder" else random.Random(task.seed).sample(parts, len(parts))
            for file, tensor in order:
                size += file.get_tensor(tensor).clone().nbytes
        again = (memoryview(file.get_tensor(tensor).view(torch.uint8).numpy()).cast("B") for file, tensor in parts)
        return Measured(size, clock.cpu_s, [_rate(name, size, clock)], digest(again))


def sequential(task: Task) -> Measured:
    """One file after the other by read(2) of 1 MiB."""
    size, buffer = 0, memoryview(bytearray(_READ_BYTES))
    with task.opened() as fds:
        with Clock(task.pretouch_bytes) as clock:
            for fd in fds:
                while count := os.readv(fd, [buffer]):
                    size += count
        return Measured(size, clock.cpu_s, [_rate("sequential", size, clock)], digest(tensor_bytes(fds)))


def pread(task: Task) -> Measured:
    """Four threads take the next 8 MiB each: what loaders do that do not map."""
    lock, sizes = threading.Lock(), []

    def work(pieces: Iterator[tuple[int, int]]) -> None:
        buffer, size = memoryview(bytearray(_PREAD_BYTES)), 0
        while True:
            with lock:
                fd, offset = next(pieces, (-1, 0))
            if fd < 0:
                break
            size += os.preadv(fd, [buffer], offset)
        sizes.append(size)

    with task.opened() as fds:
        pieces = iter([(fd, offset) for fd in fds for offset in range(0, os.fstat(fd).st_size, _PREAD_BYTES)])
        threads = [threading.Thread(target=work, args=(pieces,)) for _ in range(_PREAD_THREADS)]
        with Clock(task.pretouch_bytes) as clock:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return Measured(sum(sizes), clock.cpu_s, [_rate("pread", sum(sizes), clock)], digest(tensor_bytes(fds)))


def faults(task: Task, *, name: str) -> Measured:
    """Random pages of mapped files. advised: with MADV_RANDOM, so that one page is all that is asked for."""
    dice = random.Random(task.seed)
    with ExitStack() as stack:
        fds = stack.enter_context(task.opened())
        maps = [stack.enter_context(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) for fd in fds]
        if name == "faults-advised":
            for mapped in maps:
                mapped.madvise(mmap.MADV_RANDOM)
        pages = [(number, dice.randrange(len(maps[number]) // _PAGE_BYTES) * _PAGE_BYTES)
                 for number in (dice.randrange(len(maps)) for _ in range(_FAULTS_COUNT))]  # fmt: skip
        with Clock(task.pretouch_bytes) as clock:
            seen = [maps[number][start : start + _PAGE_BYTES] for number, start in pages]
    with Task(task.truth, 0, 0, task.truth).opened() as fds:
        wrong = sum(
            page != os.pread(fds[number], _PAGE_BYTES, start) for page, (number, start) in zip(seen, pages, strict=True)
        )
    if wrong:
        raise SystemExit(f"{wrong} of {_FAULTS_COUNT} pages are not those of {task.truth}")
    size = _FAULTS_COUNT * _PAGE_BYTES
    return Measured(size, clock.cpu_s, [(name, clock.seconds / _FAULTS_COUNT * 1e6)])


def many(task: Task) -> Measured:
    """1, 4, 16 and 64 processes, each a part of a shard; a shard for each count, so that all can be cold. And what a
    stat takes meanwhile that the kernel may not answer by itself."""
    rates: dict[int, float] = {}
    stats: dict[int, float] = {}
    with task.opened() as fds:
        pretouch(task.pretouch_bytes)
        cpu_s, total = 0.0, 0
        for place, (fd, path) in enumerate(zip(fds, task.files, strict=True)):
            count = READERS[(place + task.seed) % len(READERS)]
            size = os.fstat(fd).st_size
            seconds, used_s, took = _crowd(count, path, size)
            rates[count], stats[count] = size / seconds / 1e9, sorted(took)[int(len(took) * 0.99)] * 1e3
            total, cpu_s = total + size, cpu_s + used_s
        figures = [(f"readers: {count}", rates[count]) for count in READERS]
        figures += [(f"stat p99, readers: {count}", stats[count]) for count in READERS]
        return Measured(total, cpu_s, figures, digest(tensor_bytes(fds)))


def _crowd(count: int, path: Path, size: int) -> tuple[float, float, list[float]]:
    """Seconds and CPU seconds that `count` processes take for a file, and seconds of stats meanwhile."""
    # Processes and not threads: a reader that waits for the interpreter's lock measures the lock. All begin at once,
    # when a pipe's other end closes (multiprocessing's barrier lets them go one by one), and none goes through its end,
    # which costs milliseconds, while another reads.
    context = multiprocessing.get_context("fork")
    ready, over = context.Semaphore(0), context.Event()
    (begin, begin_end), (leave, leave_end) = os.pipe(), os.pipe()
    told, tell = context.Pipe(duplex=False)

    def wait_for_begin() -> None:
        os.close(begin_end)
        os.close(leave_end)
        ready.release()
        os.read(begin, 1)

    def read_part(number: int) -> None:
        fd, buffer = os.open(path, os.O_RDONLY), memoryview(bytearray(_READ_BYTES))
        offset, stop = size * number // count, size * (number + 1) // count
        with open("/dev/zero", "rb", buffering=0) as zeros:
            zeros.readinto(buffer)  # its memory, and the interpreter's that a fork shares at first, are touched now
        wait_for_begin()
        cpu_before_s = time.process_time()
        while offset < stop:
            got = os.preadv(fd, [buffer[: min(_READ_BYTES, stop - offset)]], offset)
            if not got:
                raise SystemExit(f"{path} ends at {offset}, expected {size}")
            offset += got
        tell.send((time.perf_counter(), time.process_time() - cpu_before_s))
        os.read(leave, 1)

    def stat_meanwhile() -> None:
        took: list[float] = []
        wait_for_begin()
        while not took or not over.is_set():
            start = time.perf_counter()
            _stat_by_the_daemon(path)
            took.append(time.perf_counter() - start)
            time.sleep(_STAT_EVERY_S)
        tell.send(took)

    def hear() -> Any:
        if not told.poll(_CROWD_S):
            raise SystemExit(f"a reader of {path} has failed or takes longer than {_CROWD_S:g} s")
        return told.recv()

    processes = [context.Process(target=read_part, args=(number,), daemon=True) for number in range(count)]
    processes.append(context.Process(target=stat_meanwhile, daemon=True))
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire(timeout=_CROWD_S)
    start = time.perf_counter()
    os.close(begin_end)
    ends, used_s = zip(*(hear() for _ in range(count)), strict=True)
    over.set()
    stats = hear()
    os.close(leave_end)
    for process in processes:
        process.join()
    os.close(begin)
    os.close(leave)
    return max(ends) - start, sum(used_s), stats


def _stat_by_the_daemon(path: Path) -> None:
    """statx(2) that the kernel may not answer from what it remembers."""
    flags, mask = 0x2000, 0x7FF  # AT_STATX_FORCE_SYNC, STATX_BASIC_STATS
    if _libc.statx(-100, os.fsencode(path), flags, mask, ctypes.create_string_buffer(256)):
        raise OSError(ctypes.get_errno(), f"statx {path}")


# -- a pattern over folders of many files


def storm(task: Task) -> Measured:
    """Every file looked at, every file opened and closed, every folder listed: each in a row of its own. Names come
    from the local copy, since a listing would tell the kernel of its files."""
    expected = {folder.name: sorted(os.listdir(folder)) for folder in task.truth.iterdir()}
    paths = [f"{task.folder}/{folder}/{name}" for folder, names in expected.items() for name in names]
    random.Random(task.seed).shuffle(paths)
    with Clock(0) as looking:
        for path in paths:
            os.stat(path)
    with Clock(0) as opening:
        for path in paths:
            os.close(os.open(path, os.O_RDONLY))
    with Clock(0) as listing:
        found = {folder: os.listdir(task.folder / folder) for folder in expected}
    if {folder: sorted(names) for folder, names in found.items()} != expected:
        raise SystemExit(f"{task.folder} does not list the files of {task.truth}")
    figures = [
        ("stat", looking.seconds / len(paths) * 1e6),
        ("open and close", opening.seconds / len(paths) * 1e6),
        ("listdir of 100", listing.seconds / len(expected) * 1e6),
    ]
    return Measured(0, listing.cpu_s + looking.cpu_s + opening.cpu_s, figures)


class Pattern(NamedTuple):
    """A way to read, and what it yields: label and unit of its figures. Of GB/s more is better, of others less."""

    run: Callable[[Task], Measured]
    figures: dict[str, str]


STORM = "storm"
PATTERNS = {
    "shuffled": Pattern(partial(tensors, name="shuffled"), {"shuffled": "GB/s"}),
    "inorder": Pattern(partial(tensors, name="inorder"), {"inorder": "GB/s"}),
    "sequential": Pattern(sequential, {"sequential": "GB/s"}),
    "pread": Pattern(pread, {"pread": "GB/s"}),
    "faults": Pattern(partial(faults, name="faults"), {"faults": "µs"}),
    "faults-advised": Pattern(partial(faults, name="faults-advised"), {"faults-advised": "µs"}),
    "many": Pattern(
        many,
        {f"readers: {count}": "GB/s" for count in READERS} | {f"stat p99, readers: {count}": "ms" for count in READERS},
    ),
    STORM: Pattern(storm, {"stat": "µs", "open and close": "µs", "listdir of 100": "µs"}),
}
WHOLE = ("shuffled", "inorder", "sequential", "pread", "many")
"""The patterns that read every byte."""
FIGURES = {label: unit for pattern in PATTERNS.values() for label, unit in pattern.figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", choices=[*PATTERNS, "header"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--pretouch", type=int, default=0)
    parser.add_argument("--truth", type=Path)
    args = parser.parse_args()
    if args.pattern == "header":
        from safetensors import safe_open

        with safe_open(args.path, framework="numpy") as file:
            print(json.dumps({"tensors_count": len(list(file.keys()))}))
        return
    task = Task(args.path, args.seed, args.pretouch, args.truth or args.path)
    print(json.dumps(asdict(PATTERNS[args.pattern].run(task))))


_libc: Any = ctypes.CDLL(None, use_errno=True)


def _rate(name: str, size: int, clock: Clock) -> Figure:
    return name, size / clock.seconds / 1e9


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

"""`gpuload bench --modelled`: how much of a link our own code leaves, on a model of a device, where there is no GPU.

Every row is a process of its own under tools/gpu/simulate, which has the model and the table of its prices. Two kinds:

- *reads modelled*: a file of `MODELLED_BYTES` that has no bytes, read at a price per thread and copied at the real
  link's rate. Neither takes this machine's CPU, so what is lost is lost to Python and to waiting.
- *reads real*: bytes out of the page cache, hashed by the server, over a link that is slowed down until this machine's
  cores could feed twice as much. What is lost is lost to a step that waits for another.

'As a server moves it' is the server's pieces through the server's ring, hashed; a client hashes nothing. Eight cards at
once are a process each, as an engine's ranks are, and begin together; their links are slowed down until these cores
could feed all of them twice. Their row has the share of the slowest, the median and the best card.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from gpuload.cli.modelled_attach import Attaches
from gpuload.cli.modelled_load import Rounds
from gpuload.client.asking import ask, load_resident
from gpuload.errors import DeviceError
from mfs import children
from mfs.errors import UsageError

SIMULATE = Path(__file__).resolve().parents[2] / "tools/gpu/simulate"
MODELLED_BYTES = 16_000_000_000
LARGE_COUNT, SMALL_COUNT = 300, 30_000
"""Tensors of the two models: of 53 MB and of 533 KB each where reads are modelled."""
LINK_GB_S = 55.0
CARDS = 8
"""Of a host."""
SPARE = 2.0
"""How many times the scaled link this machine's cores could feed."""
CANNOT_TELL = (
    "what the real driver's calls cost, or refuse",
    "what the memory of a host gives all its readers together, beside one of them",
    "several cards behind one root port or one socket",
    "torch on CUDA, kernels, NVLink, MIG",
)
TIMEOUT_S = 300.0
ROUNDS = 5


def run_modelled(nbytes: int, folder: str) -> dict[str, Any]:
    """All rows. nbytes: of the models whose bytes are read. Raises: UsageError where there is no source tree."""
    if not SIMULATE.exists():
        raise UsageError(f"--modelled needs the source tree: {SIMULATE} is not there; run gpuload from a checkout")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=os.path.abspath(folder), prefix="gpuload-modelled-") as name:
        scratch = Path(name)
        for count in (LARGE_COUNT, SMALL_COUNT):
            path = write_model(scratch / f"{count}.safetensors", MODELLED_BYTES, count, has_bytes=False)
            rows += _client_rows(path, MODELLED_BYTES, count, LINK_GB_S, models_reads=True)
            (found,) = _loads(path, LINK_GB_S, "server", models_reads=True)
            what = f"load as a server moves it, {count} tensors, hashed, reads modelled"
            rows.append(_row(what, MODELLED_BYTES, found.best_s, LINK_GB_S))
            rows += _rows_of_cards(path, count)
            rows += _attach_rows(path, count, scratch)
            path.unlink()
        one = write_model(scratch / "large.safetensors", nbytes, LARGE_COUNT)
        two = write_model(scratch / "small.safetensors", nbytes, SMALL_COUNT)
        time.sleep(2.1)  # settled long enough for digests to be remembered
        reads, hashes = _rate(_reader(one)), _rate(_hasher())
        both = 1 / (1 / reads + 1 / hashes)
        link = round(both / SPARE, 2)
        for path, count in ((one, LARGE_COUNT), (two, SMALL_COUNT)):
            rows += _client_rows(path, nbytes, count, link, models_reads=False)
            rows += _server_rows(path, nbytes, count, link, scratch)
        two.unlink()
        other = write_model(scratch / "other.safetensors", nbytes, LARGE_COUNT)
        time.sleep(2.1)
        rows += _evicting_rows(one, other, nbytes, link, scratch)
        rows += _rows_of_servers(one, other, nbytes, link / CARDS, scratch)
    return {
        "device": "modelled",
        "cores": os.cpu_count(),
        "scale": {"reads_gb_s": reads, "hashes_gb_s": hashes, "both_gb_s": both, "link_gb_s": link,
                  "times": LINK_GB_S / link},
        "cannot_tell": CANNOT_TELL,
        "rows": rows,
    }  # fmt: skip


def write_model(path: Path, nbytes: int, count: int, *, has_bytes: bool = True) -> Path:
    """A safetensors file of `count` equal tensors; no two MiB of it are equal. has_bytes=False: a hole of that size."""
    each = nbytes // count // 512 * 512
    table = {
        f"layers.{i:05}.weight": {"dtype": "BF16", "shape": [each // 2], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(count)
    }
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        if not has_bytes:
            file.truncate(8 + len(head) + each * count)
            return path
        block = bytearray(os.urandom(1 << 20))
        for at in range(0, each * count, len(block)):
            block[:8] = at.to_bytes(8, "little")
            file.write(memoryview(block)[: each * count - at])
        file.flush()
        os.fsync(file.fileno())
    return path


def _client_rows(path: Path, nbytes: int, count: int, link: float, *, models_reads: bool) -> Iterator[dict[str, Any]]:
    (found,) = _loads(path, link, "client", models_reads=models_reads)
    how = f"{count} tensors, reads {'modelled' if models_reads else 'real'}"
    yield _row(f"load, {how}", nbytes, found.best_s, link) | {"cpu_seconds": found.cpu_s}
    yield _row(f"first load of a process, {how}", nbytes, found.first_s, link)


def _rows_of_cards(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Loads to several cards at once, reads modelled: two in one process, and a process for each of a host's."""
    (two,) = _loads(path, LINK_GB_S, "client", models_reads=True, cards_count=2)
    how = f"{count} tensors, reads modelled"
    yield _row(f"load, {how}, 2 cards in one process", MODELLED_BYTES, two.best_s, LINK_GB_S)
    feeds = (os.cpu_count() or 1) * 2 * MODELLED_BYTES / 1e9 / two.cpu_s  # GB/s of links, with all of the cores
    link = round(min(LINK_GB_S, feeds / SPARE / CARDS), 1)
    found = _loads(path, link, "client", models_reads=True, processes_count=CARDS)
    what = f"{how}, {CARDS} cards at once, a process each"
    yield _row_of(f"load, {what}", MODELLED_BYTES, [rounds.later_s for rounds in found], link)
    yield _row_of(f"first load of a process, {what}", MODELLED_BYTES, [rounds.first_s for rounds in found], link)


def _loads(
    path: Path, link: float, way: str, *, models_reads: bool, processes_count: int = 1, cards_count: int = 1
) -> list[Rounds]:
    """Of each process, all at once. way: see `modelled_load`."""
    options = ["--moves-nothing", "--set", f"LINK_GB_S={link}", "--devices", str(cards_count)]
    if models_reads:
        options += ["--model-reads", str(path.parent)]
    load = children.python("-m", "gpuload.cli.modelled_load", str(path), str(ROUNDS), way, str(cards_count))
    processes: list[subprocess.Popen[str]] = []
    try:
        while len(processes) < processes_count:
            processes.append(
                subprocess.Popen(
                    _simulated(options, load), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True, cwd=children.CWD, env=children.environment(),
                )
            )  # fmt: skip
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # all are ready
        with ThreadPoolExecutor(processes_count) as pool:
            said = list(pool.map(lambda process: process.communicate("\n", timeout=TIMEOUT_S), processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise DeviceError(f"the modelled load failed: {errors.strip().splitlines()[-1:]}")
    return [Rounds(**json.loads(output.splitlines()[-1])) for output, _ in said]


def _rows_of_servers(one: Path, other: Path, nbytes: int, link: float, scratch: Path) -> Iterator[dict[str, Any]]:
    """A server for each card of a host, all loading at once: first one model, then the other in its place, and back."""
    with ExitStack() as held, ThreadPoolExecutor(CARDS) as pool:
        paths = [
            held.enter_context(_server(scratch / f"digests-{i}", nbytes, link, scratch, name=f"{i}", models_count=2))
            for i in range(CARDS)
        ]

        def seconds(path: Path, *, is_swap: bool) -> list[float]:
            def load(socket_path: str) -> float:
                reply = load_resident(path, "bench", "cuda:0", is_swap=is_swap, socket_path=socket_path)
                return float(reply["report"]["seconds"])

            return list(pool.map(load, paths))

        how = f"{LARGE_COUNT} tensors, {CARDS} cards at once, a server each, reads real, digests"
        yield _row_of(f"first load, {how} unknown", nbytes, seconds(one, is_swap=False), link)
        yield _row_of(f"swap, {how} unknown", nbytes, seconds(other, is_swap=True), link)
        yield _row_of(f"swap back, {how} known", nbytes, seconds(one, is_swap=True), link)


def _server_rows(path: Path, nbytes: int, count: int, link: float, scratch: Path) -> Iterator[dict[str, Any]]:
    """The first load of a server, digests unknown and known."""
    for known in (False, True):
        digests = scratch / f"digests-{count}"
        if known:
            _digest(path, digests)
        with _server(digests if known else scratch / "none", nbytes, link, scratch) as socket_path:
            report = load_resident(path, "bench", "cuda:0", socket_path=socket_path)["report"]
        what = f"server, {count} tensors, digests {'known' if known else 'unknown'}, reads real"
        yield _row(what, nbytes, report["seconds"], link)


def _attach_rows(path: Path, count: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """Without torch, to a server that has it. There is no link in these."""
    with _server(scratch / "none", MODELLED_BYTES, LINK_GB_S, scratch, reads=path.parent) as socket_path:
        load_resident(path, "bench", "cuda:0", socket_path=socket_path)
        found = Attaches(**_said(
            [], children.python("-m", "gpuload.cli.modelled_attach", "bench", socket_path, str(ROUNDS))
        ))  # fmt: skip
    for what, seconds in (("first attach", found.first_s), ("attach", found.best_s), ("detach", found.detach_s)):
        yield {"what": f"{what}, {count} tensors, 16 GB", "seconds": seconds, "gb_s": 0.0, "of_link": 0.0}


def _evicting_rows(one: Path, other: Path, nbytes: int, link: float, scratch: Path) -> Iterator[dict[str, Any]]:
    """Two models, of which the arena holds one: each drives the other out. Digests are known."""
    digests = scratch / "digests-evicting"
    for path in (one, other):
        _digest(path, digests)
    for tier in (0, int(2.2 * nbytes)):
        with _server(digests, nbytes, link, scratch, tier) as socket_path:
            _wait_locked(socket_path)

            def load(path: Path, socket_path: str = socket_path) -> dict[str, Any]:
                report: dict[str, Any] = load_resident(path, path.name, "cuda:0", socket_path=socket_path)["report"]
                return report

            load(one)
            seconds = load(other)["seconds"]
            where = "to the RAM tier" if tier else "for good"
            yield _row(f"server, {LARGE_COUNT} tensors, another is evicted {where}, reads real", nbytes, seconds, link)
            if tier:
                reports = [load(path) for path in (one, other) * (ROUNDS // 2 + 1)]
                if any(report["bytes_from_ram"] != report["bytes_total"] for report in reports):
                    raise DeviceError("a model did not come back from the RAM tier")
                best = min(report["seconds"] for report in reports)
                yield _row(f"server, {LARGE_COUNT} tensors, back from the RAM tier", nbytes, best, link)


def _wait_locked(socket_path: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while any(t["locked_bytes"] < t["bytes"] for t in ask({"op": "status"}, socket_path=socket_path)["ram_tiers"]):
        if time.monotonic() > deadline:
            raise DeviceError(f"the RAM tier was not page-locked in {TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _digest(path: Path, digests: Path) -> None:
    subprocess.run(
        children.python("-m", "gpuload", "digest", str(path), "--digests", str(digests)),
        check=True, capture_output=True, timeout=TIMEOUT_S, cwd=children.CWD, env=children.environment(),
    )  # fmt: skip


@contextmanager
def _server(
    digests: Path, nbytes: int, link: float, scratch: Path, tier: int = 0, *, name: str = "s", models_count: int = 1,
    reads: Path | None = None,
) -> Iterator[str]:  # fmt: skip
    """models_count: how many of `nbytes` its card has room for. reads: below which folder they are modelled."""
    path = str(scratch / f"{name}.sock")
    command = children.python("-m", "gpuload", "serve", "--socket", path, "--digests", str(digests))
    command += ["--arena", f"cuda:0={int(nbytes * models_count * 1.2) + (256 << 20)}", "--ram-tier", str(tier)]
    options = ["--moves-nothing", "--set", f"LINK_GB_S={link}"]
    options += ["--model-reads", str(reads)] if reads is not None else []
    with subprocess.Popen(
        _simulated(options, command), stderr=subprocess.PIPE, text=True, cwd=children.CWD, env=children.environment()
    ) as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            if "serving" not in said:
                raise DeviceError(f"the modelled server did not start: {said.strip()}")
            yield path
        finally:
            server.terminate()


def _said(options: list[str], command: list[str]) -> dict[str, Any]:
    """What a program said at last. Raises: DeviceError if it failed."""
    done = subprocess.run(
        _simulated(options, command), capture_output=True, text=True, timeout=TIMEOUT_S, cwd=children.CWD,
        env=children.environment(),
    )  # fmt: skip
    if done.returncode:
        raise DeviceError(f"{command[3:4]} failed on the model: {done.stderr.strip().splitlines()[-1:]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def _simulated(options: list[str], command: list[str]) -> list[str]:
    return [*children.python(str(SIMULATE)), *options, "--", *command]


def _rate(work: Callable[[], int]) -> float:
    """GB/s of all cores together, the best of three."""
    best = 0.0
    for _ in range(3):
        done: list[int] = []
        threads = [threading.Thread(target=lambda done=done: done.append(work())) for _ in range(os.cpu_count() or 1)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(done) / (time.monotonic() - began) / 1e9)
    return best


def _reader(path: Path) -> Callable[[], int]:
    def read() -> int:
        buffer, total = bytearray(16 << 20), 0
        with open(path, "rb", buffering=0) as file, closing(file):
            while total < 512 << 20 and (got := file.readinto(buffer)):
                total += got
        return total

    return read


def _hasher() -> Callable[[], int]:
    block = os.urandom(16 << 20)

    def work() -> int:
        for _ in range(8):
            blake3(block).digest()
        return 8 * len(block)

    return work


def _row(what: str, nbytes: int, seconds: float, link: float) -> dict[str, Any]:
    rate = nbytes / seconds / 1e9
    return {"what": what, "seconds": seconds, "gb_s": rate, "of_link": rate / link, "link_gb_s": link}


def _row_of(what: str, nbytes: int, seconds: Sequence[float], link: float) -> dict[str, Any]:
    """Of several cards: the slowest card's row, and the shares of all."""
    shares = sorted(nbytes / s / 1e9 / link for s in seconds)
    return _row(what, nbytes, max(seconds), link) | {"of_links": [shares[0], statistics.median(shares), shares[-1]]}

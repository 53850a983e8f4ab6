"""The command line of the benchmarks and the order of a run. Start it with `tools/bench/run`, which sets all up."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from mfs.units import parse_size
from tests.servers.process import ServerError
from tools.bench import cases, latency, link, listing, machine, mounts, namespaces, readahead, report, triton
from tools.bench.origin import Origin
from tools.bench.processes import BenchError
from tools.bench.results import Results, Row
from tools.bench.workload import FILE_NAME, Model, make_model

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CASES = (*cases.CASES, "latency", "listing")
Tables = dict[str, list[Row]]
_NOTE = """\
Every cold pass: fresh process, fresh mount, page cache dropped, and the guest's memory touched right before the clock \
starts; in a virtual machine first touch of memory is slow (0.4-1 GB/s) and would be measured instead. Every pass is \
checked against a hash of the tensors. Ratios are taken within a round; compare GB/s within this run only."""


def main() -> None:
    args = _arguments()
    interrupted = _interruptible()
    console, started = _console(), time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.0f} s[/]  {line}", markup=True)

    try:
        namespaces.enter()
        with _folder(args.dir) as folder:
            tables, results = _RUNS[args.command](args, folder, say)
            described = machine.describe(folder)
    except BaseException as error:
        if interrupted.is_set():  # Ctrl-C also reaches the servers, whose clients may fail before we are told
            sys.exit("bench: interrupted; all it started is gone")
        if isinstance(error, BenchError | ServerError):
            sys.exit(f"bench: error: {error}")
        raise
    name = f"{args.command}-{described['date'][:16].replace(':', '')}.json"
    path = args.json or report.RESULTS_FOLDER / name
    report.write(path, sys.argv[1:], described, [row for rows in tables.values() for row in rows], results)
    for title, rows in tables.items():
        report.print_rows(console, title, rows)
    for line in results.missing:
        console.print(f"[yellow]not measured[/]: {line}")
    machine_line = "{cpu}, {cores} cores, {memory_gib} GiB, kernel {kernel}".format(**described)
    load = f"load average {described['load_average'][0]:.1f}, {time.monotonic() - started:.0f} s"
    note = triton.NOTE if args.command == "triton" else _NOTE
    console.print(f"\n{machine_line}, {described['disk']['file_system']}; {load}\n{note}\nresults: {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/run", description="Measure mfs beside its peers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("mount", "the mount's figures against their goals"),
        ("readahead", "which read-ahead is best"),
        ("triton", "a real tritonserver on local disk, on the mount, and on its own s3://"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--size", type=parse_size, help="of the model (1.2G; triton: 200M a version; quick: 300M); G is 2**30"
        )
        command.add_argument("--rounds", type=int, help="passes of everything (3; quick: 1)")
        command.add_argument("--quick", action="store_true", help="small and once: to see that it works")
        command.add_argument("--json", type=Path, metavar="FILE", help="results file (default: tools/bench/results/)")
        command.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="disk for models and caches")
    mount = commands.choices["mount"]
    mount.add_argument("--peers", type=_names(cases.PEERS), default=cases.PEERS, help=f"of {','.join(cases.PEERS)}")
    mount.add_argument("--only", type=_names(_CASES), default=_CASES, help=f"cases, of {','.join(_CASES)}")
    args = parser.parse_args()
    whole = 200 << 20 if args.command == "triton" else 1200 << 20  # triton: of each version
    args.size = args.size or (min(whole, 300 << 20) if args.quick else whole)
    args.rounds = args.rounds or (1 if args.quick else 3)
    if args.rounds < 1 or args.size < 64 << 20:
        parser.error("expected at least one round and 64M")
    if machine.memory_available_bytes() < 4 * args.size + mounts.RAM_BYTES:
        parser.error(
            f"too little memory for {args.size} bytes: the store, a cache, slots and readers hold it in memory"
        )
    return args


def _console() -> Console:
    """Wide in a pipe or log, where rich would take 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 132)


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
        return names

    return parse


def _run_mount(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> tuple[Tables, Results]:
    results, goals, rates = Results(), [], []
    peers = _present(args.peers, results)
    chosen = frozenset(args.only)
    models_count = 1_000 if args.quick else 10_000
    with ExitStack() as stack:
        if chosen - {"listing"}:
            origin = stack.enter_context(_origin(folder, say))
            model = _model(folder / "model", args.size, 1, say)
            origin.put(cases.MODEL, model)
            passes = cases.Throughput(folder, origin, model, peers, chosen, results, say)
            for number in range(args.rounds if chosen & set(cases.CASES) else 0):
                say(f"[bold]round {number + 1} of {args.rounds}[/]")
                passes.round(number)
            if "latency" in chosen:
                latency.measure(folder, origin, cases.MODEL, 2 if args.quick else 5, results, say)
        goals += cases.goal_rows(results) + latency.rows(results)
        rates += cases.rate_rows(results) + latency.rate_rows(results)
    if "listing" in chosen:
        listing.measure(folder, models_count, results, say)
        goals += listing.rows(results, models_count)
        rates += listing.rate_rows(results)
    return {"Figures": rates, "Goals": goals}, results


def _run_readahead(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> tuple[Tables, Results]:
    results = Results()
    with _origin(folder, say) as origin:
        model = _model(folder / "model", args.size, 1, say)
        origin.put(cases.MODEL, model)
        for number in range(args.rounds):
            say(f"[bold]round {number + 1} of {args.rounds}[/]")
            readahead.round(folder, origin, model, number, results, say)
    return {"Kernel read-ahead, shuffled mmap reads": readahead.rows(results)}, results


def _run_triton(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> tuple[Tables, Results]:
    results = Results()
    with _origin(folder, say) as origin:
        bench = triton.Bench(folder, origin, args.size, results, say)
        for number in range(args.rounds):
            say(f"[bold]round {number + 1} of {args.rounds}[/]")
            bench.round()
    return {"Figures": triton.rows(results), "Goals": triton.goal_rows(results)}, results


_RUNS = {"mount": _run_mount, "readahead": _run_readahead, "triton": _run_triton}


def _present(peers: tuple[str, ...], results: Results) -> tuple[str, ...]:
    """The peers that are installed; for the others a line in the results."""
    found = []
    for peer in peers:
        if peer in ("s3fs", "rclone") and shutil.which(peer) is None:
            results.missing.append(f"{peer}: not installed (apt-get install {peer})")
        elif peer == "runai" and not _has_runai():
            results.missing.append("runai: not installed (pip install 'runai-model-streamer[s3]')")
        else:
            found.append(peer)
    return tuple(found)


def _has_runai() -> bool:
    from importlib.util import find_spec

    return bool(find_spec("runai_model_streamer") and find_spec("runai_model_streamer_s3"))


def _origin(folder: Path, say: Callable[[str], None]) -> Origin:
    say("starting radosgw")
    link.bring_up_loopback()
    return Origin(folder / "origin")


def _model(folder: Path, size_bytes: int, seed: int, say: Callable[[str], None]) -> Model:
    say(f"making and uploading a model of {size_bytes / 1e9:.2f} GB")
    return make_model(folder / FILE_NAME, size_bytes, seed=seed)


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """A folder for everything, removed at the end. Its mounts are in our namespace and taken away before."""
    folder = Path(tempfile.mkdtemp(prefix="mfs-bench-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        for number in _ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave gigabytes behind
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            target = line.split()[1]
            if target.startswith(f"{folder}/"):
                os.system(f"umount -l {target}")  # our own name, made above: nothing in it needs quoting
        shutil.rmtree(folder, ignore_errors=True)


def _interruptible() -> threading.Event:
    """Turn signals that end us into KeyboardInterrupt; the event is set once one has come."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    for number in _ENDING_SIGNALS:
        signal.signal(number, interrupt)
    return interrupted


if __name__ == "__main__":
    main()

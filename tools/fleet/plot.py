"""Pictures of results, PNG or SVG by the file's name. Sole importer of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfs.errors import UsageError
from tools.fleet.experiments import Cell, Series, Step
from tools.fleet.setups import ELASTIC

SUFFIXES = (".png", ".svg")
_CLAIM = 0.4


def check_name(path: Path) -> None:
    """Raises: UsageError for a name whose kind of picture is not drawn, or without matplotlib."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    _pyplot()


def draw_systems(path: Path, all_series: Sequence[Series], title: str) -> None:
    """GPU-hours against the share in time: a cross for each system, with intervals."""
    figure, axes = _pyplot().subplots(figsize=(6.4, 4), layout="constrained")
    for series in all_series:
        hours, share = series.of("gpu_hours"), series.of("in_time")
        axes.errorbar(
            hours.mean, 100 * share.mean, xerr=_width(hours.half_width), yerr=_width(100 * share.half_width),
            fmt="o", capsize=3, label=series.name,
        )  # fmt: skip
    axes.set(xlabel="GPU-hours", ylabel="requests in time, %", title=title, xlim=(0, None))
    axes.legend()
    _save(figure, path)


def draw_map(path: Path, cells: Sequence[Cell], title: str) -> None:
    """Two maps of what is saved: by fleets always on, and of GPU-hours held. In parentheses: the SLO is not kept."""
    figure, both = _pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    utilisations = sorted({cell.utilisation for cell in cells})
    burstinesses = sorted({cell.burstiness for cell in cells})
    image: Any = None
    for axes, name, is_fixed in (
        (both[0], "fewest GPUs that keep the SLO", True),
        (both[1], "GPU-hours, elastic against zero-mfs", False),
    ):
        grid = [[float("nan") for _ in utilisations] for _ in burstinesses]
        for cell in cells:
            x, y = utilisations.index(cell.utilisation), burstinesses.index(cell.burstiness)
            saved = cell.fixed_saving if is_fixed else cell.elastic_saving
            grid[y][x] = 100 * saved.mean if saved else float("nan")
            text = f"{100 * saved.mean:.0f}" if saved else "–"
            is_late = not is_fixed and cell.in_time[ELASTIC] < cell.target
            weight = "bold" if saved and saved.mean >= _CLAIM and not is_late else "normal"
            axes.text(x, y, f"({text})" if is_late else text, ha="center", va="center", fontweight=weight)
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap="RdYlGn", vmin=100 * _CLAIM - 60, vmax=100)
        axes.set_xticks(range(len(utilisations)), [f"{100 * each:g}" for each in utilisations])
        axes.set_yticks(range(len(burstinesses)), [f"{each:g}" for each in burstinesses])
        axes.set(xlabel="utilisation of a card for each service, %", ylabel="rate in a burst / mean rate", title=name)
    figure.colorbar(image, ax=both, label="saved by sharing, %\nbold: 40 or more; (): SLO not kept")
    figure.suptitle(title)
    _save(figure, path)


def draw_growth(path: Path, steps: Sequence[Step], title: str) -> None:
    """Left: cards that keep the SLO, for each service. Right: waiting for the first token."""
    figure, (cards, waits) = _pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    services = [step.services for step in steps]
    found = [(step.services, step.fewest) for step in steps if step.fewest]
    cards.errorbar(
        [each for each, _ in found], [fewest.mean / each for each, fewest in found],
        yerr=[_width(fewest.half_width / each) for each, fewest in found], fmt="o-", capsize=3,
        label="fewest that keep the SLO",
    )  # fmt: skip
    cards.plot(services, [step.gpus / step.services for step in steps], "--", color="grey", label="given on the right")
    cards.set(xscale="log", xlabel="services", ylabel="shared GPUs for each service", ylim=(0, None))
    for key, name in (("first_token_p50_s", "median"), ("first_token_p99_s", "99th percentile")):
        points = [step.shared.of(key) for step in steps]
        widths = [_width(point.half_width) for point in points]
        waits.errorbar(services, [point.mean for point in points], yerr=widths, fmt="o-", capsize=3, label=name)
    waits.set(xscale="log", yscale="log", xlabel="services", ylabel="first token, s")
    for axes, corner in ((cards, "lower right"), (waits, "upper right")):
        axes.set_xticks(services, [str(each) for each in services])
        axes.minorticks_off()
        axes.legend(loc=corner)
    figure.suptitle(title)
    _save(figure, path)


def _width(value: float) -> float:
    """Of a single run nothing is known."""
    return value if value == value else 0.0


def _save(figure: Any, path: Path) -> None:
    """SVG without date and with fixed ids: the same result gives the same file."""
    pyplot = _pyplot()
    with pyplot.rc_context({"svg.hashsalt": "mfs", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, metadata=metadata, dpi=100)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'mfs[fleet]'") from None
    return pyplot

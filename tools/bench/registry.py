"""The registry's figures: what a family of models takes beside what others make of it, and what reading it costs.

bytes     the family by us (fast, small), in a folder and on S3, and by every peer; one of larger shape (--larger)
push …    see `registry_times`; over two members of the larger shape, of --size bytes
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.bench import families, link, registry_bytes, registry_times, stored
from tools.bench.families import MEMBERS
from tools.bench.results import Results, Row

CASES = ("bytes", *registry_times.CASES)
TEXT = """The registry's figures against their goals: bytes of a family made by real training (exact on any machine),
and times (not so on a busy one). Two calm cores need some twelve minutes; --quick trains two steps, leaves out what is
slow and takes one."""
NOTE = """\
Bytes: what each member adds after those before it, everything counted that is stored for it. Times: fresh process,
fresh mount, page cache dropped, every byte checked; systems in turn, ratios within a round. On a machine that is busy
with other things, as its load average says, bytes are exact and times are not."""
_QUICK_STEPS = 2
_LARGER_BYTES = 700 << 20
_MINILM_BYTES = 45 << 20


@dataclass(frozen=True)
class Wanted:
    """What a run is asked for."""

    size_bytes: int
    """Of the models that are timed."""
    rounds: int
    cases: tuple[str, ...]
    peers: tuple[str, ...]
    """Of `bytes`."""
    is_quick: bool
    is_larger: bool
    """Whether a family of larger shape is stored by everybody, too."""
    family: Path | None
    """Where the trained family is kept; made there if it is not."""


def run(wanted: Wanted, folder: Path, results: Results, say: Callable[[str], None]) -> dict[str, list[Row]]:
    """All chosen cases. Returns: the tables."""
    link.bring_up_loopback()
    members = _family(wanted, folder, say)
    tables: dict[str, list[Row]] = {}
    goals: list[Row] = []
    if "bytes" in wanted.cases:
        slow = (stored.ZSTD_SLOW,) if wanted.is_quick else ()
        results.missing += [f"MiniLM, {peer}: takes minutes; not in a quick run" for peer in slow]
        peers = tuple(peer for peer in wanted.peers if peer not in slow)
        efforts = registry_bytes.EFFORTS[:1] if wanted.is_quick else registry_bytes.EFFORTS
        registry_bytes.measure("MiniLM", members, folder / "bytes", peers, efforts, results, say)
        if not wanted.is_quick:
            registry_bytes.measure_s3("MiniLM", members, folder / "s3", results, say)
        if wanted.is_larger:
            _larger(wanted, members, folder, results, say)
        for name in ("MiniLM", "larger"):
            found = registry_bytes.rows(results, name)
            if found:
                tables[f"Stored, MB that each member adds: {name}"] = found
                goals += registry_bytes.goal_rows(results, name)
    if set(wanted.cases) & set(registry_times.CASES):
        _times(wanted, members, folder, results, say)
        tables["Times"] = registry_times.rate_rows(results)
        goals += registry_times.goal_rows(results)
    return {**tables, "Goals": goals}


def _family(wanted: Wanted, folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    place = wanted.family or folder / "family"
    if all((place / member / "model.safetensors").exists() for member in MEMBERS):
        say(f"the family in {place}")
        return {member: place / member for member in MEMBERS}
    steps = _QUICK_STEPS if wanted.is_quick else families.STEPS_COUNT
    say(f"training a family, {steps} steps each")
    return families.make_family(families.minilm_folder(), place, steps_count=steps)


def _larger(
    wanted: Wanted, members: dict[str, Path], folder: Path, results: Results, say: Callable[[str], None]
) -> None:
    """What takes zstd -19 a quarter of an hour, and `small` likewise, is left out."""
    place, copies = folder / "larger", max(2, _LARGER_BYTES // _MINILM_BYTES)
    say(f"making a family of larger shape: {copies} times the bytes")
    made = families.make_larger(members["base"].parent, place, MEMBERS, copies=copies)
    results.missing.append(f"larger, {stored.ZSTD_SLOW} and mfs small: a quarter of an hour each")
    peers = tuple(peer for peer in wanted.peers if peer != stored.ZSTD_SLOW)
    registry_bytes.measure("larger", made, folder / "bytes", peers, registry_bytes.EFFORTS[:1], results, say)
    shutil.rmtree(place)


def _times(
    wanted: Wanted, members: dict[str, Path], folder: Path, results: Results, say: Callable[[str], None]
) -> None:
    copies = max(2, wanted.size_bytes // _MINILM_BYTES)
    made = families.make_larger(members["base"].parent, folder / "timed", ("base", "full"), copies=copies)
    with registry_times.Times(
        folder / "times", made["base"], made["full"], members["base"], wanted.cases, results, say, wanted.is_quick
    ) as times:
        share = times.compressed_share()
        if share is not None:
            results.add("share", share)
        for number in range(wanted.rounds):
            say(f"[bold]round {number + 1} of {wanted.rounds}[/]")
            times.round(number)
        if "tags" in wanted.cases:
            times.follow_tags(2 if wanted.is_quick else 5)

"""Loads begin and end as promised, in bounded memory; on a clock that the tests turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import mfs.loads
from mfs.loads import ACTIVE_MAX, LOADS_MAX, PHASES, READS_MAX, Load, Loads
from mfs.tracing.spans import Context, Outbox, Span
from mfs.waits import Cause, Waited


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(mfs.loads, "time", SimpleNamespace(monotonic=clock.monotonic, time=clock.time))
    return clock


@pytest.fixture
def loads(clock: Clock) -> Loads:
    return Loads(["", "hub"])


def wait(loads: Loads, clock: Clock, seconds: float, cause: Cause = Cause.ORIGIN, path: str = "m/w") -> None:
    """One reader waits that long."""
    at_s = clock.now_s
    clock.now_s += seconds
    loads.note(Waited(at_s, seconds, cause, 0, path, 0, 4096))


def close(loads: Loads, load: Load, clock: Clock) -> None:
    loads.closed(load)
    clock.now_s += 3


def test_phases_add_up_and_what_is_nobodys_is_the_page_caches(loads: Loads, clock: Clock) -> None:
    load = loads.opened((0, "m"))
    wait(loads, clock, 0.5)
    clock.now_s += 0.25
    wait(loads, clock, 0.125, Cause.SLOT)
    with loads.opening(load, "header", "m/w"):
        clock.now_s += 0.0625
    close(loads, load, clock)
    [found] = loads.describe("m")
    assert found["is_over"]
    took = {phase: seconds for phase, seconds in found["phases"].items() if seconds}
    assert took == {"origin": 0.5, "slot": 0.125, "header": 0.0625, "page_cache": 0.25}
    assert found["seconds"] == sum(took.values())
    assert list(found["phases"]) == list(PHASES)
    assert [(read["at"], read["waited_s"], read["on"]) for read in found["reads"]] == [
        (0.0, 0.5, "origin"), (0.75, 0.125, "slot"), (0.875, 0.0625, "header"),
    ]  # fmt: skip


def test_files_closed_and_opened_again_are_one_load_and_later_ones_another(loads: Loads, clock: Clock) -> None:
    for _ in range(3):
        load = loads.opened((0, "m"))
        clock.now_s += 1
        loads.closed(load)
        clock.now_s += 1
    clock.now_s += 5
    load = loads.opened((0, "m"))
    clock.now_s += 1
    close(loads, load, clock)
    assert [(found["files_count"], found["seconds"]) for found in loads.describe("")] == [(3, 5.0), (1, 1.0)]


def test_a_file_kept_open_begins_a_load_anew_once_it_is_read_again(loads: Loads, clock: Clock) -> None:
    load = loads.opened((0, "m"))
    wait(loads, clock, 1.0)
    load.last_s = clock.now_s
    clock.now_s += 11
    assert [found["is_over"] for found in loads.describe("m")] == [True]
    again = loads.resumed(load)
    assert (load.handles, again.handles, again.is_over) == (0, 1, False)
    clock.now_s += 1
    close(loads, again, clock)
    assert [found["seconds"] for found in loads.describe("m")] == [1.0, 1.0]


def test_what_is_open_and_not_read_is_no_load(loads: Loads, clock: Clock) -> None:
    """A daemon that takes a mount over opens what its predecessor had open."""
    load = loads.opened((0, "m"))
    clock.now_s += 11
    assert not list(loads.describe(""))
    assert load.is_over


def test_a_load_is_not_over_while_somebody_waits(loads: Loads, clock: Clock) -> None:
    load = loads.opened((0, "m"))
    load.waiting += 1
    clock.now_s += 60
    [found] = loads.describe("m")
    assert (found["is_over"], found["seconds"]) == (False, 60.0)


def test_the_last_loads_are_kept_and_the_longest_waits_of_each(loads: Loads, clock: Clock) -> None:
    for _ in range(LOADS_MAX + 5):
        load = loads.opened((0, "m"))
        for number in range(READS_MAX + 20):
            wait(loads, clock, 1 / 1024 if number % 2 else 1 / 64)
        close(loads, load, clock)
    found = list(loads.describe("m"))
    assert len(found) == LOADS_MAX
    assert [(len(one["reads"]), one["left_out"], one["waits_count"]) for one in found] == [(64, 20, 84)] * LOADS_MAX
    assert sum(read["waited_s"] == 1 / 64 for read in found[0]["reads"]) == (READS_MAX + 20) // 2


def test_a_look_at_many_headers_pushes_out_no_load_of_weights(loads: Loads, clock: Clock) -> None:
    for number in range(LOADS_MAX + 3):
        load = loads.opened((0, f"m{number}"))
        wait(loads, clock, 1.0, path=f"m{number}/w")
        loads.filled((0, f"m{number}"), origin_bytes=100 << 20 if number < 3 else 4096, ssd_bytes=0)
        close(loads, load, clock)
    kept = [found["model"] for found in loads.describe("")]
    assert kept == ["m0", "m1", "m2", *(f"m{number}" for number in range(6, LOADS_MAX + 3))]


def test_models_under_way_are_bounded(loads: Loads, clock: Clock) -> None:
    for number in range(ACTIVE_MAX + 10):
        loads.opened((0, f"m{number}"))
        wait(loads, clock, 0.001, path=f"m{number}/w")
    assert len(loads._active) == ACTIVE_MAX
    assert [found["model"] for found in loads.describe("") if found["is_over"]] == [f"m{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("path", "models"),
    [("", ["m", "hub/m", "hub"]), ("m", ["m"]), ("m/a/b", ["m"]), ("hub", ["hub/m", "hub"]), ("hub/m/x", ["hub/m"]),
     ("hub/readme", ["hub"]), ("mm", []), ("hub/mm/x", [])],
)  # fmt: skip
def test_paths_choose_models(loads: Loads, path: str, models: list[str]) -> None:
    for group in ((0, "m"), (1, "m"), (1, "")):
        loads.opened(group)
    assert [found["model"] for found in loads.describe(path)] == models
    for number, model in enumerate([*reversed(models), None]):
        count, found = loads.describe_latest(path, number)
        assert (count, found and found["model"]) == (len(models), model)


def test_a_wait_of_a_kind_that_is_not_known_is_another(loads: Loads, clock: Clock) -> None:
    load = loads.opened((0, "m"))
    clock.now_s += 1
    load.note(clock.now_s - 1, 1.0, "moonshine", "m/w", 0, 1)
    close(loads, load, clock)
    assert next(loads.describe("m"))["phases"]["other"] == 1.0


def test_waits_at_once_for_what_goes_on_in_one_chunk_are_one_span(clock: Clock) -> None:
    outbox = Outbox()
    loads = Loads([""], lambda name, attributes, parent: Span(outbox, name, Context("1" * 32, "2" * 16), "", 0.0))
    load = loads.opened((0, "m"))
    mib = 1 << 20
    apart = Waited(1003.0, 0.5, Cause.ORIGIN, 0, "m/w", 6 * mib, 7 * mib)
    for number in (2, 3, 4, 5):  # of two chunks, from 2 MiB on
        loads.note(Waited(1000.0 + number / 8, 2.0, Cause.ORIGIN, 0, "m/w", number * mib, (number + 1) * mib))
    loads.note(apart)  # goes on, but later
    loads.note(apart._replace(cause=Cause.SSD, start=7 * mib, stop=8 * mib))
    loads.note(apart._replace(cause=Cause.SSD, path="m/v", start=8 * mib, stop=9 * mib))
    loads.note(apart._replace(cause=Cause.SSD, path="m/v", start=10 * mib, stop=11 * mib))
    close(loads, load, clock)
    assert len(loads._about("")) == 1
    rows = outbox.take(100)
    spans = [(row[8]["mfs.start"] / mib, row[8]["mfs.stop"] / mib, (row[6] - row[5]) / 1e9) for row in rows[:-1]]
    assert spans == [
        (2, 4, 2.125), (4, 6, 2.125), (6, 7, 0.5), (7, 8, 0.5), (8, 9, 0.5), (10, 11, 0.5),
    ]  # fmt: skip
    assert [row[3] for row in rows] == ["read"] * 6 + ["load"]

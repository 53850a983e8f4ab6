"""What `mfs watch` adds up."""

from __future__ import annotations

import pytest

from mfs.cli.watched import FileUse, Uses


def read(start: int, stop: int, **more: object) -> dict[str, object]:
    return {"op": "read", "file": "w", "start": start, "stop": stop, "waited_s": 0.5, **more}


def use_of(*spans: tuple[int, int]) -> FileUse:
    use = FileUse("w")
    for start, stop in spans:
        use.add(read(start, stop))
    return use


@pytest.mark.parametrize(
    ("spans", "read_bytes", "touched_bytes", "in_order_share"),
    [
        ((), 0, 0, 0.0),
        (((0, 10), (10, 30)), 30, 30, 1.0),
        (((0, 10), (0, 10)), 20, 10, 1.0),
        (((5, 15), (10, 20), (0, 40)), 60, 40, 40 / 60),
        (((50, 60), (60, 70), (0, 20), (70, 80), (20, 30)), 60, 60, 50 / 60),  # two runs, taken in turns
        (((30, 40), (20, 30), (10, 20)), 30, 30, 0.0),  # backwards
    ],
)
def test_bytes_are_counted_and_order_is_recognised(
    spans: tuple[tuple[int, int], ...], read_bytes: int, touched_bytes: int, in_order_share: float
) -> None:
    use = use_of(*spans)
    assert (use.read_bytes, use.touched_bytes) == (read_bytes, touched_bytes)
    assert use.in_order_share == pytest.approx(in_order_share)


def test_records_of_all_kinds_add_up_per_file() -> None:
    uses = Uses()
    uses.add([
        {"op": "open", "file": "w", "handle": 1, "size": 100},
        read(0, 40),
        read(40, 50, error="gone"),
        {"op": "fetch", "file": "w", "start": 0, "stop": 64, "origin_bytes": 60, "ssd_bytes": 4, "ahead": False},
        {"op": "fetch", "file": "w", "start": 64, "stop": 100, "origin_bytes": 0, "ssd_bytes": 36, "ahead": True},
        {"op": "close", "file": "w", "handle": 1},
        {"op": "open", "file": "v", "handle": 2, "size": 7},
    ])  # fmt: skip
    first, second = (use.summary() for use in uses.files())
    assert first == {
        "file": "w", "size": 100, "opens_count": 1, "reads_count": 2, "read_bytes": 50, "touched_bytes": 50,
        "read_median_bytes": 25, "in_order_share": 1.0, "waited_s": 1.0, "errors_count": 1, "origin_bytes": 60,
        "ssd_bytes": 40, "ahead_bytes": 36,
    }  # fmt: skip
    assert (second["file"], second["reads_count"], second["read_median_bytes"]) == ("v", 0, 0)

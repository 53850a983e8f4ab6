"""Records what a framework does to a mount, for `mfs/RECIPES.md` and for the traces in `tests/prefetch/traces`.

    python -m tests.frameworks.record MODELS TRACES PROGRAM:MODEL...

mounts the folder MODELS anew for each PROGRAM (of `programs.py`), runs it on MODEL under `mfs watch`, prints one line
of sums, and writes TRACES/PROGRAM-MODEL.trace (see `tests.prefetch.traces`). Uses the default settings of `mfs mount`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mfs.cli.watched import Uses
from mfs.testing.mounting import TestMount
from mfs.units import format_size
from tests.frameworks.conftest import OFFLINE, watching
from tests.prefetch.traces import Trace


def record(models: Path, program: str, model: str, folder: Path) -> tuple[Uses, Trace, int]:
    """The program's use of each file, what to replay of it, and the bytes that came from the origin."""
    mount = TestMount(folder, str(models), workers_count=2, ram_bytes=1 << 30)
    with mount:
        with watching(mount) as records:
            argv = [sys.executable, "-m", "tests.frameworks.programs", program, str(mount.path / model)]
            done = subprocess.run(argv, env=os.environ | OFFLINE, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            mount.wait_quiet(prefetch=False)
        origin_bytes = mount.origin_bytes
    uses = Uses()
    uses.add(records)
    return uses, Trace.of(records, models), origin_bytes


def main(models: Path, traces: Path, wanted: list[str]) -> None:
    for pair in wanted:
        program, _, model = pair.partition(":")
        with tempfile.TemporaryDirectory(prefix="rec-") as folder:
            uses, trace, origin_bytes = record(models, program, model, Path(folder))
        trace.write(traces / f"{program}-{model}.trace")
        rows = [use.summary() for use in uses.files() if use.size > 1 << 20]
        sums = {key: sum(row[key] for row in rows) for key in ("reads_count", "read_bytes", "touched_bytes", "size")}
        sums |= {key: sum(row[key] for row in rows) for key in ("opens_count", "ahead_bytes")}
        order = sum(row["in_order_share"] * row["read_bytes"] for row in rows) / max(1, sums["read_bytes"])
        medians = sorted(row["read_median_bytes"] for row in rows)
        print(json.dumps({
            "program": program, "model": model, "files": len(rows), "file_bytes": format_size(sums["size"]),
            "opens": sums["opens_count"], "reads": sums["reads_count"], "median": [format_size(m) for m in medians[:3]],
            "read": format_size(sums["read_bytes"]), "touched": round(sums["touched_bytes"] / max(1, sums["size"]), 3),
            "order": round(order, 2), "waited_s": round(sum(row["waited_s"] for row in rows), 2),
            "origin": format_size(origin_bytes), "ahead": format_size(sums["ahead_bytes"]),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

"""`mfs estimate`: what a cold start will cost here, before it happens."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import REACHING, reaching_options
from mfs.cli.run import say
from mfs.cli.targets import TREE_PATH, source_url
from mfs.cli.text import clean, count, print_json, size
from mfs.cli.values import DURATION, Parsed
from mfs.errors import StoreError, TransientStoreError

if TYPE_CHECKING:
    from mfs.planning.estimate import Estimate, Read

TROUBLE_S = 15.0
"""Longest that an origin is asked again that does not answer, or says that it cannot; pauses it asks for are made."""
QUIET_S = 15.0
"""After so long without any a trouble is a new one: three of the longest pauses between two tries."""

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(bit|B|bit/s|bps|B/s)", re.ASCII)
_TIMES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_rate(text: str) -> float:
    """Bytes a second meant by '1Gbit/s', '100Mbit', '500MB/s'. Units are decimal, as links are sold.

    Raises: ValueError.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"not a rate: {text!r}; expected a form like 1Gbit/s, 100Mbit or 500MB/s")
    return float(match[1]) * _TIMES[match[2]] / (1 if match[3].startswith("B") else 8)


@click.command(
    cls=Page,
    short_help="Say what a cold start will cost, before it happens.",
    sections={
        "Examples": """\
mfs estimate s3://models/prod llama --cache-dir /nvme/mfs
mfs estimate hf://org/name --link 1Gbit/s --latency 30ms      nothing is measured
mfs estimate mfs+s3://models/registry/llama:prod --egress aws
mfs estimate s3://models/prod --read headers --json""",
        "What is read": """\
all      every byte of every file, as 'mfs prefetch' and a whole load do
first    what comes before a load can begin: small files, the tables of all
         safetensors files, and the first file of weights whole
headers  small files, and the tables of safetensors files""",
        "How it is counted": """\
The source is listed as a mount lists it; then blocks of 128 KiB and chunks of
4 MiB are counted as the cache asks for them, less what --cache-dir holds. Of a
registry, frames of chunks as they are stored, tables, and what differences
stand on. Time is the listing's, and bytes over bandwidth or round trips over
connections, whichever is more: both measured by reading up to 64 MiB for three
seconds, unless given. The disk, the CPU and other traffic are not in it.
--cache-dir is only looked at: compressed layers of oci:// that it lacks are
unpacked in $TMPDIR, and removed there.""",
    },
)
@click.argument("source")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option(
    "--read", "read", type=click.Choice(["all", "first", "headers"]), default="all", show_default=True,
    help="How much of it.",
)  # fmt: skip
@click.option("--cache-dir", type=TREE_PATH, metavar="DIR", help="Take off what this cache holds.")
@click.option("--link", "link_bytes_s", type=Parsed("rate", parse_rate), help="Bandwidth, instead of measuring it.")
@click.option("--latency", "latency_s", type=DURATION, help="Of one small request, instead of measuring it.")
@click.option("--connections", default=16, show_default=True, type=click.IntRange(1, 1024), help="As the mount's.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64), help="As the mount's.")
@click.option("--egress", metavar="PRICE", help="aws, gcs, azure, or dollars per GB.")
@click.option("--timeout", "timeout_s", type=DURATION, default="5m", show_default=True, help="For all of it.")
@click.option("--require-signature", type=TREE_PATH, metavar="KEY", help="Of a registry, as 'mfs mount' has it.")
@reaching_options
@json_option
def estimate(
    source: str, paths: tuple[str, ...], read: str, cache_dir: str | None, link_bytes_s: float | None,
    latency_s: float | None, connections: int, workers: int, egress: str | None, timeout_s: float,
    require_signature: str | None, as_json: bool, **reaching: Any,
) -> None:  # fmt: skip
    """Say what reading SOURCE, or the PATHs in it, will cost from cold: bytes, requests, time, egress.

    Nothing is mounted and nothing is kept. Name the same SOURCE that is mounted: what the cache holds is known by it.
    An origin that does not answer is asked again for 15 seconds, one that asks to wait for as long as --timeout says.
    """
    from mfs.config import SourceConfig
    from mfs.fetch.told import telling
    from mfs.planning import prices
    from mfs.planning.cached import Cached
    from mfs.planning.estimate import Question
    from mfs.planning.estimate import estimate as find
    from mfs.shown import mask_url
    from mfs.sources import SourceOptions, open_source

    price = prices.parse(egress) if egress else None
    of_source = {name: reaching[name] for name, *_ in REACHING if reaching.get(name) is not None}
    key = Path(os.path.abspath(require_signature)) if require_signature else None
    config = SourceConfig(source_url(source), require_signature=key, **of_source)
    directory = Path(os.path.abspath(cache_dir)) if cache_dir else None
    question = Question(
        cast("Read", read), paths, processes=workers, connections=connections, keeps=directory is not None,
        link_bytes_s=link_bytes_s, latency_s=latency_s, price=price,
    )  # fmt: skip
    options = config.options(cache_directory=os.fspath(directory or ""))
    with contextlib.ExitStack() as stack:
        if directory is not None and config.url.startswith("oci://"):
            room = tempfile.TemporaryDirectory(prefix="mfs-estimate-", ignore_cleanup_errors=True)
            options["unpack_directory"] = stack.enter_context(room)
        cached = Cached(directory)
        opened = stack.enter_context(contextlib.closing(open_source(config.url, SourceOptions(**options))))
        with telling(_Trouble(mask_url(config.url))):
            found = find(opened, question, cached, deadline_s=time.monotonic() + timeout_s)
    _show(found, as_json)


class _Trouble:
    """Told of whatever is tried again: says it, once a trouble, and ends it after TROUBLE_S."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._since_s = self._last_s = float("-inf")

    def __call__(self, error: TransientStoreError) -> None:
        """Raises: StoreError."""
        now_s = time.monotonic()
        if now_s - self._last_s > QUIET_S:
            self._since_s = now_s
            say(f"{self._source}: {error}; trying again for {TROUBLE_S:.0f} s")
        self._last_s = now_s + (error.retry_after_s or 0.0)
        if error.retry_after_s is None and now_s - self._since_s > TROUBLE_S:
            raise StoreError(f"{self._source} has not answered for {TROUBLE_S:.0f} s: {error}")


def _show(found: Estimate, as_json: bool) -> None:
    from mfs.shown import mask_url
    from mfs.units import format_duration

    if as_json:
        print_json(found.as_json() | {"source": mask_url(found.source)})
        return
    from mfs.cli.output import print_table

    print(clean(f"{mask_url(found.source)}: {count(found.files_count, 'file')}, {size(found.total_bytes)} to read"))
    print()
    rows = [
        ("on SSD already", size(found.cached_bytes), ""),
        ("copied on this node", size(found.shared_bytes), ""),
        ("from the origin", size(found.origin_bytes), f"{found.requests:,} requests, at most {found.requests_most:,}"),
        ("listing", "", f"{found.listing_requests:,} requests, {found.listing_s:.2f} s"),
    ]
    print_table(("", ">BYTES", ""), rows)
    print()
    by = "measured" if found.is_measured else "given"
    took = f"{found.seconds:.2f} s" if found.seconds < 60 else format_duration(found.seconds)
    print(f"time      {took}, at {found.link_bytes_s * 8 / 1e9:.3g} Gbit/s and {found.latency_s * 1e3:.1f} ms ({by})")
    if found.egress_dollars is not None and found.price is not None:
        at, of = found.price["dollars_per_gb"], found.price["source"]
        print(clean(f"egress    ${found.egress_dollars:.2f} at ${at:g}/GB ({of})"))
    for line in found.notes:
        print(clean(f"note      {line}"))

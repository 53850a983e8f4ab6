"""`mfs doctor`: what this machine lacks for a mount, and what to do about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import REACHING, reaching_options
from mfs.cli.run import Failed
from mfs.cli.targets import TREE_PATH, source_url
from mfs.cli.values import SIZE
from mfs.errors import UsageError

if TYPE_CHECKING:
    from mfs.planning.wanted import Wanted

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(
    cls=Page,
    short_help="Say what this machine lacks, and what to do.",
    sections={
        "Examples": """\
mfs doctor                                                   this machine alone
mfs doctor s3://models/prod --cache-dir /nvme/mfs            and what a mount needs
mfs doctor --config /etc/mfs.toml --json                     as 'mfs mount' would read it""",
        "Levels": """\
ok       nothing to do
note     works, with a limit
warning  works, and will be slow or fail under load
fault    something that was asked for will fail: exit status 1""",
        "What is moved": """\
Up to 256 MiB are written to the cache's disk and read again, in a file without
a name, for two seconds each way; up to 64 MiB are read of each SOURCE, for
three seconds. Nothing is left behind. --quick leaves the disk alone.""",
        "Exit status": """\
0    nothing was found that would fail
1    at least one fault
2    the command was used wrongly
130  interrupted""",
    },
)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
@click.option("--cache-dir", type=TREE_PATH, metavar="DIR", help="Where the SSD tier is to live.")
@click.option("--cache-size", "cache_bytes", type=SIZE, help="Its budget.  [100G]")
@click.option("--ram-size", "ram_bytes", type=SIZE, help="Budget of the RAM tier.  [1G]")
@click.option("--config", "config_file", type=_FILE, metavar="FILE", help="Take all that from a mount's TOML file.")
@click.option("--quick", is_flag=True, help="Do not measure the cache's disk.")
@reaching_options
@json_option
def doctor(
    sources: tuple[str, ...], cache_dir: str | None, cache_bytes: int | None, ram_bytes: int | None,
    config_file: Path | None, quick: bool, as_json: bool, **reaching: Any,
) -> None:  # fmt: skip
    """Look at kernel, FUSE, limits, control groups, the cache's disk, the clock and every SOURCE.

    Each finding says what was looked at, how it stands, what was found and what to do about it. No mount is touched.
    """
    from mfs.cli.findings import show_findings
    from mfs.findings import has_fault
    from mfs.planning.doctor import examine

    given = {"cache_dir": Path(os.path.abspath(cache_dir)) if cache_dir else None,
             "cache_bytes": cache_bytes, "ram_bytes": ram_bytes}  # fmt: skip
    wanted = _wanted(sources, config_file, {k: v for k, v in given.items() if v is not None}, reaching)
    findings = list(examine(wanted, measure=not quick))
    show_findings(findings, as_json)
    if has_fault(findings):
        raise Failed


def _wanted(
    sources: tuple[str, ...], config_file: Path | None, given: dict[str, Any], reaching: dict[str, Any]
) -> Wanted:
    from mfs.config import SourceConfig
    from mfs.config_file import load
    from mfs.planning.wanted import Wanted

    of_source = {name: reaching[name] for name, *_ in REACHING if reaching.get(name) is not None}
    if config_file is not None:
        if sources:
            raise UsageError("with --config, no SOURCE: the sources stand in the file")
        place = {} if _names_mountpoint(config_file) else {"mountpoint": Path("/proc/mfs/mountpoint")}
        return Wanted.of(load(config_file, mount=given | place, source=of_source))
    return Wanted(tuple(SourceConfig(source_url(source), **of_source) for source in sources), **given)


def _names_mountpoint(config_file: Path) -> bool:
    from mfs.config_file import read

    return "mountpoint" in read(config_file)[0]

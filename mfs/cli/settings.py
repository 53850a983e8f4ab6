"""`mfs config`: the settings of a running mount, and whether a file of settings is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH
from mfs.cli.text import clean, count, print_json


class _PathOrCommand(click.Group):
    """`mfs config PATH` means `mfs config show PATH`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            args = ["show", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_PathOrCommand, short_help="Show a mount's settings, or check a file of settings.")
def config(**_: Any) -> None:
    """Show the settings of a mount, or check a configuration file.

    'mfs config PATH' is short for 'mfs config show PATH'.
    """


@config.command(cls=Page, sections={"Examples": "mfs config /mnt/models\nmfs config . > mfs.toml"})
@click.argument("path", default=".", type=TREE_PATH)
@json_option
def show(path: str, as_json: bool) -> None:
    """Print the effective settings of the mount PATH lies in, as a configuration file; secrets are masked."""
    from mfs.cli.targets import targets
    from mfs.config_file import dump

    (target,) = targets([path])
    settings = target.client.config()
    if as_json:
        print_json(settings)
    else:
        print(dump(settings), end="")


@config.command(
    cls=Page,
    sections={
        "Examples": "mfs config check /etc/mfs.toml",
        "File": """\
[mount]
mountpoint = "/mnt/models"
cache_dir = "/nvme/mfs"
cache_size = "500G"      # binary units; a plain number is bytes
ram_size = "32G"
refresh = "5m"           # a plain number is seconds
[sources.prod]           # appears as /mnt/models/prod
url = "s3://models/prod"
profile = "inference"
All other keys are the long options of 'mfs mount' with '_' for '-'.""",
    },
)
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def check(file: Path, as_json: bool) -> None:
    """Say whether a configuration file is right, without touching disk or network."""
    from mfs.config_file import load, read

    settings, _ = read(file)
    # 'mfs mount --config FILE MOUNTPOINT' is legal, so a file need not name one; this one is nobody's directory.
    missing = {} if "mountpoint" in settings else {"mountpoint": Path("/proc/mfs/mountpoint")}
    loaded = load(file, mount=missing, source={})
    if as_json:
        print_json(loaded.masked() | ({"mountpoint": None} if missing else {}))
        return
    names = ", ".join(source.name for source in loaded.sources)
    place = "no mountpoint" if missing else f"to be mounted at {loaded.mountpoint}"
    print(clean(f"{file}: good, {count(len(loaded.sources), 'source')} ({names}), {place}"))

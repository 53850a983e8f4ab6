"""`mfs apply`: bring mounts and registries to what a file says, and only to that."""

from __future__ import annotations

from pathlib import Path

import click

from mfs.cli.page import Page, json_option
from mfs.cli.run import Failed, warn
from mfs.cli.text import clean, print_json


@click.command(
    cls=Page,
    short_help="Bring mounts and tags to what a file says.",
    sections={
        "Examples": """\
mfs apply models.toml             once, from a timer, or from whatever watches a repository
mfs apply --check models.toml     say what differs; exit with 1 if anything does""",
        "File": """\
[mounts."/mnt/models".models]     # "." is the whole mount
"llama-ft/prod" = { tier = "ssd", pinned = true }
"llama/v3" = { tier = "ssd", revision = "sha256:…" }
"minilm/config.json" = { tier = "ram" }
[mounts."/mnt/models"]
unpin = true                      # what is pinned here and not above; else it stays
[registries."mfs+s3://models/registry"]
profile = "publisher"             # or endpoint_url, region, token
tags = { "llama-ft:prod" = "v7", "llama:stable" = "sha256:…" }
     tier: "ssd" or "ram", where all bytes are to be. pinned: true or false.
     revision: what is to be shown there: a registry's manifest, a Hub's commit.
     What a key does not say is left as it is.""",
    },
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Change nothing; print what differs, and exit with 1 if anything does.")
@json_option
def apply(file: Path, check: bool, as_json: bool) -> None:
    """Move tags, look at the sources again, fetch and pin what FILE asks for on each mount that it names.

    What is so already is left alone, so applying again does nothing. The mounts must be there ('mfs mount --config').
    --check takes mounts as they are: it does not have them look at their sources.
    """
    from mfs.cli import applying
    from mfs.models_file import read

    wanted = read(file)
    done, left = ([], applying.differences(wanted)) if check else applying.settle(wanted)
    if as_json:
        print_json({"done": [one.as_json() for one in done], "left": [one.as_json() for one in left]})
    else:
        for one in left if check else done:
            print(clean(str(one) if check else f"settled: {one}"))
        if not done and not left:
            print(clean(f"{file}: everything is as it says"))
    if not check:
        for one in left:
            warn(f"still: {one}")
    if left:
        raise Failed

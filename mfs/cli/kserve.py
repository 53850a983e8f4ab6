"""`mfs kserve-init`: called by KServe as a storage initializer."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mfs.cli.page import Page
from mfs.cli.text import clean, count
from mfs.cli.values import DURATION


@click.command(
    cls=Page,
    short_help="Be KServe's storage initializer for mfs:// models.",
    sections={
        "Examples": """\
mfs kserve-init mfs://prod/llama /mnt/models
mfs kserve-init mfs://prod/base /mnt/models/base mfs://prod/lora /mnt/models/lora""",
        "How a server gets them": """\
The links point below --mounts, so the server's container must see the mount at the
same path: a volume of the ServingRuntime or InferenceService, by CSI or hostPath with
mountPropagation: HostToContainer. Manifests: tools/deploy/kubernetes/kserve.""",
        "Environment": "MFS_MOUNTS       instead of --mounts",
    },
)
@click.argument("arguments", metavar="URI DIRECTORY...", nargs=-1, required=True)
@click.option(
    "--mounts",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="MFS_MOUNTS",
    default="/mnt/mfs",
    show_default=True,
    help="Where mounts are seen, in this container and in the server's.",
)
@click.option("--timeout", type=DURATION, default="2m", show_default=True, help="How long to wait for a mount.")
def kserve_init(arguments: tuple[str, ...], mounts: Path, timeout: float) -> None:
    """Have the model at each URI, mfs://PATH below --mounts, seen in the DIRECTORY after it, without copying it.

    A file is seen under its name; of a directory, all that is in it.
    """
    from mfs import kserve

    until_s = time.monotonic() + timeout
    wanted = [(kserve.model_path(uri, mounts), place) for uri, place in kserve.pairs(arguments)]
    for model, place in wanted:
        kserve.wait_for(model, until_s=until_s)
        names = kserve.link(model, place)
        print(clean(f"{place}: {count(names, 'link')} to {model}"))

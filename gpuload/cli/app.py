"""`gpuload`: the command line. Parses, asks, prints; nothing else happens here. Exit status: 0, 1 failure, 2 usage.

holding, looking, programs   its commands
"""

from __future__ import annotations

from typing import Any

import click

from gpuload.cli import holding, looking, programs
from gpuload.paths import SOCKET_VARIABLE
from mfs.cli.page import EXIT_STATUS, Front


class _Front(Front):
    groups = (
        ("Serve", ("serve", "load", "swap", "pin", "unload", "evict", "resize")),
        ("Look", ("status", "wait", "metrics", "plan", "doctor", "bench")),
        ("Ahead of need", ("digest",)),
        ("Programs that know nothing of gpuload", ("run", "hook")),
        ("Programs in C and C++", ("include",)),
    )
    sections = {  # noqa: RUF012
        "Examples": """\
gpuload serve --arena cuda:0=70G &
gpuload load /mnt/models/llama-a --name llama
gpuload swap /mnt/models/llama-b --name llama    only bytes that differ cross the bus
gpuload status
gpuload run -- python server.py""",
        "In Python": """\
gpuload.attach("llama")    its tensors, without a copy
gpuload.load_file, safe_open, load_model, stream    without a server""",
        "Exit status": EXIT_STATUS,
        "Files": """\
$XDG_RUNTIME_DIR/gpuload.sock or /tmp/gpuload-UID/gpuload.sock    the server's socket
$XDG_CACHE_HOME/gpuload/digests or ~/.cache/gpuload/digests       digests of files""",
        "Environment": f"""\
{SOCKET_VARIABLE}    another place for the socket
GPULOAD_AUTO      1: programs load through the server, where `gpuload hook install` was run
GPULOAD_ZERO_COPY 1: what they load on a GPU is the server's memory, not a copy: they must never write to it""",
    }


@click.group(cls=_Front, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 92})
@click.option("--debug", is_flag=True, help="Show where an error comes from (a traceback).")
@click.version_option(package_name="mfs", prog_name="gpuload", message="%(prog)s %(version)s")
def cli(**_: Any) -> None:
    """Model weights into device memory at link speed, kept there, shared, swapped by difference.

    One process per node holds the weights; programs attach to them without a copy.
    """


for command in (
    holding.serve, holding.load, holding.swap, holding.pin, holding.unload, holding.resize,
    looking.status, looking.wait, looking.metrics, looking.plan, looking.doctor, looking.bench, looking.digest,
    programs.run, programs.hook, programs.include,
):  # fmt: skip
    cli.add_command(command)
cli.add_command(holding.unload, "evict")  # what mfs calls it

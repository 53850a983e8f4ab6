"""The `gpuload` command: argv, printing, and what a command does besides asking the server."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point. Every failure is one line on stderr and a status; never a traceback."""
    from mfs.cli.standard import prepare

    prepare(may_restart=True)
    from gpuload.cli.app import cli
    from mfs.cli.run import run

    sys.exit(run(cli, sys.argv[1:], "gpuload"))

"""The `gpuload` command: argv, printing, and what a command does besides asking the server."""

from __future__ import annotations

import sys

from mfs.cli import interruptible


def main() -> None:
    """The entry point. Every failure is one line on stderr and a status; never a traceback."""
    sys.exit(interruptible(_run, "gpuload"))


def _run() -> int:
    from mfs.cli.standard import prepare

    prepare(may_restart=True)
    from gpuload.cli.app import cli
    from mfs.cli.run import run

    return run(cli, sys.argv[1:], "gpuload")

"""The `mfs` command: argv, printing and progress bars, and nothing else that anyone else would want."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    return interruptible(lambda: _run(argv), "mfs")


def _run(argv: Sequence[str] | None) -> int:
    from mfs.cli.standard import prepare

    prepare(may_restart=argv is None)
    from mfs.cli.app import cli
    from mfs.cli.run import run

    return run(cli, sys.argv[1:] if argv is None else argv)


def interruptible(command: Callable[[], int], name: str) -> int:
    """Run a command called `name`; Ctrl-C while it still imports is a line and a status, too.

    Imports are most of what a short command does, and `mfs.cli.run`, which says so later, is one of them.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130

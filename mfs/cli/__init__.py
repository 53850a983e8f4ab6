"""The `mfs` command: argv, printing and progress bars, and nothing else that anyone else would want."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    from mfs.cli.standard import prepare

    prepare(may_restart=argv is None)
    from mfs.cli.app import cli
    from mfs.cli.run import run

    return run(cli, sys.argv[1:] if argv is None else argv)

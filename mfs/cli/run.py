"""From exceptions to exit statuses: every error is one line on stderr, never a traceback (unless --debug)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from mfs.cli.text import clean
from mfs.errors import MfsError, UsageError

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Failed(Exception):
    """The command has said what went wrong; only the exit status is left."""


def run(cli: click.Command, argv: Sequence[str], name: str = "mfs") -> int:
    """Run `cli`, the command called `name`, and return the exit status."""
    try:
        result = cli.main(args=list(argv), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0  # click returns the status of an Exit here
    except click.ClickException as error:
        _say(_usage_message(error, name), name)
        return USAGE
    except Failed:
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted", name)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, MfsError):
            _say(str(error), name)
        elif isinstance(error, OSError) and error.filename is not None:
            _say(f"{os.fsdecode(error.filename)}: {error.strerror}", name)
        else:
            _say(f"internal error: {type(error).__name__}: {error}; '{name} --debug …' shows where", name)
        return USAGE if isinstance(error, UsageError) else FAILED


def warn(message: str) -> None:
    """One line on stderr that does not end the command."""
    _say(message)


def _say(message: str, name: str = "mfs") -> None:
    line = clean(" ".join(message.split()))
    print(f"{name}: {line}", file=sys.stderr, flush=True)


def _usage_message(error: click.ClickException, name: str) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else name
    message = error.format_message().rstrip(".")
    command = path.removeprefix(name).strip()
    return f"{command}: {message}; see '{path} --help'" if command else f"{message}; see '{path} --help'"

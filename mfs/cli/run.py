"""From exceptions to exit statuses: every error is one line on stderr, never a traceback (unless --debug)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from mfs.cli.standard import flushed_fault, give_up, is_nobody_reading, is_of_output, tell
from mfs.errors import MfsError, UsageError
from mfs.shown import clean, mask

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Failed(Exception):
    """The command has said what went wrong; only the exit status is left."""


def run(cli: click.Command, argv: Sequence[str], name: str = "mfs") -> int:
    """Run `cli`, the command called `name`, and return the exit status."""
    try:
        result = cli.main(args=list(argv), prog_name=name, standalone_mode=False)
        fault = flushed_fault()
        if fault is not None:
            return _unwritten(fault, name)
        return result if isinstance(result, int) else 0  # click returns the status of an Exit here
    except click.ClickException as error:
        say(_usage_message(error, name), name)
        return USAGE
    except Failed:
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        say("interrupted", name)
        return INTERRUPTED
    except Exception as error:
        if is_of_output(error):
            give_up(sys.stdout)
            return _unwritten(error, name)
        if "--debug" in argv:
            raise
        if isinstance(error, MfsError):
            say(str(error), name)
        elif isinstance(error, FileNotFoundError) and error.filename is None and _is_nowhere():
            say("the current directory was removed: go to another, or give absolute paths", name)
        elif isinstance(error, OSError) and error.filename is not None:
            say(f"{os.fsdecode(error.filename)}: {error.strerror}", name)
        else:
            say(f"internal error: {type(error).__name__}: {error}; '{name} --debug …' shows where", name)
        return USAGE if isinstance(error, UsageError) else FAILED


def warn(message: str) -> None:
    """One line on stderr that does not end the command."""
    say(message)


def _is_nowhere() -> bool:
    try:
        os.getcwd()
        return False
    except FileNotFoundError:
        return True


def _unwritten(fault: OSError, name: str) -> int:
    if not is_nobody_reading(fault):
        say(f"output cannot be written: {fault.strerror}", name)
    return FAILED


def say(message: str, name: str = "mfs") -> None:
    """One line on stderr of the command called `name`."""
    line = clean(mask(" ".join(message.split())))
    tell(f"{name}: {line}")


def _usage_message(error: click.ClickException, name: str) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else name
    message = error.format_message().rstrip(".")
    command = path.removeprefix(name).strip()
    return f"{command}: {message}; see '{path} --help'" if command else f"{message}; see '{path} --help'"

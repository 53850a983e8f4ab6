"""From paths as a person gives them to the daemons that serve them, without touching any mount."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from mfs.cli.values import ParamType
from mfs.errors import StoreError, TransientStoreError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mfs.control.client import Client
    from mfs.control.runtime import Served


class TreePath(ParamType[str]):
    """A path that may lie in a mount. Unlike click.Path it is never looked at: a hung mount would hang us too."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


TREE_PATH = TreePath()
paths_argument = click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=TREE_PATH)


def absolute(path: str, what: str) -> str:
    """`path` from where the person stands. Raises: UsageError if it is empty, as a variable that was never set is."""
    if not path:
        raise UsageError(f"{what} is an empty path")
    return os.path.abspath(path)


def source_url(source: str) -> str:
    """SOURCE as settings have it: an address, or the absolute path of a folder. Raises: UsageError if it is empty."""
    return source if "://" in source else absolute(source, "SOURCE")


@dataclass
class Target:
    """One mount, and the given paths that lie in it."""

    served: Served
    client: Client
    paths: list[str] = field(default_factory=list)
    """From the mount's root."""
    given: list[str] = field(default_factory=list)
    """The same as they were written."""

    def full(self, path: str) -> str:
        """A path from the mount's root as a path of the file system."""
        return os.path.join(self.served.mountpoint, path) if path else self.served.mountpoint


def targets(paths: Sequence[str]) -> list[Target]:
    """The mounts that `paths` lie in, in the order they were first named.

    Raises: NotFoundError for a path outside any mount; StoreError for a mount whose daemon is gone.
    """
    from mfs.control.runtime import find_mount

    found: dict[str, Target] = {}
    for path in paths:
        if not path:
            raise UsageError("an empty path: expected a path under a mount")
        served = find_mount(path)
        target = found.get(served.mountpoint)
        if target is None:
            target = found[served.mountpoint] = Target(served, connect(served))
        target.paths.append(served.place.path)
        target.given.append(path)
    return list(found.values())


def connect(served: Served, *, timeout_s: float = 30.0) -> Client:
    """A client of the daemon behind a mount. Raises: StoreError if it is gone, with what to do about it."""
    from mfs.control.client import Client

    if not is_listening(served):
        record, place = served.record, served.mountpoint
        if record is not None and record.is_held:
            raise TransientStoreError(f"the daemon of {place} was killed, and the next one is starting: try again")
        cause = f"its daemon (pid {record.pid}) has ended" if record else "no daemon of it can be found"
        raise StoreError(
            f"the mount at {place} is dead: {cause}; 'mfs umount {place}' removes it, mounting again replaces it"
        )
    return Client(served.socket, timeout_s=timeout_s)


def is_listening(served: Served) -> bool:
    """See `Served.is_listening`."""
    return served.is_listening

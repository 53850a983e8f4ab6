"""`mfs completion` and `mfs version`: about the command itself."""

from __future__ import annotations

import sys
from typing import Any

import click

from mfs import __version__
from mfs.cli.page import Page, json_option
from mfs.cli.text import print_json


@click.command(
    cls=Page,
    short_help="Print the completion script of a shell.",
    sections={
        "Examples": """\
mfs completion bash > /etc/bash_completion.d/mfs        for all users
mfs completion bash >> ~/.bashrc                        for yourself
mfs completion zsh > "${fpath[1]}/_mfs"
mfs completion fish > ~/.config/fish/completions/mfs.fish"""
    },
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete mfs's commands, options and paths."""
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    root = click.get_current_context().find_root().command
    script = complete(root, {}, "mfs", "_MFS_COMPLETE")
    print(script.source_template % script.source_vars())  # not .source(): that asks the local bash for its version


@click.command(cls=Page, short_help="Print versions.")
@json_option
def version(as_json: bool) -> None:
    """Print the versions of mfs and of what it stands on."""
    import os
    import platform
    from importlib import metadata

    versions = {"mfs": __version__, "python": platform.python_version()}
    for name in ("pyfuse3", "trio", "boto3"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions["kernel"] = os.uname().release
    if as_json:
        print_json(versions)
    else:
        rest = ", ".join(f"{name} {value}" for name, value in versions.items() if name != "mfs")
        print(f"mfs {versions['mfs']} ({rest})")


def print_version(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    """Callback of `mfs --version`."""
    if value and not ctx.resilient_parsing:
        print_version_line()
        sys.stdout.flush()
        ctx.exit(0)


def print_version_line() -> None:
    print(f"mfs {__version__}")

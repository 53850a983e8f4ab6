"""The commands about programs that know nothing of gpuload, and those in C and C++."""

from __future__ import annotations

import os
from pathlib import Path

import click

from gpuload.cli.examples import EXAMPLES
from gpuload.paths import SOCKET_VARIABLE
from mfs.cli.page import Page
from mfs.errors import UsageError


@click.command(
    short_help="Run a program whose weights the server serves.",
    cls=Page,
    sections={"Examples": EXAMPLES["run"]},
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--socket", "socket_path", metavar="PATH", help="The server's socket.")
def run(command: tuple[str, ...], socket_path: str | None) -> None:
    """Run COMMAND with safetensors served by the resident server: gpuload run -- python server.py.

    Nothing else changes; without a server the program loads as ever and logs one line.
    """
    site = str(Path(__file__).parents[1] / "hooks" / "site")
    paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "GPULOAD_AUTO": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if socket_path:
        environment[SOCKET_VARIABLE] = os.path.abspath(socket_path)
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        raise UsageError(f"cannot run {command[0]!r}: {error.strerror}") from None


@click.command(
    short_help="Install that for all programs of this Python.", cls=Page, sections={"Examples": EXAMPLES["hook"]}
)
@click.argument("action", type=click.Choice(["install", "remove", "status"]))
def hook(action: str) -> None:
    """The .pth in this Python's site-packages: with GPULOAD_AUTO=1, every program it runs is as under `gpuload run`."""
    from gpuload.hooks import pth

    if action == "status":
        click.echo(f"{pth.location()}: {'installed' if pth.is_installed() else 'not installed'}")
    else:
        path = pth.install() if action == "install" else pth.remove()
        click.echo(f"{path}: {'installed; set GPULOAD_AUTO=1 to use it' if action == 'install' else 'removed'}")


@click.command(short_help="Print where gpuload.h is.", cls=Page, sections={"Examples": EXAMPLES["include"]})
def include() -> None:
    """Print the folder of gpuload.h, the client for C and C++, and of an example that uses it."""
    from gpuload import include_dir

    click.echo(include_dir())

"""What the commands are told: options that several share, and what their values mean."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gpuload.paths import SOCKET_VARIABLE
from mfs.errors import UsageError
from mfs.units import parse_size


def parse_arenas(given: tuple[str, ...], option: str = "--arena") -> dict[str, int]:
    """'DEVICE=SIZE', each device once. Raises: UsageError."""
    from gpuload.device import canonical_name

    budget: dict[str, int] = {}
    for text in given:
        name, separator, size = text.partition("=")
        if not separator:
            raise UsageError(f"{option} {text!r}: expected DEVICE=SIZE, such as cuda:0=70G")
        name = canonical_name(name)
        if name in budget:
            raise UsageError(f"{option} {text!r}: {name} was given before")
        try:
            budget[name] = parse_size(size)
        except ValueError as error:
            raise UsageError(f"{option} {text!r}: {error}") from None
    return budget


def parse_rules(given: tuple[str, ...]) -> dict[str, int | None]:
    """'GLOB=AXIS' or 'GLOB=whole', in order. Raises: UsageError."""
    rules: dict[str, int | None] = {}
    for text in given:
        pattern, _, axis = text.rpartition("=")
        if not pattern or not (axis == "whole" or axis.isdecimal()):
            raise UsageError(f"--rule {text!r}: expected GLOB=AXIS or GLOB=whole")
        rules[pattern] = None if axis == "whole" else int(axis)
    return rules


def parse_device_map(given: tuple[str, ...]) -> dict[str, str]:
    """'PREFIX=DEVICE' entries, or the path of a JSON file that holds such a map. Raises: UsageError."""
    found: dict[str, str] = {}
    for text in given:
        prefix, separator, device = text.rpartition("=")
        if separator:
            found[prefix] = device
            continue
        try:
            entries = json.loads(Path(text).read_bytes())
        except OSError as error:
            raise UsageError(
                f"--device-map {text!r}: expected PREFIX=DEVICE or a JSON file: {error.strerror}"
            ) from None
        except (ValueError, RecursionError):
            raise UsageError(
                f"--device-map {text!r}: expected PREFIX=DEVICE or a JSON file: this is not JSON"
            ) from None
        if not isinstance(entries, dict):
            raise UsageError(f"--device-map {text!r}: expected a JSON object of module prefixes and devices")
        found |= {
            prefix: f"cuda:{device}" if type(device) is int else str(device) for prefix, device in entries.items()
        }
    return found


socket_option = click.option(
    "--socket", "socket_path", metavar="PATH", help=f"The server's socket. Default: ${SOCKET_VARIABLE}, else per user."
)
device_option = click.option("--device", metavar="NAME", help="'cpu' or 'cuda:N'. Default: the server's only device.")
device_map_option = click.option(
    "--device-map",
    "device_map",
    multiple=True,
    metavar="PREFIX=DEVICE",
    help="Spread it: tensors whose name begins with the module PREFIX go to DEVICE, the longest prefix wins, an empty"
    " one ('=cuda:0') stands for the rest. Or a JSON file with such a map, as accelerate makes them.",
)
rule_option = click.option(
    "--rule", "rules", multiple=True, metavar="GLOB=AXIS", help="How to cut; else Megatron's way."
)
wait_option = click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0, 600),
    default=0.0,
    metavar="SECONDS",
    help="Longest wait for memory that others still hold.  [0]",
)
digests_option = click.option(
    "--digests",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Where digests of files are kept. Default: gpuload/digests in $XDG_CACHE_HOME or ~/.cache.",
)

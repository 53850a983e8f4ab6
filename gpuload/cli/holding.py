"""The commands that change what is resident: a server, and what it holds."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gpuload.cli import printing
from gpuload.cli.examples import EXAMPLES
from gpuload.cli.options import (
    device_map_option,
    device_option,
    digests_option,
    parse_arenas,
    parse_device_map,
    parse_rules,
    rule_option,
    socket_option,
    wait_option,
)
from gpuload.paths import default_digests, default_socket
from mfs.cli.page import Page, json_option
from mfs.cli.run import say
from mfs.cli.values import SIZE
from mfs.errors import UsageError
from mfs.logs import set_up_logging
from mfs.units import parse_address


@click.command(
    short_help="Hold weights for every process of this node.", cls=Page, sections={"Examples": EXAMPLES["serve"]}
)
@click.option(
    "--arena",
    "arenas",
    multiple=True,
    metavar="DEVICE=SIZE",
    help="The most it may take, once per device.  [cpu=4G]",
)
@click.option(
    "--floor",
    "floors",
    multiple=True,
    metavar="DEVICE=SIZE",
    help="Of that, what it takes at start and keeps.  [cards: nothing; host memory: all]",
)
@click.option(
    "--ram-tier",
    "ram_tier",
    type=SIZE,
    default="0",
    metavar="SIZE",
    help="Page-locked memory on each NUMA node with cards, for what is evicted: it comes back without its files.  [0]",
)
@click.option(
    "--mode",
    default="600",
    show_default=True,
    metavar="OCTAL",
    help="Of the socket: who may attach; on GPUs this user alone.",
)
@digests_option
@click.option(
    "--metrics-addr", metavar="HOST:PORT", help="Answer Prometheus there, at /metrics; whoever can connect is told."
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="Lines for people or JSON; auto: by whether it is a terminal.",
)
@click.option(
    "--take-over",
    "takes_over",
    is_flag=True,
    help="Go on in place of the server that is there, with the same --arena; under systemd it returns once that is so.",
)
@socket_option
def serve(
    arenas: tuple[str, ...],
    floors: tuple[str, ...],
    ram_tier: int,
    mode: str,
    digests: str | None,
    metrics_addr: str | None,
    log_format: str,
    takes_over: bool,
    socket_path: str | None,
) -> None:
    """Hold weights for every process of this node, until SIGTERM or Ctrl-C.

    Memory is taken when a model needs it and given back a moment after the last one that stood there, so that an engine
    beside it has the rest; nothing fragments. What --floor keeps is always there: a swap waits for nobody, and in host
    memory not for the kernel to zero it. Users that the socket's mode admits may attach and look; only this user and
    root may load, swap, pin, unload and resize. 'cpu:1', 'cpu:2' and so on are further arenas in host memory.

    Weights and who is attached outlive a server that is killed: a second process, or systemd, keeps them for the next
    one, which is started at once. With --take-over a new version, say, goes on in place of a server at work: nobody
    loses weights, and no connection is refused. Every --arena must be as it was, else it is refused and the old one
    serves on: `gpuload resize` changes a budget, and more than an arena was started with needs a start from nothing.
    """
    from gpuload.cli import serving
    from gpuload.server.config import ServerConfig

    budget = parse_arenas(arenas or ("cpu=4G",))
    floor = parse_arenas(floors, "--floor")
    for name in floor.keys() - budget.keys():
        raise UsageError(f"--floor {name}={floor[name]}: there is no --arena on {name}")
    floor = {name: size for name, size in budget.items() if name.startswith("cpu")} | floor
    if not re.fullmatch(r"[0-7]{3,4}", mode):
        raise UsageError(f"--mode {mode!r}: expected an octal mode such as 660")
    path = socket_path or default_socket()
    folder = os.path.abspath(digests or default_digests())
    if metrics_addr is not None:
        try:
            parse_address(metrics_addr)
        except ValueError as error:
            raise UsageError(f"--metrics-addr: {error}") from None
    config = ServerConfig(
        socket_path=path,
        socket_mode=int(mode, 8),
        arena_bytes=budget,
        floor_bytes=floor,
        ram_tier_bytes=ram_tier,
        digests_folder=folder,
        metrics_addr=metrics_addr,
        store_address=serving.store_address(),
        is_kept_on=not serving.has_holder(),
    )
    if not serving.has_manager():
        serving.become_holder()
    if takes_over and not serving.is_child():
        serving.start_child()
        return
    set_up_logging("WARNING", "gpuload", log_format)
    from gpuload.device import open_device
    from gpuload.server.daemon import run

    def on_ready() -> None:
        say(f"serving at {path}", "gpuload")
        serving.tell_parent()

    run(config, open_device, on_ready, takes_over=takes_over)


def _loading(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `load` and `swap` share."""
    for option in reversed(
        [
            click.argument("model", type=click.Path()),
            click.option("--name", metavar="NAME", help="What to serve it as. Default: the folder's or file's name."),
            device_option,
            device_map_option,
            click.option("--pin", is_flag=True, help="Never evict it."),
            click.option(
                "--ranks",
                metavar="DEVICE,DEVICE,...",
                help="All tensor-parallel ranks, one on each of these devices, as one model: swapped as one.",
            ),
            click.option("--rank", default=0, show_default=True, help="Tensor-parallel rank to hold, alone."),
            click.option("--world", default=1, show_default=True, help="Tensor-parallel size."),
            rule_option,
            wait_option,
            click.option("--explain", "is_explained", is_flag=True, help="Say where the time went, the mount's too."),
            json_option,
            socket_option,
        ]
    ):
        command = option(command)
    return command


@click.command(short_help="Make a model resident.", cls=Page, sections={"Examples": EXAMPLES["load"]})
@_loading
@click.option(
    "--retain", type=click.Choice(["lru", "lease"]), default="lru", show_default=True, help="How long it stays."
)
def load(model: str, retain: str, **given: Any) -> None:
    """Make MODEL (a folder, an index, or a .safetensors file) resident.

    It is refused, with the shortfall named and nothing evicted, if it cannot fit even after evicting what is neither
    leased nor pinned. --retain lru: stays until its room is needed; lease: goes when the last program lets go of it.
    """
    _load(model, is_swap=False, options={"retain": retain}, **given)


@click.command(short_help="Serve a model in place of another.", cls=Page, sections={"Examples": EXAMPLES["swap"]})
@_loading
@click.option("--allow-gap", is_flag=True, help="If both do not fit, drop the old one first; a failure leaves neither.")
def swap(model: str, allow_gap: bool, **given: Any) -> None:
    """Serve MODEL in place of what has its name; only bytes that differ are moved.

    The old model serves until the new one is complete, on all its devices, and goes on serving if anything fails.
    Programs that are attached keep the old bytes until they refresh or let go. Without --device and --device-map the
    new one stands where the old one stood.
    """
    _load(model, is_swap=True, options={"allow_gap": allow_gap}, **given)


def _load(
    model: str,
    *,
    is_swap: bool,
    options: dict[str, Any],
    name: str | None,
    device: str | None,
    device_map: tuple[str, ...],
    pin: bool,
    ranks: str | None,
    rank: int,
    world: int,
    rules: tuple[str, ...],
    wait_s: float,
    is_explained: bool,
    as_json: bool,
    socket_path: str | None,
) -> None:
    from gpuload.client.asking import ask, load_resident
    from gpuload.moving.plan import MEGATRON_RULES

    if name is None and is_swap:
        devices = ask({"op": "status"}, socket_path=socket_path)["devices"]
        served = {m["model"] for d in devices for m in d["models"] if m["model"] and device in (None, d["device"])}
        if len(served) != 1:
            raise UsageError(f"{len(served)} models are resident: say which to replace, with --name")
        (name,) = served
    cut = parse_rules(rules) or dict(MEGATRON_RULES)
    options |= {"pinned": pin, "rank": rank, "world": world, "rules": cut if world > 1 or ranks else {}}
    options |= {"device_map": parse_device_map(device_map), "ranks": ranks.split(",") if ranks else []}
    name = name or Path(os.path.abspath(model)).name.removesuffix(".safetensors")
    options |= ({"explain": True} if is_explained else {}) | ({"wait_s": wait_s} if wait_s else {})
    began_s = time.monotonic()

    def on_wait() -> None:
        say(f"no server is at {socket_path or default_socket()} yet; waiting a moment for one", "gpuload")

    reply = load_resident(
        model, name, device, is_swap=is_swap, options=options, socket_path=socket_path, on_wait=on_wait
    )
    if is_explained:
        from gpuload.cli.explaining import explain

        reply["explained"] = explain(os.path.abspath(model), began_s, time.monotonic(), reply["explained"])
    printing.show_report(reply, as_json)


@click.command(short_help="Stop serving a model.", cls=Page, sections={"Examples": EXAMPLES["unload"]})
@click.argument("name")
@device_option
@json_option
@socket_option
def unload(name: str, device: str | None, as_json: bool, socket_path: str | None) -> None:
    """Stop serving NAME. Its memory is free at once, or when the last program that is attached lets go."""
    from gpuload.client.asking import ask

    reply = ask({"op": "unload", "model": name, "device": device}, socket_path=socket_path)
    printing.show_unloaded(reply, as_json)


@click.command(
    short_help="Change how much memory the server may have.", cls=Page, sections={"Examples": EXAMPLES["resize"]}
)
@click.argument("device")
@click.argument("size", type=SIZE)
@click.option("--floor", type=SIZE, help="What it keeps whether models need it or not. Default: as before.")
@click.option("--evict", is_flag=True, help="Evict models that are neither leased nor pinned, oldest use first.")
@wait_option
@json_option
@socket_option
def resize(
    device: str, size: int, floor: int | None, evict: bool, wait_s: float, as_json: bool, socket_path: str | None
) -> None:
    """Let the server have SIZE of DEVICE's memory, at most what it was started with.

    What is above goes back to the device before this returns. It is refused, and nothing is evicted, where models hold
    more: those that may go are named, and go with --evict.
    """
    from gpuload.client.asking import ATTACH_S, ask

    request = {"op": "resize", "device": device, "bytes": size, "evict": evict, "wait_s": wait_s}
    request |= {} if floor is None else {"floor_bytes": floor}
    reply = ask(request, socket_path=socket_path, timeout_s=ATTACH_S + wait_s)
    printing.show_resized(reply, as_json)


@click.command(short_help="Never evict a model.", cls=Page, sections={"Examples": EXAMPLES["pin"]})
@click.argument("name")
@click.option("--off", is_flag=True, help="Let it be evicted again.")
@device_option
@json_option
@socket_option
def pin(name: str, off: bool, device: str | None, as_json: bool, socket_path: str | None) -> None:
    """Never evict NAME."""
    from gpuload.client.asking import ask

    reply = ask({"op": "pin", "model": name, "pinned": not off, "device": device}, socket_path=socket_path)
    printing.show(reply, as_json, f"{name}: {'may be evicted' if off else 'pinned'}")

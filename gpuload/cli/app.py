"""`gpuload`: the command line. Parses, asks, prints; nothing else happens here. Exit status: 0, 1 failure, 2 usage."""

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
    Size,
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
from gpuload.kv_cache import ITEM_BYTES
from gpuload.paths import SOCKET_VARIABLE, default_digests, default_socket
from mfs.cli.page import EXIT_STATUS, Front, Page, json_option
from mfs.cli.run import Failed, say
from mfs.cli.text import print_json
from mfs.errors import UsageError
from mfs.logs import set_up_logging
from mfs.units import parse_address


class _Front(Front):
    groups = (
        ("Serve", ("serve", "load", "swap", "pin", "unload", "evict", "resize")),
        ("Look", ("status", "wait", "metrics", "plan", "doctor", "bench")),
        ("Ahead of need", ("digest",)),
        ("Programs that know nothing of gpuload", ("run", "hook")),
        ("Programs in C and C++", ("include",)),
    )
    sections = {  # noqa: RUF012
        "Examples": """\
gpuload serve --arena cuda:0=70G &
gpuload load /mnt/models/llama-a --name llama
gpuload swap /mnt/models/llama-b --name llama    only bytes that differ cross the bus
gpuload status
gpuload run -- python server.py""",
        "In Python": """\
gpuload.attach("llama")    its tensors, without a copy
gpuload.load_file, safe_open, load_model, stream    without a server""",
        "Exit status": EXIT_STATUS,
        "Files": """\
$XDG_RUNTIME_DIR/gpuload.sock or /tmp/gpuload-UID/gpuload.sock    the server's socket
$XDG_CACHE_HOME/gpuload/digests or ~/.cache/gpuload/digests       digests of files""",
        "Environment": f"""\
{SOCKET_VARIABLE}    another place for the socket
GPULOAD_AUTO      1: programs load through the server, where `gpuload hook install` was run
GPULOAD_ZERO_COPY 1: what they load on a GPU is the server's memory, not a copy: they must never write to it""",
    }


@click.group(cls=_Front, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 92})
@click.option("--debug", is_flag=True, help="Show where an error comes from (a traceback).")
@click.version_option(package_name="mfs", prog_name="gpuload", message="%(prog)s %(version)s")
def cli(**_: Any) -> None:
    """Model weights into device memory at link speed, kept there, shared, swapped by difference.

    One process per node holds the weights; programs attach to them without a copy.
    """


@cli.command(
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
    type=Size(),
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


@cli.command(short_help="Make a model resident.", cls=Page, sections={"Examples": EXAMPLES["load"]})
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


@cli.command(short_help="Serve a model in place of another.", cls=Page, sections={"Examples": EXAMPLES["swap"]})
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
    reply = load_resident(model, name, device, is_swap=is_swap, options=options, socket_path=socket_path)
    if is_explained:
        from gpuload.cli.explaining import explain

        reply["explained"] = explain(os.path.abspath(model), began_s, time.monotonic(), reply["explained"])
    printing.show_report(reply, as_json)


@cli.command(short_help="Stop serving a model.", cls=Page, sections={"Examples": EXAMPLES["unload"]})
@click.argument("name")
@device_option
@json_option
@socket_option
def unload(name: str, device: str | None, as_json: bool, socket_path: str | None) -> None:
    """Stop serving NAME. Its memory is free at once, or when the last program that is attached lets go."""
    from gpuload.client.asking import ask

    reply = ask({"op": "unload", "model": name, "device": device}, socket_path=socket_path)
    printing.show_unloaded(reply, as_json)


cli.add_command(unload, "evict")  # what mfs calls it


@cli.command(
    short_help="Change how much memory the server may have.", cls=Page, sections={"Examples": EXAMPLES["resize"]}
)
@click.argument("device")
@click.argument("size", type=Size())
@click.option("--floor", type=Size(), help="What it keeps whether models need it or not. Default: as before.")
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


@cli.command(short_help="Never evict a model.", cls=Page, sections={"Examples": EXAMPLES["pin"]})
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


@cli.command(short_help="Show what is resident, and what is free.", cls=Page, sections={"Examples": EXAMPLES["status"]})
@json_option
@socket_option
def status(as_json: bool, socket_path: str | None) -> None:
    """Show what is resident, who holds it, and what is free."""
    from gpuload.client.asking import ask

    printing.show_status(ask({"op": "status"}, socket_path=socket_path), as_json)


@cli.command(
    short_help="Wait until a model is resident, or swapped.", cls=Page, sections={"Examples": EXAMPLES["wait"]}
)
@click.argument("name")
@click.option(
    "--after", default=0, type=click.IntRange(0), metavar="GEN", help="A generation; 0: until there is any.  [0]"
)
@click.option(
    "--timeout", "timeout_s", default=60.0, type=click.FloatRange(0), metavar="SECONDS", help="At most 3600.  [60]"
)
@device_option
@json_option
@socket_option
def wait(name: str, after: int, timeout_s: float, device: str | None, as_json: bool, socket_path: str | None) -> None:
    """Wait until NAME is served in a later generation than GEN, and say which. Status 1 if that did not happen in time.

    Generations are numbers that `load`, `swap` and `status` show; each content that comes to be served has a higher one
    than all before. They begin anew with the server.
    """
    from gpuload.client.asking import wait_resident

    reply = wait_resident(name, after=after, device=device, socket_path=socket_path, timeout_s=timeout_s)
    printing.show_waited(reply, as_json, timeout_s)
    if not reply["changed"]:
        raise Failed


@cli.command(short_help="Print metrics for Prometheus.", cls=Page, sections={"Examples": EXAMPLES["metrics"]})
@click.option("--openmetrics", is_flag=True, help="In OpenMetrics 1.0 instead of Prometheus' text format 0.0.4.")
@json_option
@socket_option
def metrics(openmetrics: bool, as_json: bool, socket_path: str | None) -> None:
    """Print what Prometheus is told of the server: arenas, models, leases, loads and swaps.

    --json: a list of families, each with its samples.
    """
    from gpuload.client.asking import ask

    accept = "application/openmetrics-text" if openmetrics else "text/plain"
    text = ask({"op": "metrics", "accept": accept}, socket_path=socket_path)["text"]
    if as_json:
        from mfs.metrics.exposition import parsed

        print_json(parsed(text, openmetrics=openmetrics))
    else:
        click.echo(text, nl=False)


@cli.command(short_help="Say whether models fit; loads nothing.", cls=Page, sections={"Examples": EXAMPLES["plan"]})
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@click.option("--kv-cache", "tokens", default=0, metavar="TOKENS", help="Room for so many tokens of key-value cache.")
@click.option(
    "--kv-dtype",
    type=click.Choice(["auto", *ITEM_BYTES]),
    default="auto",
    show_default=True,
    help="Of the cache; auto: as config.json says.",
)
@click.option("--device-memory", "memory_bytes", type=Size(), help="Of the card to plan for.  [80 and 141 GB]")
@click.option("--device", metavar="NAME", help="Also against this device, with what is in use there now.")
@device_map_option
@rule_option
@digests_option
@json_option
@socket_option
def plan(
    models: tuple[str, ...],
    tokens: int,
    kv_dtype: str,
    memory_bytes: int | None,
    device: str | None,
    device_map: tuple[str, ...],
    rules: tuple[str, ...],
    digests: str | None,
    as_json: bool,
    socket_path: str | None,
) -> None:
    """Say whether each MODEL fits, and with what room for a key-value cache, from headers and config alone.

    Of one model: bytes per dtype, per tensor-parallel rank, and the smallest tensor-parallel size for cards of 80 and
    141 GB or --device-memory, and for --device or every device of --device-map: beside what other processes hold
    there, and in a running server's arena. The room is that of each rank at that size.

    Of several: whether one card holds all of them, tensors that they share counted once. What they share is known by
    digests that were kept (`gpuload digest`); what has none is counted for each. Activations and a framework's own
    buffers are in no sum.
    """
    from gpuload.cli.planning import examine
    from gpuload.cli.together import examine_all

    item_bytes = ITEM_BYTES.get(kv_dtype)
    if len(models) == 1:
        found = examine(
            models[0], tokens, device, parse_device_map(device_map), parse_rules(rules), socket_path,
            memory_bytes=memory_bytes, item_bytes=item_bytes,
        )  # fmt: skip
        printing.show_plan(found, as_json)
        return
    if device or device_map:
        raise UsageError("--device and --device-map are for one MODEL; for several say --device-memory")
    printing.show_plan_of_several(
        examine_all(
            models, tokens, parse_rules(rules), socket_path, memory_bytes=memory_bytes, item_bytes=item_bytes,
            digests=digests or default_digests(),
        ),
        as_json,
    )  # fmt: skip


@cli.command(
    short_help="Compute digests for the first swap to a model.", cls=Page, sections={"Examples": EXAMPLES["digest"]}
)
@click.argument("model", type=click.Path())
@click.option("--world", default=1, show_default=True, help="Tensor-parallel size: for the parts of every rank.")
@rule_option
@click.option("--again", is_flag=True, help="Read everything anew, whatever is known.")
@digests_option
@json_option
def digest(model: str, world: int, rules: tuple[str, ...], again: bool, digests: str | None, as_json: bool) -> None:
    """Compute the digests of MODEL ahead of need, so that the first swap to it already moves only what differs.

    Reads every byte once and keeps 64 bytes for each 4 MiB: they outlive servers, mounts and reboots. A server of the
    same user finds them. Files of which nothing can be remembered safely are named; status 1 if that is all of them.
    """
    from gpuload.cli.digesting import digest_model

    with printing.progress("digest") as tell:
        found = digest_model(
            model, world, parse_rules(rules), folder=digests or default_digests(), again=again, tell=tell
        )
    printing.show_digests(found, as_json)
    if all(file["reason"] for file in found["files"]):
        raise Failed


@cli.command(
    short_help="Say what this machine lacks, and what to do.", cls=Page, sections={"Examples": EXAMPLES["doctor"]}
)
@click.option(
    "--device", "devices", multiple=True, metavar="NAME", help="That is to be used; what it lacks is a fault."
)
@json_option
@socket_option
def doctor(devices: tuple[str, ...], as_json: bool, socket_path: str | None) -> None:
    """Say what this machine lacks, and what to do about it. Status 1 if something that was asked for cannot work.

    Whether driver, torch and cards fit each other, as a table; how a card stands, how fast it is copied to, and whether
    its memory can be shared; limits, digests and the server. Moves 256 MiB to each device, and keeps nothing.
    """
    from gpuload.cli.doctor import examine
    from gpuload.cli.doctor_cuda import Compatibility
    from gpuload.device import canonical_name
    from mfs.findings import has_fault

    table = Compatibility()
    findings = list(examine(socket_path, [canonical_name(name) for name in devices], table))
    printing.show_findings(findings, table, as_json)
    if has_fault(findings):
        raise Failed


@cli.command(short_help="Measure this machine, beside safetensors.", cls=Page, sections={"Examples": EXAMPLES["bench"]})
@click.option("--device", default="cpu", show_default=True, metavar="NAME")
@click.option("--size", type=Size(), default="1G", show_default=True, help="Of the model that is made up for it.")
@click.option("--dir", "folder", default="/tmp", show_default=True, type=click.Path(file_okay=False))
@click.option("--modelled", is_flag=True, help="The share of a link that loads reach on a model of a GPU; needs none.")
@json_option
def bench(device: str, size: int, folder: str, modelled: bool, as_json: bool) -> None:
    """Measure loading, attaching and swapping on this machine, beside safetensors and the bare copy. A row that fails
    says why and costs no other; the exit status is 1 then.

    --modelled, from a checkout and with a C compiler: loads on a driver that is a model (tools/gpu/simulate has its
    prices). It shows what gpuload's own code leaves of a link, and says what it cannot tell.
    """
    if modelled:
        from gpuload.cli.bench_modelled import run_modelled

        printing.show_modelled(run_modelled(size, folder), as_json)
        return
    from gpuload.cli.bench import run_bench

    found = run_bench(device, size, folder)
    printing.show_bench(found, as_json)
    if any("failed" in row for row in found["rows"]):
        raise Failed


@cli.command(
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


@cli.command(
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


@cli.command(short_help="Print where gpuload.h is.", cls=Page, sections={"Examples": EXAMPLES["include"]})
def include() -> None:
    """Print the folder of gpuload.h, the client for C and C++, and of an example that uses it."""
    from gpuload import include_dir

    click.echo(include_dir())

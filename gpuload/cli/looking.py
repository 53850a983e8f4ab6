"""The commands that change nothing: they look at servers, models and this machine."""

from __future__ import annotations

import click

from gpuload.cli import printing
from gpuload.cli.examples import EXAMPLES
from gpuload.cli.options import (
    device_map_option,
    device_option,
    digests_option,
    parse_device_map,
    parse_rules,
    rule_option,
    socket_option,
)
from gpuload.kv_cache import ITEM_BYTES
from gpuload.paths import default_digests
from mfs.cli.page import Page, json_option
from mfs.cli.run import Failed
from mfs.cli.text import print_json
from mfs.cli.values import SIZE
from mfs.errors import UsageError


@click.command(
    short_help="Show what is resident, and what is free.", cls=Page, sections={"Examples": EXAMPLES["status"]}
)
@json_option
@socket_option
def status(as_json: bool, socket_path: str | None) -> None:
    """Show what is resident, who holds it, and what is free."""
    from gpuload.client.asking import ask

    printing.show_status(ask({"op": "status"}, socket_path=socket_path), as_json)


@click.command(
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


@click.command(short_help="Print metrics for Prometheus.", cls=Page, sections={"Examples": EXAMPLES["metrics"]})
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


@click.command(short_help="Say whether models fit; loads nothing.", cls=Page, sections={"Examples": EXAMPLES["plan"]})
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@click.option("--kv-cache", "tokens", default=0, metavar="TOKENS", help="Room for so many tokens of key-value cache.")
@click.option(
    "--kv-dtype",
    type=click.Choice(["auto", *ITEM_BYTES]),
    default="auto",
    show_default=True,
    help="Of the cache; auto: as config.json says.",
)
@click.option("--device-memory", "memory_bytes", type=SIZE, help="Of the card to plan for.  [80 and 141 GB]")
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


@click.command(
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


@click.command(
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


@click.command(
    short_help="Measure this machine, beside safetensors.", cls=Page, sections={"Examples": EXAMPLES["bench"]}
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME")
@click.option("--size", type=SIZE, default="1G", show_default=True, help="Of the model that is made up for it.")
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

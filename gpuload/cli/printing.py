"""What the commands print: one JSON object with --json, else a few lines or a table, as `mfs` prints them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gpuload.cli.doctor_cuda import Compatibility
from mfs.cli.findings import show_findings as show_all
from mfs.cli.run import say
from mfs.cli.text import clean, count, print_json, size
from mfs.findings import Finding
from mfs.units import format_duration

HOLDERS_MAX = 10
"""Programs that are named of one old generation; --json has all."""


def show(reply: dict[str, Any], as_json: bool, *lines: str) -> None:
    """The reply itself, or lines about it."""
    if as_json:
        print_json(reply)
    else:
        for line in lines:
            print(clean(line))


def _show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from mfs.cli.output import print_table

    print_table(columns, rows)


def show_report(reply: dict[str, Any], as_json: bool) -> None:
    report = reply["report"]
    lines = [
        f"{reply['model']} on {reply['device']}: {size(report['bytes_total'])} in {report['seconds']:.3f} s,"
        f" generation {reply['generation']}",
        f"  kept in place {size(report['bytes_kept'])}, moved inside the device {size(report['bytes_moved_inside'])},"
        f" copied {size(report['bytes_copied'])}",
    ]
    if report["bytes_from_ram"]:
        lines.append(f"  back from the RAM tier {size(report['bytes_from_ram'])}")
    if report["bytes_hashed"]:
        lines.append(f"  read and hashed, since nothing was known of them: {size(report['bytes_hashed'])}")
    if report["evicted"]:
        lines.append(f"  evicted: {', '.join(report['evicted'])}")
    show(reply, as_json, *lines)
    if "explained" in reply and not as_json:
        _show_explained(reply["explained"])


def _show_explained(found: dict[str, Any]) -> None:
    from mfs.cli.explained import phases_table, strip
    from mfs.cli.output import console, print_plain

    out, seconds = console(), found["seconds"]
    for part in (phases_table(found["phases"], seconds), *strip(found["strip"]["phases"], 72, seconds)):
        if sys.stdout.isatty():
            out.print(part)
        else:
            print_plain(out, part)


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal: call it with (bytes done, bytes in all), from any thread."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from mfs.cli.progress import make_bar

    with make_bar() as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_digests(found: dict[str, Any], as_json: bool) -> None:
    lines = [
        f"{found['model']}: {size(found['bytes_known'])} known, {size(found['bytes_hashed'])} hashed in"
        f" {found['seconds']:.2f} s"
    ]
    lines += [f"  not kept: {f['path']}: {f['reason']}" for f in found["files"] if f["reason"]]
    show(found, as_json, *lines)


def show_unloaded(reply: dict[str, Any], as_json: bool) -> None:
    after = "released" if reply["released"] else f"released when {reply['leases']} leases end"
    show(reply, as_json, f"{reply['model']} on {reply['device']}: {after}")


def show_waited(reply: dict[str, Any], as_json: bool, timeout_s: float) -> None:
    if as_json:
        print_json(reply)
    elif reply["changed"]:
        print(clean(f"{reply['model']}: generation {reply['generation']}, {reply['digest'][:16]}"))
    else:
        now = f"still generation {reply['generation']}" if reply["generation"] else "not resident"
        say(f"{reply['model']} is {now} after {timeout_s:g} s", "gpuload")


def show_resized(reply: dict[str, Any], as_json: bool) -> None:
    lines = [
        f"{reply['device']}: arena {size(reply['arena_bytes'])}, taken {size(reply['arena_committed_bytes'])}, used"
        f" {size(reply['arena_used_bytes'])}, kept {size(reply['arena_floor_bytes'])}"
    ]
    if reply["evicted"]:
        lines.append(f"  evicted: {', '.join(reply['evicted'])}")
    show(reply, as_json, *lines)


def show_status(reply: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(reply)
        return
    if "uptime_s" in reply:  # not of an older server
        print(
            f"pid {reply['pid']}, up {format_duration(reply['uptime_s'])}; servers of these weights before it:"
            f" {reply['servers_before']}; a crash loses them: {'no' if reply['outlives_a_crash'] else 'yes'}"
        )
    for device in reply["devices"]:
        print(
            f"{device['device']}: arena {size(device['arena_bytes'])}, taken {size(device['arena_committed_bytes'])},"
            f" used {size(device['arena_used_bytes'])}; loads {device['loads']};"
            f" device free {size(device['device_free_bytes'])} of {size(device['device_bytes'])}"
        )
        if not device["models"]:
            print("  nothing resident")
            continue
        columns = ("model", ">bytes", ">leases", "pinned", ">generation", "rest on", "from")
        _show_table(columns, (_model_row(m, device["device"]) for m in device["models"]))
        for model in (m for m in device["models"] if m["model"] is None):
            print(clean(_laggards(model)))
    for tier in reply.get("ram_tiers", ()):
        whom, node = ", ".join(tier["devices"]), tier["node"]
        where = whom if node is None else f"{whom} on node {node}"
        used, whole, locked = (size(tier[f"{what}bytes"]) for what in ("used_", "", "locked_"))
        moved = f"saved {size(tier['saved_bytes'])}, returned {size(tier['returned_bytes'])}"
        print(f"RAM tier behind {where}: {used} of {whole} used, {locked} page-locked; {moved}")
    for mount in reply.get("mounts", ()):
        locked, whole = size(mount["locked_bytes"]), size(mount["mapped_bytes"])
        print(clean(f"{mount['door']}: {locked} of {whole} page-locked, copied from in place"))


def _model_row(model: dict[str, Any], device: str) -> Sequence[str]:
    """bytes: on this device."""
    return (
        model["model"] or f"{model['was']} (old)",
        size(model["bytes_here"]),
        str(model["leases"]),
        "yes" if model["pinned"] else "",
        str(model["generation"]),
        ", ".join(name for name in model["devices"] if name != device),
        model["label"],
    )


def _laggards(model: dict[str, Any]) -> str:
    """Who keeps a model that is served no more, and what that costs."""
    programs = [f"pid {one['pid'] or '?'} (user {one['uid']})" for one in model["holders"]]
    more = f" and {len(programs) - HOLDERS_MAX} more" if len(programs) > HOLDERS_MAX else ""
    return (
        f"  generation {model['generation']} of {model['was']} is held by {', '.join(programs[:HOLDERS_MAX])}{more}:"
        f" {size(model['bytes_alone'])} will be free once they refresh or let go"
    )


def show_plan(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    tensors, files = count(found["tensors_count"], "tensor"), count(found["shards_count"], "file")
    print(clean(f"{found['model']}: {size(found['bytes_total'])} in {tensors}, {files}"))
    if found["kv_cache_tokens"]:
        print(f"key-value cache of {count(found['kv_cache_tokens'], 'token')}: {size(found['kv_cache_bytes'])}")
    print()
    _show_table(("dtype", ">bytes"), ((dtype, size(n)) for dtype, n in found["bytes_by_dtype"].items()))
    print()
    _show_table((">tensor parallel", ">bytes per rank"), ((str(n), size(b)) for n, b in found["rank_bytes"].items()))
    print()
    columns = ("target", ">needs", ">in use there", ">has", "verdict", ">room for KV cache")
    _show_table(columns, map(_target_row, found["targets"]))


def show_plan_of_several(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (one["model"], size(one["bytes_total"]), size(one["arena_bytes"]), size(one["kv_cache_bytes"]),
         size(one["unknown_bytes"]))
        for one in found["models"]
    ]  # fmt: skip
    _show_table(("model", ">bytes", ">in an arena", ">KV cache", ">not hashed"), rows)
    print(f"\ntogether {size(found['arena_bytes'])}; {size(found['shared_bytes'])} are shared")
    if any(one["unknown_bytes"] for one in found["models"]):
        print("what is not hashed is counted for each: run `gpuload digest MODEL` first")
    print()
    targets = (
        (t["target"], size(t["needed_bytes"]), size(t["device_bytes"]),
         "fits" if t["fits"] else f"short by {size(t['shortfall_bytes'])}", size(t["kv_room_bytes"]))
        for t in found["targets"]
    )  # fmt: skip
    _show_table(("target", ">needs", ">has", "verdict", ">room for KV caches"), targets)


def _target_row(target: dict[str, Any]) -> Sequence[str]:
    verdict, world = "fits", target["tensor_parallel"]
    if not target["fits"]:
        verdict = f"short by {size(target['shortfall_bytes'])}"
        if target["may_be_cut"]:
            verdict += f"; fits with tensor parallel {world}" if world else "; fits with none of 1 to 16"
    in_use = size(target["resident_bytes"] + target["others_bytes"])
    room, tokens = target["kv_room_bytes"], target["kv_room_tokens"]
    kept = "" if room is None else size(room) if tokens is None else f"{size(room)}, {tokens:,} tokens"
    return target["target"], size(target["needed_bytes"]), in_use, size(target["device_bytes"]), verdict, kept


def show_findings(findings: Sequence[Finding], table: Compatibility, as_json: bool) -> None:
    if as_json:
        print_json({"findings": [found.shown() for found in findings], "compatibility": table.as_json()})
        return
    show_all(findings, as_json=False)
    if table.toolkits:
        print()
        print(clean(f"What this driver (CUDA {table.driver_cuda}) can run; torch here was built with CUDA "
                    f"{table.wheel.cuda or 'none'}:"))  # fmt: skip
        rows = ((t["toolkit"], t["verdict"], t["needs"], "<- torch" if t["toolkit"] == table.wheel.cuda else "")
                for t in table.toolkits)  # fmt: skip
        _show_table(("toolkit", "verdict", "needs", ""), rows)
    if table.cards:
        print()
        cards = ((c["device"], c["name"], c["capability"], "yes" if c["runs"] else "no", c["by"] or c["reason"])
                 for c in table.cards)  # fmt: skip
        _show_table(("device", "card", "capability", "runs torch's kernels", "by"), cards)


def show_bench(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print(clean(f"{found['machine']}; {size(found['bytes'])} on {found['device']}"))
    _show_table(("what", ">seconds", ">GB/s", ">of the bare copy"), map(_bench_row, found["rows"]))


def show_modelled(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    scale = found["scale"]
    reads, hashes, both, link = (scale[name] for name in ("reads_gb_s", "hashes_gb_s", "both_gb_s", "link_gb_s"))
    print(f"A modelled device on {found['cores']} cores. 'Reads modelled': 16 GB over a link of 55 GB/s.")
    print(
        f"'Reads real': all cores read {reads:.1f} GB/s or hash {hashes:.1f}, both 1 / (1/{reads:.1f} + 1/{hashes:.1f})"
        f" = {both:.2f}; the link is half of that,"
        f"\n{link:.2f} GB/s. One of 55 wants {scale['times']:.0f} times these cores."
    )
    rows = [
        (row["what"], f"{row['seconds']:.3f}", f"{row['gb_s']:.2f}" if row["gb_s"] else "",
         ", ".join(f"{share:.2f}" for share in row.get("of_links", [row["of_link"]]) if share))
        for row in found["rows"]
    ]  # fmt: skip
    _show_table(("what", ">seconds", ">GB/s", ">of the link"), rows)
    print("The model cannot tell: " + "; ".join(found["cannot_tell"]) + ".")


def _bench_row(row: dict[str, Any]) -> Sequence[str]:
    if "failed" in row:
        return f"{row['what']}: failed: {row['failed'].splitlines()[0]}", "", "", ""
    rate = f"{row['gb_s']:.2f}" if row["gb_s"] else ""
    share = f"{row['of_ceiling']:.2f}" if row["of_ceiling"] else ""
    return row["what"], f"{row['seconds']:.4f}", rate, share

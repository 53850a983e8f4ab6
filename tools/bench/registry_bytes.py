"""What a family takes in our registry, beside what others make of it. Exact: the same on a busy machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.servers.process import ServerError
from tests.servers.radosgw import RadosGateway
from tests.servers.swift import SwiftServer
from tools.bench import registries, stored
from tools.bench.families import MEMBERS
from tools.bench.processes import BenchError
from tools.bench.results import Goal, Results, Row

EFFORTS = ("fast", "small")
SERVERS: dict[str, type[SwiftServer] | type[RadosGateway]] = {"radosgw": RadosGateway, "Swift": SwiftServer}
"""Swift knows no conditional writes, so that no differences are stored there."""
_BUCKET = "bench"
_DELTA_MAX = 0.55
_TOTAL = "all"
_FILES = "files"
Say = Callable[[str], None]


def measure(
    family: str, members: dict[str, Path], folder: Path, peers: tuple[str, ...], efforts: tuple[str, ...],
    results: Results, say: Say,
) -> None:  # fmt: skip
    """Store a family by everybody, member after member. family: what its figures are called by."""
    _note(results, family, _FILES, {name: stored.sum_of_files(path) for name, path in members.items()}, say)
    for effort in efforts:
        root = folder / f"registry-{effort}"
        added, before = {}, 0
        for name, path in members.items():
            registries.push(path, f"mfs+file://{root}", name, "--compress", effort)
            now = registries.stored_bytes(root)
            added[name], before = now - before, now
        _note(results, family, f"mfs {effort}", added, say)
        shutil.rmtree(root)
    for peer in peers:
        try:
            _note(results, family, peer, stored.added_bytes(peer, members, folder / "peer"), say)
        except BenchError as error:
            results.missing.append(f"{family}, {peer}: {error}")
            say(f"{peer} is left out: {error}")


def measure_s3(family: str, members: dict[str, Path], folder: Path, results: Results, say: Say) -> None:
    """The same on real S3 servers, whose objects are counted as they list them."""
    for name, server in SERVERS.items():
        try:
            with server(folder / name) as running:
                _note(results, family, f"mfs fast, {name}", _on_s3(running, members), say)
        except (BenchError, ServerError) as error:
            results.missing.append(f"{family}, {name}: {' '.join(str(error).split())[:300]}")
            say(f"{name} is left out: {error}")


def _on_s3(server: SwiftServer | RadosGateway, members: dict[str, Path]) -> dict[str, int]:
    client = server.client()
    client.create_bucket(Bucket=_BUCKET)
    added, before = {}, 0
    for name, path in members.items():
        registries.push(path, f"mfs+s3://{_BUCKET}/registry", name, env=server.environ())
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=_BUCKET, Prefix="registry/")
        objects = [found for page in pages for found in page.get("Contents", ())]
        now = sum(found["Size"] for found in objects if not found["Key"].startswith("registry/work/"))
        added[name], before = now - before, now
    return added


def _note(results: Results, family: str, system: str, added: dict[str, int], say: Say) -> None:
    for member, count in (*added.items(), (_TOTAL, sum(added.values()))):
        results.add(f"bytes/{family}/{member}/{system}", count)
    say(f"{family}, {system}: {', '.join(f'{name} {count / 1e6:.2f} MB' for name, count in added.items())}")


def rows(results: Results, family: str) -> list[Row]:
    """MB that each member adds, and all together, a column for each system."""
    found: list[Row] = []
    systems = (
        _FILES,
        *(f"mfs {effort}" for effort in EFFORTS),
        *(f"mfs fast, {name}" for name in SERVERS),
        *stored.PEERS,
    )
    for member in (*MEMBERS, _TOTAL):
        for system in systems:
            values = results.samples.get(f"bytes/{family}/{member}/{system}")
            if values:
                found.append(Row(f"{family}, {member}", tuple(v / 1e6 for v in values), "MB", column=system))
    return found


def goal_rows(results: Results, family: str) -> list[Row]:
    """Ours over the best of all others for every member, and how long a full fine-tune's difference is."""
    found: list[Row] = []
    for ours in (*EFFORTS, *(f"fast, {name}" for name in SERVERS)):
        for member in (*MEMBERS, _TOTAL):
            mine = results.samples.get(f"bytes/{family}/{member}/mfs {ours}")
            others = {
                peer: values[0] for peer in stored.PEERS
                if (values := results.samples.get(f"bytes/{family}/{member}/{peer}"))
            }  # fmt: skip
            if not mine or not others:
                continue
            best = min(others, key=lambda peer: others[peer])
            title = f"{family}, {member}: bytes, {ours} / best other"
            note = f"which is {best}: {(mine[0] - others[best]) / 1e3:+,.0f} KB"
            found.append(Row(title, (mine[0] / others[best],), "×", Goal(at_most=1), note))
    full = results.samples.get(f"bytes/{family}/full/mfs fast")
    if full:
        share = full[0] / results.samples[f"bytes/{family}/full/{_FILES}"][0]
        found.append(Row(f"{family}: full fine-tune / its files", (share,), "×", Goal(at_most=_DELTA_MAX)))
    return found

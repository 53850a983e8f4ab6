"""How a server goes on with what another left (`estate`): its descriptors, its arenas, its models and leases.

Left is a set of names and descriptors, by a server that died (a service manager kept them) or one that gives them
(`handover`). Whoever takes them checks that all of it agrees, and where the other did not stop in order, that every
byte is what its digest says: what is not, is given up.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import trio

from gpuload.device.base import Run
from gpuload.server.catalog import Block, Lease, Model
from gpuload.server.digests import digest_views
from gpuload.server.estate import FORMAT, Counters, Estate, Index, Store, piece_name
from gpuload.server.records import restored
from gpuload.server.site import Site
from gpuload.wire import close_all
from mfs.control.fdstore import VARIABLES, listened
from mfs.errors import IntegrityError, MfsError

log = logging.getLogger("gpuload.server")

RECORD_BYTES_MAX = 1 << 30


@dataclass
class Left:
    """What is taken over, by name; descriptors are this object's until they are taken out."""

    fds: dict[str, int]
    index: Mapping[str, Any] = field(default_factory=dict)
    """What `estate` says of it, once it was read."""

    def read_index(self) -> Index:
        """Raises: IntegrityError in one line, also for a format that is not ours."""
        if "index" not in self.fds:
            raise IntegrityError("of the server before no index was kept")
        index = Index(self.take("index"))
        try:
            self.index = parsed(index.content)
        except IntegrityError:
            index.close()
            raise
        return index

    def take(self, name: str) -> int:
        return self.fds.pop(name)

    def take_shared(self, at: int) -> int | None:
        """What all memory of an arena lives by, if it is one descriptor."""
        return self.fds.pop(f"shared.{at}", None)

    def take_pieces(self, at: int, runs: Sequence[Run]) -> list[int]:
        """Raises: IntegrityError if one is missing."""
        names = [piece_name(at, run) for run in runs]
        if any(name not in self.fds for name in names):
            raise IntegrityError(f"of the memory on {self.index['devices'][at][0]} not all was kept")
        return [self.take(name) for name in names]

    def close(self) -> list[str]:
        """What was not taken out: its names."""
        fds, self.fds = self.fds, {}
        close_all(list(fds.values()))
        return list(fds)


def from_manager() -> Left | None:
    """What the service manager that started us kept; None if that is nothing. Children of ours get none of it."""
    fds: dict[str, int] = {}
    for fd, name in listened():
        if name in fds:  # an old one's that was not removed in time
            os.close(fds[name])
        fds[name] = fd
    for variable in VARIABLES:
        os.environ.pop(variable, None)
    return Left(fds) if fds else None


def parsed(content: bytes) -> dict[str, Any]:
    """An index as a map. Raises: IntegrityError."""
    try:
        found = msgpack.unpackb(content)
        said = found["format"]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException):
        raise IntegrityError("the index of the server before cannot be read") from None
    if said != FORMAT:
        raise IntegrityError(
            f"what the server before left is in format {said!r} (gpuload {str(found.get('version'))[:40]}),"
            f" expected {FORMAT}"
        )
    return dict(found)


def check_devices(there: Sequence[Sequence[Any]], wanted: Sequence[tuple[str, str, int, int]]) -> None:
    """Whether the arenas that are there are those that are wanted: (name, identity, granule_bytes, granules_count).

    Raises: IntegrityError naming the first that is not.
    """
    for left, right in zip(there, wanted, strict=False):
        if tuple(left[:4]) != tuple(right):
            raise IntegrityError(
                f"the server before has an arena {_told(left)}, wanted is {_told(right)}: its weights stay only where"
                " every --arena is as it was"
            )
    if len(there) != len(wanted):
        raise IntegrityError(f"the server before has {len(there)} arenas, wanted are {len(wanted)}: give the same")


def _told(device: Sequence[Any]) -> str:
    name, identity, granule_bytes, count = device[:4]
    return f"{name} ({identity}) of {count} granules of {granule_bytes} bytes"


async def restore(
    left: Left, index: Index, sites: Mapping[str, Site], store: Store, version: str
) -> tuple[Estate, list[tuple[int, Lease, int]]]:
    """Fill the sites' empty catalogs, and have an estate that says so; with the leases of clients that live, as far as
    is known: (number, lease, connection).

    Raises: IntegrityError, after which the catalogs are of no use; `left` keeps what was not taken out.
    """
    said = left.index
    catalogs = {name: site.catalog for name, site in sites.items()}
    counters = Counters(**said["counters"])
    counters.servers_before += 1
    estate = Estate(store, version, index, counters, said["since"])
    models: dict[int, tuple[Model, str | None]] = {}
    for number, name, was, is_pinned, generation, _ in sorted(said["models"], key=lambda row: row[5]):
        fd = left.fds.get(f"model.{number}")
        if fd is None:
            raise IntegrityError(f"the record of the resident model {name!r} was not kept")
        content = os.pread(fd, RECORD_BYTES_MAX, 0)
        model = restored(content, catalogs)
        model.number, model.was, model.is_pinned, model.generation = number, was, is_pinned, generation
        models[number] = model, name
    for at, site in enumerate(sites.values()):
        site.catalog.budget_count = min(site.arena.granules_count, said["devices"][at][4])
        await trio.to_thread.run_sync(_adopt, left, at, site)
    bad = set() if said["is_clean"] else await _unlike_their_digests(models.values(), sites)
    leases = []
    for number, model_number, is_kept, pid, uid in said["leases"]:
        fd = left.fds.get(f"lease.{number}")
        model, _ = models[model_number]
        if fd is not None:
            leases.append((number, model.lease(pid, uid), left.take(f"lease.{number}")))
        elif not is_kept:
            # Its connection went with the server, perhaps not its client, whose memory must stay what it is.
            log.warning("a lease on %r cannot be followed any more; its memory is held until a restart", model.label)
            model.lease(pid, uid)
        # else its client hung up meanwhile: the store drops such connections
    for number, lease, fd in leases:
        estate.leases[number] = (lease, fd, True)
    for number, (model, name) in models.items():
        estate.records[number] = left.take(f"model.{number}")
        if model in bad and name is not None:
            model.was, name = name, None
        _serve(model, name)
    return estate, leases


def _adopt(left: Left, at: int, site: Site) -> None:
    """Have the memory of all pieces that models stand in. Raises: IntegrityError, DeviceError."""
    if not site.arena.has_pieces:
        return
    runs = sorted({run for block in site.catalog.blocks.values() for run in block.runs})
    site.arena.adopt(runs, left.take_pieces(at, runs))


def _serve(model: Model, name: str | None) -> None:
    """As it was, but for what nobody could want any more."""
    if name is not None and (model.leases_count or model.is_pinned or model.retain != "lease"):
        model.name = name
        for part in model.parts:
            part.catalog.models[name] = model
        model.touch()
        return
    for part in model.parts:
        part.catalog.retired.append(model)
    model.drop_if_unused()


async def _unlike_their_digests(models: Iterable[tuple[Model, str | None]], sites: Mapping[str, Site]) -> set[Model]:
    """Those with bytes that are not what they were. Every block is read once."""
    by_block: dict[Block, tuple[Site, list[Model]]] = {}
    for model, _ in models:
        for part in model.parts:
            for block in part.blocks:
                by_block.setdefault(block, (sites[part.catalog.device], []))[1].append(model)
    bad: set[Model] = set()
    limiter = trio.CapacityLimiter(max(2, os.cpu_count() or 2))

    async def check(block: Block, site: Site, owners: list[Model]) -> None:
        if not await trio.to_thread.run_sync(_is_itself, block, site, limiter=limiter):
            log.warning(
                "the weights of %s on %s are not what they were: given up",
                ", ".join(sorted({repr(m.label) for m in owners})), site.name,
            )  # fmt: skip
            bad.update(owners)

    async with trio.open_nursery() as nursery:
        for block, (site, owners) in by_block.items():
            nursery.start_soon(check, block, site, owners)
    return bad


def _is_itself(block: Block, site: Site) -> bool:
    """Blocks for as long as its bytes take to come back from the device."""
    try:
        for offset, nbytes, digest in block.pieces:
            runs = site.runs(block, offset, nbytes)
            if digest_views(memoryview(site.device.read_back(at, n)) for at, n in runs) != digest:
                return False
    except MfsError as error:
        log.warning("%s", error)
        return False
    return True

"""What a client may ask: one function per operation, between the wire and the loader. Validates, decides who may.

Whoever may connect (the socket's mode) may look and attach; changing what is resident is for the server's own user and
root, by SO_PEERCRED. Files come as descriptors that the client opened, so nobody loads what they could not read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import trio

from gpuload.device import canonical_name, card_of
from gpuload.device.base import Arena, Run
from gpuload.errors import DeviceLostError, FitError
from gpuload.moving.kept import KeptFiles
from gpuload.moving.plan import Placement
from gpuload.moving.timing import Timing
from gpuload.server import asked
from gpuload.server.catalog import NAMES_MAX, Block, Catalog, Lease, Model, ResidentTensor, listed, namesakes
from gpuload.server.client_files import ClientFiles
from gpuload.server.estate import Estate
from gpuload.server.generations import Wanted
from gpuload.server.loader import CONTENT_PREFIX, Loader
from gpuload.server.ram_tier import RamTier
from gpuload.server.site import Site
from gpuload.server.tally import LoadTally, gathered, processes
from gpuload.server.work import Report
from gpuload.wire import close_all
from mfs.errors import AccessError, ChangedError, NotFoundError, UsageError
from mfs.metrics.families import Families, Text
from mfs.metrics.processes import add_processes
from mfs.tracing.spans import parse_traceparent
from mfs.tracing.tracer import Tracer
from mfs.units import format_size

PROTOCOL = 4
"""Raised whenever an old client could misread a new server."""

CHANGES = frozenset({"load", "swap", "open", "commit", "unload", "pin", "resize"})
"""Operations that take or give up room, which only the server's own user and root may."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int

    @property
    def may_change(self) -> bool:
        """Whether this is the server's own user, or root."""
        return self.uid in (0, os.geteuid())


@dataclass
class Answer:
    """What goes back; `lease`: what this connection holds from now on; `lost`: the server ends once that is said."""

    message: dict[str, Any]
    fds: Sequence[int] = ()
    lease: Lease | None = None
    lost: DeviceLostError | None = None


class Operations:
    """The server's devices, behind the verbs of the protocol."""

    def __init__(self, loader: Loader, kept: KeptFiles, tracer: Tracer, estate: Estate, *, version: str) -> None:
        self._kept, self._tracer, self._estate = kept, tracer, estate
        self._loader, self._sites = loader, loader.sites
        self._catalogs = [site.catalog for site in loader.sites.values()]
        self._version = version
        self._tally = LoadTally()

    def hush(self, is_hushed: bool) -> None:
        """Whether requests that only wait end at once."""
        self._loader.generations.hush(is_hushed)

    async def metrics(self, accept: str) -> Text:
        """What Prometheus is told; see `mfs.metrics`."""
        before = self._estate.counters.servers_before
        families = gathered(self._sites, self._tally, self._version, self._loader.generations, servers_before=before)
        return await trio.to_thread.run_sync(_exposed, families, accept)

    async def answer(self, request: dict[str, Any], files: ClientFiles | None, peer: Peer) -> Answer:
        """Raises: MfsError with the reason of a refusal. `files`, if some came, stay the caller's."""
        verb = str(request.get("op"))
        if verb in CHANGES and not peer.may_change:
            raise AccessError(f"user {peer.uid} may not {verb} on a server of user {os.geteuid()}, only attach")
        match verb:
            case "ping":
                return Answer({"protocol": PROTOCOL, "version": self._version, "pid": os.getpid()})
            case "status":
                return Answer(self._status())
            case "metrics":
                text = await self.metrics(str(request.get("accept", ""))[:1000])
                return Answer({"content_type": text.content_type, "text": text.body.decode()})
            case "load" | "swap":
                return await self._load(request, files)
            case "open":
                return await self._open(request, files, peer)
            case "commit":
                return await self._commit(request, files, peer)
            case "attach":
                told = await self._brought_back(request) if peer.may_change else {}
                model = self._find_content(request, asked.text(request, "digest"))
                return await self._attach(model, self._only(request), told, peer)  # no checkpoint since it was found
            case "wait":
                return Answer(await self._wait(request, peer))
            case "unload":
                return await self._unload(request)
            case "resize":
                return await self._resize(request)
            case "pin":
                model = self._find_one(request)
                model.is_pinned = asked.flag(request, "pinned", True)
                return Answer({"model": model.name, "pinned": model.is_pinned})
        raise UsageError(f"no such operation: {verb[:50]!r}")

    async def _load(self, request: dict[str, Any], files: ClientFiles | None) -> Answer:
        name = asked.name(request.get("model"))
        if name.startswith(CONTENT_PREFIX):
            raise UsageError(f"names that begin with {CONTENT_PREFIX!r} are the server's own")
        model, report, explained = await self._loaded(name, request, files)
        return Answer({**_summary(model), "report": report.as_dict(), **explained})

    async def _open(self, request: dict[str, Any], files: ClientFiles | None, peer: Peer) -> Answer:
        model, report, _ = await self._loaded(None, {**request, "pinned": False, "retain": "lru"}, files)
        told = {"report": report.as_dict()}
        return await self._attach(model, None, told, peer)  # no checkpoint since `load` returned

    async def _commit(self, request: dict[str, Any], files: ClientFiles | None, peer: Peer) -> Answer:
        """As `open`, of bytes that the client has in memory, under a name; see `pulled`."""
        if files is None:
            raise UsageError("a commit brings two descriptors: a file in memory that holds the table, and a socket")
        name = asked.name(request.get("model"))
        if name.startswith(CONTENT_PREFIX):
            raise UsageError(f"names that begin with {CONTENT_PREFIX!r} are the server's own")
        model, report, _ = await self._loaded(name, request, files)
        return await self._attach(model, None, {"report": report.as_dict()}, peer)  # no checkpoint since it was loaded

    async def _loaded(
        self, name: str | None, request: dict[str, Any], files: ClientFiles | None
    ) -> tuple[Model, Report, dict[str, Any]]:
        """The model, resident; and where the time went, where that was asked."""
        timing = Timing() if asked.flag(request, "explain", False) else None
        verb = "swap" if request.get("op") == "swap" else "load"
        span = self._tracer.begin(
            verb, {"gpuload.model": name or ""}, parse_traceparent(asked.text(request, "traceparent"))
        )
        error, seen = "", dict[str, Any]()
        try:
            with timing.within("open") if timing is not None else nullcontext():
                placements = self._placements(name if request.get("op") == "swap" else None, request)
                job = await asked.job(name, request, files, placements)
            with self._tally.timed(str(request["op"])):
                model, report = await self._loader.load(replace(job, timing=timing, span=span))
            self._tally.note(report)
            seen = {f"gpuload.{key}": value for key, value in report.as_dict().items() if key.startswith("bytes_")}
        except BaseException as failure:
            error = type(failure).__name__
            raise
        finally:
            if span is not None:
                span.end(error=error, attributes=seen)
        return model, report, {"explained": timing.describe()} if timing is not None else {}

    def _placements(self, swapped: str | None, request: dict[str, Any]) -> list[Placement]:
        """Where it is to go. A swap that names no device goes where the model stands that it replaces."""
        rank, world, rules = request.get("rank", 0), request.get("world", 1), request.get("rules", {})
        if type(rank) is not int or type(world) is not int:
            raise UsageError("rank and world must be whole numbers")
        asked.check_object(rules, "rules")
        if not all(axis is None or type(axis) is int for axis in rules.values()):
            raise UsageError("rules must give an axis, or null, for every pattern")
        given = request.get("device_map") or {}
        asked.check_object(given, "device_map")
        device_map = {prefix: self._site(name).name for prefix, name in given.items()}
        device, ranks = request.get("device"), request.get("ranks") or []
        if ranks:
            return self._ranks(ranks, rules, is_alone=device is None and not device_map and world == 1)
        if device is None and not device_map:
            olds = namesakes(swapped, self._catalogs)
            if len(olds) == 1:
                old = olds[0].placements
                return list(old) if len(old) > 1 else [Placement(old[0].device, old[0].device_map, rank, world, rules)]
        if device is None and device_map and len(self._sites) > 1:
            return [Placement(device_map.get("", ""), device_map, rank, world, rules)]
        return [Placement(self._site(device).name, device_map, rank, world, rules)]

    def _ranks(self, given: object, rules: dict[str, int | None], *, is_alone: bool) -> list[Placement]:
        """One rank on each of these devices, in their order."""
        if not isinstance(given, list) or not is_alone:
            raise UsageError("ranks must be a list of devices, without device, device_map and world")
        names = [self._site(name).name for name in given]
        if len(set(names)) < len(names):
            raise UsageError(f"ranks on {', '.join(names)}: each needs a device of its own")
        return [Placement(name, {}, rank, len(names), rules) for rank, name in enumerate(names)]

    async def _attach(self, model: Model, only: Site | None, extra: dict[str, Any], peer: Peer) -> Answer:
        """only: the device whose part is wanted; None: all of it. The lease is on the whole model in any case, and from
        the first moment on.
        """
        for part in model.parts:
            site = self._sites[part.catalog.device]
            if only in (None, site) and not (site.device.exports_read_only or peer.may_change):
                raise AccessError(
                    f"user {peer.uid} may not attach to {site.name} of user {os.geteuid()}: CUDA leaves it to him who"
                    " attaches whether he can write to everybody's weights; run a server of your own"
                )
        lease = model.lease(peer.pid, peer.uid)
        try:
            return await self._handed_out(lease, only, extra)
        except BaseException:
            lease.end()
            raise

    async def _handed_out(self, lease: Lease, only: Site | None, extra: dict[str, Any]) -> Answer:
        model = lease.model
        parts: list[dict[str, Any]] = []
        begins: list[list[int]] = []
        exports: list[tuple[Arena, list[Run]]] = []
        fds: list[int] = []
        wanted = [only is None or part.catalog is only.catalog for part in model.parts]
        if len(model.placements) > 1 and only is None:
            where = ", ".join(p.device for p in model.placements)
            raise UsageError(
                f"{model.name!r} stands as {len(model.placements)} ranks on {where}: say whose, by 'device'"
            )
        try:
            for part, is_wanted in zip(model.parts, wanted, strict=True):
                site = self._sites[part.catalog.device]
                runs, offsets = _runs(part.blocks, site.arena)
                begins.append(offsets)
                shown = runs if is_wanted else []
                unit = site.arena.granule_bytes
                parts.append(
                    {
                        "device": site.device.identity,
                        "arena": site.token,
                        "granule_bytes": unit,
                        "runs": shown,
                        "fds": 0,
                    }
                )
                exports.append((site.arena, shown))

            def export() -> None:
                """On CUDA a call for each granule, thousands of them: not on the loop, where all others wait."""
                for part, (arena, runs) in zip(parts, exports, strict=True):
                    own = arena.export(runs) if runs else []
                    part["fds"] = len(own)
                    fds.extend(own)

            def rows() -> list[list[Any]]:
                def at(t: ResidentTensor) -> int:
                    return begins[t.part][t.block] + t.offset if t.block >= 0 else 0

                kept = (t for t in model.tensors if wanted[t.part])
                return [[t.name, t.dtype, t.shape, t.part, at(t), t.nbytes] for t in kept]

            await trio.to_thread.run_sync(export)
            table = await trio.to_thread.run_sync(rows)
        except BaseException:
            close_all(fds)
            raise
        told = {**_summary(model), "model": model.name or model.was, **extra}
        message = {**told, "parts": parts, "tensors": table, "metadata": model.metadata}
        return Answer(message, fds, lease)

    async def _brought_back(self, request: dict[str, Any]) -> dict[str, Any]:
        """See that a commit that is asked for, and was evicted, is there again, if that can be; with what it took."""
        name, only = asked.name(request.get("model")), self._only(request)
        job = self._loader.commits.find(name)
        if (
            job is None
            or namesakes(name, self._catalogs)
            or (only is not None and only.name != job.placements[0].device)
        ):
            return {}
        with self._tally.timed("attach"):
            _, report = await self._loader.load(job)
        self._tally.note(report)
        return {"report": report.as_dict()}

    async def _wait(self, request: dict[str, Any], peer: Peer) -> dict[str, Any]:
        """The model of that name once it is another than the client knows; what there is when the time is over."""
        name, only = asked.name(request.get("model")), self._only(request)
        after, timeout_s = request.get("after", 0), request.get("timeout_s", 0)
        if type(after) is not int or after < 0 or type(timeout_s) not in (int, float):
            raise UsageError("'after' must be a generation, from 0, and 'timeout_s' a number")

        def find() -> Model | None:
            catalogs = self._catalogs if only is None else [only.catalog]
            return next(iter(namesakes(name, catalogs)), None)

        wanted = Wanted(after, asked.text(request, "unlike"))
        changed = await self._loader.generations.wait(wanted, timeout_s, find, is_ours=peer.may_change)
        model = find()
        there = {"generation": 0, "digest": ""} if model is None else _summary(model)
        return {**there, "model": name, "changed": changed}

    async def _unload(self, request: dict[str, Any]) -> Answer:
        model = self._find_one(request)
        name, leases = model.name, model.leases_count
        model.is_unwanted = True
        self._loader.commits.forget(str(name))
        devices = model.devices
        model.retire()
        for device in devices:
            await self._sites[device].trim()  # whoever asks for this wants the memory
        return Answer({**_where(model), "model": name, "leases": leases, "released": not leases})

    async def _resize(self, request: dict[str, Any]) -> Answer:
        """Another budget, and perhaps floor, for an arena. What goes back has gone back, and what the floor keeps is
        there, when this is answered."""
        site = self._site(request.get("device"))
        unit, most = site.arena.granule_bytes, site.arena.granules_count
        budget, floor = asked.nbytes(request, "bytes"), asked.nbytes(request, "floor_bytes", site.floor_count * unit)
        if budget > most * unit:
            raise UsageError(
                f"{format_size(budget)}: the arena on {site.name} was started with {format_size(most * unit)}, which is"
                " the most it may have; serve with a larger --arena"
            )
        if "floor_bytes" in request and floor > budget:
            raise UsageError(f"a floor of {format_size(floor)} is more than the arena of {format_size(budget)}")
        evicts, wait_s = asked.flag(request, "evict", False), asked.seconds(request, "wait_s")
        victims = site.catalog.make_budget(budget // unit)
        if victims and not evicts:
            names = listed([str(v.name) for v in victims], NAMES_MAX)
            raise FitError(
                f"models hold {format_size(site.catalog.granules.taken_count * unit)} of the arena on {site.name};"
                f" {format_size(budget)} would do without {names}: say --evict, or unload them; nothing was changed"
            )
        evicted = [v.name for v in victims]
        for victim in victims:
            victim.retire()
        site.catalog.budget_count = budget // unit  # no checkpoint since the sum
        site.floor_count = floor // unit
        await site.trim(is_exact=True)
        await site.fill_floor(wait_s)
        return Answer({**_sizes(site), "evicted": evicted})

    def _status(self) -> dict[str, Any]:
        devices = []
        for site in self._sites.values():
            memory, catalog = site.device.memory(), site.catalog
            catalog.obtainable_count = memory.free_bytes // site.arena.granule_bytes
            models = [*catalog.models.values(), *catalog.retired]
            devices.append(
                {
                    "identity": site.device.identity,
                    "device_bytes": memory.total_bytes,
                    "device_free_bytes": memory.free_bytes,
                    **_sizes(site),
                    "loads": site.loads_count,
                    "gauges": catalog.gauges(),
                    "models": [{**_summary(m), **_held(m, catalog)} for m in models],
                }
            )
        head = {"protocol": PROTOCOL, "version": self._version, "pid": os.getpid(), **self._estate.life()}
        head |= {"generation": self._loader.generations.last, "waiting": self._loader.generations.waiting_count}
        behind: dict[RamTier, list[str]] = {}
        for name, site in self._sites.items():
            if site.tier is not None:
                behind.setdefault(site.tier, []).append(name)
        ram = [{"devices": names, **tier.described()} for tier, names in behind.items()]
        return {**head, "devices": devices, "mounts": self._kept.mounts(), "ram_tiers": ram}

    def _site(self, given: object) -> Site:
        if given is None and len(self._sites) == 1:
            return next(iter(self._sites.values()))
        if given is None:
            raise UsageError(f"this server has several devices: say which of {', '.join(self._sites)}")
        card = card_of(str(given)[:100])
        name = card or canonical_name(str(given)[:100])
        for site in self._sites.values():
            if name in (site.name, site.device.identity):
                return site
        raise NotFoundError(
            f"this server has no arena on {name}; it has: {', '.join(map(_named, self._sites.values()))}"
        )

    def _only(self, request: dict[str, Any]) -> Site | None:
        return None if request.get("device") is None else self._site(request["device"])

    def _find(self, request: dict[str, Any]) -> Model:
        """The model of that name: on the device that is named, else on the first that has one."""
        name = asked.name(request.get("model"))
        only = self._only(request)
        if only is not None:
            return only.catalog.find(name)
        found = namesakes(name, self._catalogs)
        return found[0] if found else _missing(name, self._catalogs)

    def _find_content(self, request: dict[str, Any], digest: str) -> Model:
        """As `_find`, but if certain content is wanted: that, served or only held by somebody still.

        Raises: ChangedError if it is neither.
        """
        name, only = asked.name(request.get("model")), self._only(request)
        catalogs = self._catalogs if only is None else [only.catalog]
        served = namesakes(name, catalogs)[:1]
        held = [old for c in catalogs for old in c.retired if (old.was, old.digest) == (name, digest)]
        if held and not any(model.digest == digest for model in served):
            return held[0]
        model = self._find(request)
        if digest in ("", model.digest):
            return model
        raise ChangedError(
            f"{model.name!r} is now {model.digest[:16]}…, asked for was {digest[:16]}…: it was swapped in between, and"
            " nobody holds the other any more; attach every rank again, so that all have the same weights"
        )

    def _find_one(self, request: dict[str, Any]) -> Model:
        """As `_find`, but where several have the name, it must be said which is meant."""
        found = namesakes(asked.name(request.get("model")), self._catalogs)
        if len(found) > 1 and request.get("device") is None:
            where = " and ".join("+".join(m.devices) for m in found)
            raise UsageError(f"{found[0].name!r} stands on {where}, each for itself: say which with 'device'")
        return self._find(request)


def _named(site: Site) -> str:
    identity = site.device.identity
    return site.name if identity == site.name else f"{site.name} ({identity})"


def _exposed(families: Families, accept: str) -> Text:
    from mfs.metrics.exposition import exposed  # only where somebody asks

    add_processes(families, "gpuload", processes())
    return exposed(families.found, accept)


def _missing(name: str, catalogs: Sequence[Catalog]) -> Model:
    """Raises: NotFoundError naming what there is."""
    there = listed(sorted({n for catalog in catalogs for n in catalog.models}), NAMES_MAX) or "none"
    raise NotFoundError(f"no model {name!r} is resident; there are: {there}")


def _runs(blocks: Sequence[Block], arena: Arena) -> tuple[list[Run], list[int]]:
    """The granules of all blocks as runs, and where in them, in bytes, each block begins."""
    runs: list[Run] = []
    begins: list[int] = []
    reached = 0
    for block in blocks:
        begins.append(reached)
        reached += block.granules_count * arena.granule_bytes
        for first, count in block.runs:
            if runs and sum(runs[-1]) == first and not arena.has_pieces:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((first, count))
    return runs, begins


def _sizes(site: Site) -> dict[str, Any]:
    """An arena's bytes. free: of the budget, what no model holds; evictable: what goes with models
    that may go; room: what can be had with that, of the budget and of the device."""
    unit, catalog = site.arena.granule_bytes, site.catalog
    counts = {
        "arena": catalog.budget_count,
        "arena_most": site.arena.granules_count,
        "arena_floor": min(site.floor_count, catalog.budget_count),
        "arena_committed": catalog.granules.present_count,
        "arena_used": catalog.granules.taken_count,
        "arena_free": catalog.budget_count - catalog.granules.taken_count,
        "arena_evictable": catalog.evictable_count,
        "arena_room": catalog.room_count,
    }
    return {"device": site.name, **{f"{name}_bytes": count * unit for name, count in counts.items()}}


def _where(model: Model) -> dict[str, Any]:
    """'device': for people, and as ever where there is one."""
    return {"device": ",".join(model.devices), "devices": model.devices}


def _summary(model: Model) -> dict[str, Any]:
    return {
        "model": model.name,
        **_where(model),
        "digest": model.digest,
        "label": model.label,
        "bytes": sum(t.nbytes for t in model.tensors),
        "tensors_count": len(model.tensors),
        "ranks": len(model.placements),
        "leases": model.leases_count,
        "pinned": model.is_pinned,
        "retain": model.retain,
        "generation": model.generation,
    }


def _held(model: Model, catalog: Catalog) -> dict[str, Any]:
    """What of it stands in that arena, and whose hands it is in."""
    return {
        "bytes_here": sum(t.nbytes for t in model.tensors if model.parts[t.part].catalog is catalog),
        "bytes_alone": catalog.bytes_alone(model),
        "holders": [{"pid": lease.pid, "uid": lease.uid} for lease in model.leases],
        **({} if model.name is not None else {"was": model.was}),
    }

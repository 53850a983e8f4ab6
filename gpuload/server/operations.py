"""What a client may ask: one function per operation, between the wire and the loader. Validates, decides who may.

Whoever may connect (the socket's mode) may look and attach; changing what is resident is for the server's own user and
root, by SO_PEERCRED. Files come as descriptors that the client opened, so nobody loads what they could not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from gpuload.device import canonical_name
from gpuload.device.base import Run
from gpuload.plan import Placement
from gpuload.server.catalog import Model
from gpuload.server.loader import Job, Loader
from gpuload.shards import Shard, read_header
from mfs.errors import AccessError, MfsError, NotFoundError, UsageError

NAME_LENGTH_MAX = 200
RULES_MAX = 10_000

PROTOCOL = 1
"""Raised whenever an old client could misread a new server."""

CHANGES = frozenset({"load", "swap", "open", "unload", "pin"})
"""Operations that take or give up room, which only the server's own user and root may."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int


@dataclass
class Answer:
    """What goes back; `lease` is what this connection holds from now on."""

    message: dict[str, Any]
    fds: Sequence[int] = ()
    lease: tuple[Loader, Model] | None = None


class Operations:
    """The server's devices, behind the verbs of the protocol."""

    def __init__(self, loaders: Mapping[str, Loader], *, version: str) -> None:
        self._loaders = loaders
        self._version = version

    async def answer(self, request: dict[str, Any], fds: Sequence[int], peer: Peer) -> Answer:
        """Raises: MfsError with the reason of a refusal. `fds` stay the caller's."""
        verb = request.get("op")
        if verb in CHANGES and peer.uid not in (0, os.geteuid()):
            raise AccessError(f"user {peer.uid} may not {verb} on a server of user {os.geteuid()}, only attach")
        match verb:
            case "ping":
                return Answer({"protocol": PROTOCOL, "version": self._version, "pid": os.getpid()})
            case "status":
                return Answer(self._status())
            case "load" | "swap":
                return await self._load(request, fds)
            case "open":
                return await self._open(request, fds)
            case "attach":
                loader, model = self._find(request)
                return self._attach(loader, model, {})
            case "unload":
                return self._unload(request)
            case "pin":
                _, model = self._find(request)
                model.is_pinned = _flag(request, "pinned", True)
                return Answer({"model": model.name, "pinned": model.is_pinned})
        raise UsageError(f"no such operation: {str(verb)[:50]!r}")

    async def _load(self, request: dict[str, Any], fds: Sequence[int]) -> Answer:
        loader = self._loader(request)
        name = _name(request.get("model"))
        job = await self._job(loader, name, request, fds)
        model, report = await loader.load(job)
        return Answer({**_summary(loader, model), "report": report.as_dict()})

    async def _open(self, request: dict[str, Any], fds: Sequence[int]) -> Answer:
        loader = self._loader(request)
        job = await self._job(loader, None, {**request, "pinned": False, "retain": "lru"}, fds)
        model, report = await loader.load(job)
        return self._attach(loader, model, {"report": report.as_dict()})  # no checkpoint since `load` returned

    async def _job(self, loader: Loader, name: str | None, request: dict[str, Any], fds: Sequence[int]) -> Job:
        labels = request.get("files")
        if not isinstance(labels, list) or not labels or len(labels) != len(fds):
            raise UsageError(f"{len(fds)} files came, expected as many names in 'files', and one at least")
        paths = [_printable(str(label))[:500] for label in labels]
        shards = await trio.to_thread.run_sync(_shards, paths, list(fds))
        retain = request.get("retain", "lru")
        if retain not in ("lru", "lease"):
            raise UsageError(f"retain {str(retain)[:50]!r}: expected 'lru' or 'lease'")
        return Job(
            name=name,
            label=_printable(str(request.get("label", paths[0])))[:500],
            shards=shards,
            placement=_placement(loader.device.name, request),
            is_swap=request.get("op") == "swap",
            allow_gap=_flag(request, "allow_gap", False),
            is_pinned=_flag(request, "pinned", False),
            retain=retain,
        )

    def _attach(self, loader: Loader, model: Model, extra: dict[str, Any]) -> Answer:
        unit = loader.arena.granule_bytes
        runs: list[Run] = []
        begins: list[int] = []
        reached = 0
        for block in model.blocks:
            begins.append(reached)
            reached += block.granules_count * unit
            for first, count in block.runs:
                if runs and sum(runs[-1]) == first:
                    runs[-1] = (runs[-1][0], runs[-1][1] + count)
                else:
                    runs.append((first, count))
        table = [
            [t.name, t.dtype, t.shape, begins[t.block] + t.offset if t.block >= 0 else 0, t.nbytes]
            for t in model.tensors
        ]
        message = {
            **_summary(loader, model),
            **extra,
            "granule_bytes": unit,
            "runs": runs,
            "tensors": table,
            "metadata": model.metadata,
        }
        fds = loader.arena.export(runs)
        loader.catalog.lease(model)
        return Answer(message, fds, (loader, model))

    def _unload(self, request: dict[str, Any]) -> Answer:
        loader, model = self._find(request)
        name, leases = model.name, model.leases_count
        loader.catalog.retire(model)
        return Answer({"model": name, "device": loader.device.name, "leases": leases, "released": not leases})

    def _status(self) -> dict[str, Any]:
        devices = []
        for name, loader in self._loaders.items():
            memory, catalog = loader.device.memory(), loader.catalog
            unit = loader.arena.granule_bytes
            devices.append(
                {
                    "device": name,
                    "device_bytes": memory.total_bytes,
                    "device_free_bytes": memory.free_bytes,
                    "arena_bytes": loader.arena.granules_count * unit,
                    "arena_free_bytes": catalog.granules.free_count * unit,
                    "loads": loader.waiting_count,
                    "gauges": catalog.gauges(),
                    "models": [_summary(loader, m) for m in [*catalog.models.values(), *catalog.retired]],
                }
            )
        return {"protocol": PROTOCOL, "version": self._version, "pid": os.getpid(), "devices": devices}

    def _loader(self, request: dict[str, Any]) -> Loader:
        given = request.get("device")
        if given is None and len(self._loaders) == 1:
            return next(iter(self._loaders.values()))
        name = canonical_name(str(given))
        if name not in self._loaders:
            raise NotFoundError(f"this server has no arena on {name}; it has: {', '.join(self._loaders)}")
        return self._loaders[name]

    def _find(self, request: dict[str, Any]) -> tuple[Loader, Model]:
        name = _name(request.get("model"))
        if request.get("device") is None:
            for loader in self._loaders.values():
                if name in loader.catalog.models:
                    return loader, loader.catalog.models[name]
            return next(iter(self._loaders.values())), next(iter(self._loaders.values())).catalog.find(name)
        loader = self._loader(request)
        return loader, loader.catalog.find(name)


def _summary(loader: Loader, model: Model) -> dict[str, Any]:
    return {
        "model": model.name,
        "device": loader.device.name,
        "digest": model.digest,
        "label": model.label,
        "bytes": sum(t.nbytes for t in model.tensors),
        "tensors_count": len(model.tensors),
        "leases": model.leases_count,
        "pinned": model.is_pinned,
        "retain": model.retain,
        "generation": model.generation,
    }


def _shards(paths: Sequence[str], fds: Sequence[int]) -> list[Shard]:
    """The descriptor is what is loaded. The name beside it may lead to a faster way to the same file (a mount's slots),
    and is only believed where it leads to that very file: else a client could name what it may not read.
    """
    shards = []
    for path, fd in zip(paths, fds, strict=True):
        name = path if _is_same_file(path, fd) else f"(descriptor) {path}"
        shards.append(Shard(name, fd, read_header(fd, name)))
    return shards


def _is_same_file(path: str, fd: int) -> bool:
    try:
        return os.path.isabs(path) and os.path.samestat(os.stat(path), os.fstat(fd))
    except (OSError, ValueError):
        return False


def _placement(device: str, request: dict[str, Any]) -> Placement:
    rank, world, rules = request.get("rank", 0), request.get("world", 1), request.get("rules", {})
    if type(rank) is not int or type(world) is not int:
        raise UsageError("rank and world must be whole numbers")
    if not isinstance(rules, dict) or len(rules) > RULES_MAX:
        raise UsageError(f"rules must be an object of at most {RULES_MAX} patterns")
    if not all(axis is None or type(axis) is int for axis in rules.values()):
        raise UsageError("rules must give an axis, or null, for every pattern")
    return Placement(device=device, rank=rank, world=world, rules=rules)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > NAME_LENGTH_MAX or _printable(value) != value:
        raise UsageError(f"a model's name is 1 to {NAME_LENGTH_MAX} printable characters")
    if value.startswith("content:"):
        raise UsageError("names that begin with 'content:' are the server's own")
    return value


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _flag(request: dict[str, Any], key: str, default: bool) -> bool:
    value = request.get(key, default)
    if not isinstance(value, bool):
        raise UsageError(f"{key!r} must be true or false")
    return value


def refusal(error: BaseException) -> BaseException:
    """What the client is told of an error: ours as it is, anything else by its class and text."""
    return error if isinstance(error, MfsError) else MfsError(f"{type(error).__name__}: {error}")

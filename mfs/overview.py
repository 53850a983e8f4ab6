"""The models of a mount at a glance, and what is being brought: for `mfs top` and the page, once a second.

Nothing here runs unless somebody looks, and readers' waits are counted only while somebody does. What the SSD tier has
of each model a worker adds up; with many models that is looked at again only when fifty times as long has passed as it
took, so that looking costs a fiftieth at most. As long stands the order of the models that nothing is going on
with: a look sorts only the others in. What grows with the number of models is done in a thread, or gives way to
readers.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from mfs.cache.heat import masks_of, strip
from mfs.control.api import Json
from mfs.control.rows import ORDERS, Row
from mfs.errors import MfsError
from mfs.mount import Mount
from mfs.tree.models import ModelSize, ModelSizes
from mfs.tree.nodes import Node
from mfs.types import BLOCK_BYTES, CHUNK_BYTES
from mfs.waits import Cause, Waited
from mfs.workers.frames import object_to_wire
from mfs.workers.job import Job, Priority
from mfs.workers.shares import Group, group_of_file

_AGAIN_FACTOR, _AGAIN_S = 50, 1.0
_WORKER_S = 10.0
_FETCHES_MAX = 200
_FILES_MAX = 500
"""Of one model, whose strips are shown: a hundred bytes each."""

_ORDERS_MAX = 8
"""Kept: one for each way in which somebody looks."""

_LOOKING_S = 30.0
"""Whoever has not asked again for so long does not look any more."""

_LIVE = ("ram_bytes", "open_count", "fetching_count", "origin_bytes", "waited_s")


class Overview:
    """What `DaemonApi.overview` and `heat` answer."""

    def __init__(self, mount: Mount, nursery: trio.Nursery) -> None:
        """nursery: for what goes on while somebody looks."""
        self._mount = mount
        self._nursery = nursery
        self._looked_at_s = -math.inf
        self._is_looked_at = False
        self._waits = dict[Cause, list[float]]()
        """By cause: how many, and how long."""
        self._waited = dict[Group, float]()
        self._names = [source.name for source in mount.config.sources]
        self._sizes = ModelSizes(mount.namespace)
        self._looking = trio.Lock()
        self._rows = dict[Group, Row]()
        self._orders = dict[tuple[str, str], list[Group]]()
        """By sort and match: the rows that match, in the order they have while nothing is going on."""
        self._lively = set[Group]()
        self._renew_after_s = -math.inf

    async def models(self, *, sort: str, match: str, count: int) -> Json:
        """The `models` of an overview."""
        self._begin_counting()
        wanted = match.casefold()
        async with self._looking:
            await self._renew()
            order = await self._order(sort, wanted)
            ram = await self._mount.cache.ram_bytes_by_group()
        # no checkpoint until the rows are copied: another one who looks writes into them
        self._note_what_is_going_on(ram)
        lively = [row for row in map(self._rows.__getitem__, self._lively) if wanted in row["path"].casefold()]
        others = (self._rows[group] for group in order if group not in self._lively)
        rows = heapq.merge(sorted(lively, key=ORDERS[sort]), others, key=ORDERS[sort])
        first = [dict(row) for row in itertools.islice(rows, count)]
        return {"count": len(self._rows), "matched_count": len(order), "rows": first}

    def fetches(self) -> Json:
        """The `fetches` of an overview."""
        jobs, pool = self._mount.pool.under_way(), self._mount.pool
        rows = [self._fetch(job) for job in jobs[:_FETCHES_MAX]]
        return {"count": len(jobs), "queued_count": pool.queued("origin") + pool.queued("ssd"), "rows": rows}

    def waits(self) -> Json:
        """The `waits` of an overview."""
        return {cause.value: {"count": int(count), "seconds": spent} for cause, (count, spent) in self._waits.items()}

    async def heat(self, path: str) -> Json:
        """See `DaemonApi.heat`."""
        mount = self._mount
        found, left_out = list[tuple[str, Node]](), 0
        async for below, node in mount.namespace.walk(await mount.namespace.resolve(path), path):
            if len(found) < _FILES_MAX:
                found.append((below, node))
            else:
                left_out += 1
        wire = [object_to_wire(node.object) for _, node in found if node.object is not None]
        on_ssd = iter((await mount.pool.call("heat", objects=wire))["rows"] if wire else ())
        files = []
        for below, node in found:
            if node.object is None:
                continue
            ssd, ssd_bytes, pinned = next(on_ssd)
            valid = mount.cache.valid_masks(node.object, node.source)
            files.append({
                "path": below, "size": node.size, "ssd_bytes": ssd_bytes, "pinned": pinned, "ssd": ssd,
                "ram_bytes": mount.cache.resident_bytes(node.object, node.source) if valid else 0,
                "ram": strip(masks_of(valid, node.object.chunks_count) if valid else b"", node.size),
                "open_handles": mount.prefetcher.handles_count(node.object),
            })  # fmt: skip
        return {"files": files, "left_out": left_out}

    # -- readers' waits

    def _begin_counting(self) -> None:
        self._looked_at_s = time.monotonic()
        if not self._is_looked_at:
            self._is_looked_at = True
            self._waits, self._waited = {cause: [0, 0.0] for cause in Cause}, {}
            self._mount.cache.waits.listeners.append(self._count)
            self._nursery.start_soon(self._end_counting)

    def _count(self, waited: Waited) -> None:
        of_cause, group = self._waits[waited.cause], group_of_file(waited.source, waited.path)
        of_cause[0] += 1
        of_cause[1] += waited.waited_s
        self._waited[group] = self._waited.get(group, 0.0) + waited.waited_s

    async def _end_counting(self) -> None:
        """Stop once nobody looks any more."""
        try:
            while (left_s := self._looked_at_s + _LOOKING_S - time.monotonic()) > 0:
                await trio.sleep(left_s)
        finally:
            self._is_looked_at = False
            self._mount.cache.waits.listeners.remove(self._count)

    # -- the table of models

    async def _renew(self) -> None:
        """Look again at what the tree and the SSD tier have, if that is due."""
        began = time.monotonic()
        if began < self._renew_after_s:
            return
        models, on_ssd = await self._sizes.look(), await self._on_ssd()
        self._rows = await trio.to_thread.run_sync(self._table, models, on_ssd)
        self._orders, self._lively = {}, set()
        now = time.monotonic()
        self._renew_after_s = now + max(_AGAIN_S / 2, _AGAIN_FACTOR * (now - began))

    async def _on_ssd(self) -> Sequence[Sequence[Any]]:
        """What the worker's `models` says of each."""
        if self._mount.config.cache_dir is None:
            return ()
        try:
            with trio.fail_after(_WORKER_S):  # no deadline of the worker's, which it would be killed for
                found: Sequence[Sequence[Any]] = (await self._mount.pool.call("models"))["rows"]
                return found
        except (MfsError, trio.TooSlowError):  # who looks may want to know why nothing works: the rest is shown
            return ()

    def _table(self, models: Sequence[ModelSize], on_ssd: Sequence[Sequence[Any]]) -> dict[Group, Row]:
        """The rows, without what is going on. Blocks, for a tenth of a second with a hundred thousand models."""
        rows = dict[Group, Row]()
        for model in models:
            group = model.source, model.name
            rows[group] = _row(self._path(group), bool(model.name), model.size, model.files_count)
        numbers = dict[str, list[int]]()
        for number, identity in enumerate(self._mount.pool.identities):
            numbers.setdefault(identity, []).append(number)
        for source, name, nbytes, _, pinned_count, last_used_at in on_ssd:
            for number in numbers.get(source, ()):
                row = rows.get((number, name))
                if row is not None:
                    row |= {"ssd_bytes": nbytes, "pinned_count": pinned_count, "last_used_at": last_used_at}
        return rows

    async def _order(self, sort: str, wanted: str) -> list[Group]:
        """See `_orders`. With `_looking`: nobody writes into the rows meanwhile."""
        order = self._orders.get((sort, wanted))
        if order is None:
            self._forget_what_is_going_on()
            if len(self._orders) >= _ORDERS_MAX:
                self._orders.clear()
            order = await trio.to_thread.run_sync(_ordered, self._rows, wanted, ORDERS[sort])
            self._orders[sort, wanted] = order
        return order

    def _forget_what_is_going_on(self) -> None:
        for group in self._lively:
            self._rows[group].update(dict.fromkeys(_LIVE, 0))
        self._lively = set()

    def _note_what_is_going_on(self, ram: Mapping[Group, int]) -> None:
        """Write into the rows what is known here, of the models that have any of it. No checkpoint."""
        mount = self._mount
        fetching = dict[Group, int]()
        for job in mount.pool.under_way():
            fetching[job.group] = fetching.get(job.group, 0) + 1
        columns: tuple[Mapping[Group, float], ...] = (
            ram, mount.prefetcher.handles_by_group(), fetching, mount.arrived, self._waited,
        )  # fmt: skip
        self._forget_what_is_going_on()
        self._lively = {group for column in columns for group in column if group in self._rows}
        for name, column in zip(_LIVE, columns, strict=True):
            for group in self._lively:
                self._rows[group][name] = column.get(group, 0)

    def _fetch(self, job: Job) -> Json:
        source, obj, index = job.arguments["source"], job.arguments["obj"], job.arguments["index"]
        mask = job.arguments["mask"]
        first, end = (mask & -mask).bit_length() - 1, mask.bit_length()
        start = index * CHUNK_BYTES
        return {
            "path": self._path((source, obj[1])),
            "start": start + first * BLOCK_BYTES, "stop": min(start + end * BLOCK_BYTES, obj[2]),
            "since_s": round(time.monotonic() - job.begun_s, 3),
            "ahead": job.priority is Priority.BACKGROUND, "from": "ssd" if job.lane == "ssd" else "origin",
        }  # fmt: skip

    def _path(self, group: Group) -> str:
        """A path inside a source as one of the mount."""
        return "/".join(filter(None, (self._names[group[0]], group[1])))


def _ordered(rows: Mapping[Group, Row], wanted: str, key: Callable[[Row], Any]) -> list[Group]:
    matching = [(key(row), group) for group, row in rows.items() if wanted in row["path"].casefold()]
    return [group for _, group in sorted(matching)]


def _row(path: str, is_model: bool, size: int | None, files_count: int) -> Row:
    return {
        "path": path, "is_model": is_model, "size": size, "files_count": files_count, "ssd_bytes": 0, "ram_bytes": 0,
        "origin_bytes": 0, "pinned_count": 0, "open_count": 0, "fetching_count": 0, "last_used_at": 0, "waited_s": 0,
    }  # fmt: skip

"""What differs between a file of `mfs apply` and the mounts and registries it names, and what settles that.

Nothing is remembered between two runs: what is found is what daemons, caches and registries say now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from mfs.cli.progress import follow
from mfs.cli.run import warn
from mfs.cli.targets import Target, targets
from mfs.cli.text import count, size
from mfs.control.api import Json, Tier
from mfs.errors import NotFoundError, StoreError, UsageError
from mfs.models_file import Wanted, WantedModel, WantedMount, digest_of
from mfs.shown import mask_url
from mfs.sources.options import SourceOptions
from mfs.types import ObjectId

IO_S = 120.0
"""Until a registry that does not answer is given up."""
FILES_MAX = 1_000_000
"""Of one model; more is a mistake."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the file says."""

    where: str
    """A path of the file system, or a registry's address with a tag."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    def as_json(self) -> Json:
        return asdict(self)


Step = tuple[Difference, Callable[[], object] | None]
"""What differs, and what mends it; None where nothing here can."""


def differences(wanted: Wanted) -> list[Difference]:
    """All that is not as the file says, as far as the mounts have looked at their sources; nothing is changed.

    Raises: MfsError where something cannot be asked.
    """
    return [difference for difference, _ in (*_tag_steps(wanted), *_mount_steps(wanted))]


def settle(wanted: Wanted) -> tuple[list[Difference], list[Difference]]:
    """Have the mounts look at their sources, and do what there is to do: (what was done, what still differs).

    Raises: MfsError where something cannot be asked or done.
    """
    done = _taken(_tag_steps(wanted))
    failed = [
        Difference(mount.mountpoint, str(error)) for mount in wanted.mounts
        for error in _target(mount).client.refresh()["errors"]
    ]  # fmt: skip
    done += _taken(_mount_steps(wanted))
    return done, failed + differences(wanted)


def _taken(steps: Iterable[Step]) -> list[Difference]:
    done = []
    for difference, step in steps:
        if step is not None:
            step()
            done.append(difference)
    return done


def _mount_steps(wanted: Wanted) -> Iterator[Step]:
    for mount in wanted.mounts:
        yield from _Mount(mount).steps()


def _tag_steps(wanted: Wanted) -> Iterator[Step]:
    from mfs.registry import opening, retag, tags

    for registry in wanted.registries:
        options = SourceOptions(**registry.reached)
        place = opening.open_url(registry.url, options, deadline_s=time.monotonic() + IO_S)
        try:
            if place.model is not None:
                raise UsageError(f"{mask_url(registry.url)}: expected the registry itself; models stand in its tags")
            for name, means in registry.tags.items():
                model, _, tag = name.partition(":")
                wanted_id = digest_of(means)
                deadline_s = time.monotonic() + IO_S
                if wanted_id is None:
                    target = tags.current(place.store, model, means, deadline_s=deadline_s)
                    wanted_id = target.manifest if target is not None else None
                where = f"{mask_url(registry.url)}/{name}"
                if wanted_id is None:
                    yield Difference(where, f"should mean what {model}:{means} does, and there is no such tag"), None
                    continue
                move = tags.current(place.store, model, tag, deadline_s=deadline_s)
                now = move.manifest if move is not None else None
                if now != wanted_id:
                    what = f"means {f'sha256:{now[:12]}' if now else 'nothing'}, not sha256:{wanted_id[:12]}"
                    note = f"apply: {means}"
                    yield (
                        Difference(where, what),
                        partial(retag.retag, place.store, model, tag, wanted_id, how="tag", note=note, tell=warn),
                    )
        finally:
            place.store.close()


def _target(wanted: WantedMount) -> Target:
    (target,) = targets([wanted.mountpoint])
    if target.paths != [""]:
        raise UsageError(f"{wanted.mountpoint} lies inside a mount: name its mount point, {target.served.mountpoint}")
    return target


class _Mount:
    """One mount and what is wanted of it."""

    def __init__(self, wanted: WantedMount) -> None:
        self._wanted = wanted
        self._target = _target(wanted)
        self._client = self._target.client

    def steps(self) -> Iterator[Step]:
        """What differs, each with what mends it; in the order in which that is to be done."""
        found: list[tuple[WantedModel, list[Json]]] = []
        for model in self._wanted.models:
            try:
                found.append((model, list(self._files(model.path))))
            except NotFoundError as error:
                yield self._difference(model, f"is not there: {error}"), None
        for model, files in found:
            yield from self._revision_steps(model, files)
        if self._wanted.unpin or any(model.pinned is False for model in self._wanted.models):
            yield from self._unpin_steps(found)
        for model, files in found:
            yield from self._pin_steps(model, files)
        for model, files in found:
            yield from self._tier_steps(model, files)

    def _revision_steps(self, model: WantedModel, files: list[Json]) -> Iterator[Step]:
        if model.revision is None or not files:
            return
        shown = {str(self._client.stat(file["path"])["model_revision"]).rpartition("@")[2] for file in files}
        if shown != {model.revision}:
            others = ", ".join(sorted(text[:19] for text in shown - {model.revision}))
            yield self._difference(model, f"shows revision {others}, not {model.revision[:19]}"), None

    def _pin_steps(self, model: WantedModel, files: list[Json]) -> Iterator[Step]:
        others = sum(not file["pinned"] for file in files) if model.pinned else 0
        if others:
            what = f"{others:,} of {count(len(files), 'file')} not pinned"
            yield self._difference(model, what), lambda: self._client.pin([model.path])

    def _tier_steps(self, model: WantedModel, files: list[Json]) -> Iterator[Step]:
        tier = model.tier
        if tier is None:
            return
        total = sum(file["size"] for file in files)
        missing = total - sum(file[f"{tier}_bytes"] for file in files)
        if missing > 0:
            what = f"{size(missing)} of {size(total)} not in the {tier.upper()} tier"
            yield self._difference(model, what), lambda: self._bring(model.path, tier)

    def _bring(self, path: str, tier: Tier) -> None:
        for fault in follow(self._client.prefetch([path], tier, wait=True), "fetching")["failed"]:
            warn(f"{self._target.full(fault['path'])}: {fault['error']}")

    def _unpin_steps(self, found: list[tuple[WantedModel, list[Json]]]) -> Iterator[Step]:
        """For what is pinned and is not to be. Equal files of two models are one object: who wants it pinned wins."""
        held = {self._object(file["path"]).cache_id for model, files in found if model.pinned for file in files}
        for model, files in found:
            if model.pinned is False:
                pinned = [file["path"] for file in files if file["pinned"]]
                others = [path for path in pinned if self._object(path).cache_id not in held]
                if others:
                    what = f"{len(others):,} of {count(len(files), 'file')} pinned"
                    yield self._difference(model, what), partial(self._client.unpin, others)
            elif model.pinned is None:
                held |= {self._object(file["path"]).cache_id for file in files}
        if self._wanted.unpin:
            yield from self._unlisted_steps(held)

    def _unlisted_steps(self, held: set[str]) -> Iterator[Step]:
        """For what is pinned of this mount's sources, in whichever version, and is not in `held`."""
        from mfs.cache.residency import ResidencyTables, scan  # numpy: only where it is needed

        status = self._client.status()
        if status["cache_dir"] is None:
            return
        cache_dir, sources = Path(status["cache_dir"]), {source["url"] for source in status["sources"]}
        for item in scan(cache_dir):
            if item.pinned and mask_url(item.source) in sources and item.cache_id not in held:
                obj = ObjectId(item.source, item.path, item.size, item.version, item.digest)

                def let_go(obj: ObjectId = obj) -> None:
                    ResidencyTables(cache_dir, writable=True).set_pinned(obj, False)

                where = f"{mask_url(item.source)}/{item.path}"
                yield Difference(where, f"pinned in {cache_dir}, and not asked for"), let_go

    def _object(self, path: str) -> ObjectId:
        stat = self._client.stat(path)
        return ObjectId(stat["source"], stat["source_path"], stat["size"], stat["revision"], stat["digest"])

    def _files(self, path: str) -> Iterable[Json]:
        """The rows of `ls` for all files at and below a path, with their 'path' from the mount's root."""
        folders, seen = [path], 0
        while folders:
            folder = folders.pop()
            rows = self._client.ls(folder)
            is_file = folder == path and self._client.stat(folder)["kind"] != "directory"
            for row in rows:
                below = folder if is_file else f"{folder}/{row['name']}".lstrip("/")
                if row["kind"] == "directory":
                    folders.append(below)
                elif row["kind"] == "file":
                    seen += 1
                    if seen > FILES_MAX:
                        raise StoreError(f"{self._target.full(path)}: more than {FILES_MAX:,} files; name a part of it")
                    yield row | {"path": below}

    def _difference(self, model: WantedModel, what: str) -> Difference:
        return Difference(self._target.full(model.path), what)

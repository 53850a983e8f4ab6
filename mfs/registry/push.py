"""A directory becomes a revision of a model.

    scan, validate   what is there, and whether it may be published
    hash             every file once: whole digests, tensors' digests, chunk ids
    lease            said to `gc`: these chunks are about to be needed (`work`, P1 and P2)
    ask              which of them the registry has, whoever pushed them
    base             for those it has not: which revision has something like them
    send             each as what is smallest (`encode`)
    settle           no collection took any of it meanwhile (P4, P5)
    manifest         one object; from here on the revision exists
    tag              moved to it; from here on it is what the tag means

A push that dies leaves chunks and nothing else; run again, it finds them. Two at once may store the same chunk, which
is called by what it holds, so both are right. Two that push to one tag both make their revision and both move the tag:
its history has both, the later one holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from mfs.errors import ChangedError, UsageError
from mfs.registry import card, layout, tags, work
from mfs.registry.bases import Revision, chunk_keys, named_base, revisions_of
from mfs.registry.chunk_io import IO_S
from mfs.registry.encode import Effort
from mfs.registry.hashing import Hashed, hash_file, read_span
from mfs.registry.manifest import Manifest, manifest_id, parse_manifest
from mfs.registry.opening import Place
from mfs.registry.parallel import for_each
from mfs.registry.scan import Scan, scan
from mfs.registry.sending import Sending, says_the_same
from mfs.registry.store import Store
from mfs.registry.tags import Tags
from mfs.registry.upload import Missing, Sent
from mfs.registry.validate import Checked, validate
from mfs.types import ObjectId

TAG = "latest"
"""Where the address names none."""
SETTLE_S = 3600.0
"""How long a push waits for a collection to end."""


class Step(NamedTuple):
    """What a push has just done, for whoever shows it. Comes from several threads."""

    phase: str
    """'hashing', 'asking', 'sending'; 'waiting' for somebody, whom `path` names."""
    path: str
    """The file it was done for; '' where a phase begins."""
    done: int
    """Bytes; chunks where `phase` is 'asking'."""
    total: int
    """Of the whole phase."""
    of_file: int = 0
    """Bytes of `path` in this phase."""


Told = Callable[[Step], object]
Sign = Callable[[Store, str, bytes], object]
"""(store, model, manifest): stores a signature beside it."""


@dataclass(frozen=True)
class Options:
    """What the author says of a push."""

    effort: Effort = Effort.FAST
    base: str | None = None
    """'model:tag' of the same registry; None: one that is found; '': none."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    sign: Sign | None = None


@dataclass(frozen=True)
class Prepared:
    """A directory that was looked at, checked and hashed."""

    scan: Scan
    files: tuple[Hashed, ...]
    checked: Checked
    annotations: Mapping[str, str] = field(default_factory=dict)
    """What the model's card says."""

    def chunks(self) -> dict[str, Missing]:
        """Every chunk once, in the order of files and bytes."""
        found: dict[str, Missing] = {}
        for file in self.files:
            keys = chunk_keys(file.obj.path, file.tensors, (span[:2] for span in file.spans))
            for chunk_id, span, key in zip(file.chunk_ids, file.spans, keys, strict=True):
                found.setdefault(chunk_id, Missing(chunk_id, file.obj, span, key))
        return found


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    model: str
    tag: str
    revision: Revision
    is_new: bool
    """False where the registry had this revision already."""
    is_moved: bool
    """False where the tag meant it already."""
    base: Revision | None
    """What differences were taken to."""
    sent: Sent
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]
    """Paths that were not pushed."""

    def as_json(self) -> dict[str, object]:
        """Exact numbers, for programs."""
        manifest, sent = self.revision.manifest, self.sent
        return {
            "model": self.model,
            "tag": self.tag,
            "manifest": f"sha256:{self.revision.manifest_id}",
            "new_revision": self.is_new,
            "tag_moved": self.is_moved,
            "base": None if self.base is None else f"{self.base.model}@sha256:{self.base.manifest_id}",
            "files_count": len(manifest.files),
            "total_bytes": manifest.nbytes,
            "chunks_count": len(manifest.chunks),
            "new_chunks_count": sent.chunks_count,
            "differences_count": sent.differences_count,
            "reused_bytes": manifest.nbytes - sent.plain_bytes,
            "new_bytes": sent.plain_bytes,
            "saved_by_compression_bytes": sent.plain_bytes - sent.alone_bytes,
            "saved_by_differences_bytes": sent.alone_bytes - sent.stored_bytes,
            "stored_bytes": sent.stored_bytes,
            "warnings": list(self.warnings),
            "left_out": list(self.left_out),
        }


def examine(directory: str, options: Options) -> tuple[Scan, Checked]:
    """Look at a directory and check it. Raises: UsageError for what may not be published; AccessError, StoreError."""
    found = scan(directory)
    return found, validate(found, allow_pickle=options.allow_pickle)


def prepare(found: Scan, checked: Checked, told: Told = lambda step: None) -> Prepared:
    """Hash what was examined. Raises: ChangedError, AccessError, StoreError."""
    source, total = found.source(), found.nbytes
    hashed: dict[str, Hashed] = {}
    told(Step("hashing", "", 0, total))
    threads_count = os.cpu_count() or 2
    with ThreadPoolExecutor(threads_count) as beside:

        def one(obj: ObjectId) -> None:
            hashed[obj.path] = hash_file(
                source, obj, checked.headers.get(obj.path), beside,
                lambda count: told(Step("hashing", obj.path, count, total, obj.size)),
            )  # fmt: skip

        for_each(sorted(found.files, key=lambda obj: -obj.size), one, at_once=threads_count)
    return Prepared(found, tuple(hashed[obj.path] for obj in found.files), checked, _card(found))


def _card(found: Scan) -> dict[str, str]:
    obj = next((obj for obj in found.files if obj.path == card.NAME and obj.size), None)
    if obj is None:
        return {}
    count = min(obj.size, card.HEAD_BYTES)
    return card.front_matter(bytes(read_span(found.source(), obj, 0, count, memoryview(bytearray(count)))))


def push(place: Place, found: Scan, checked: Checked, options: Options, told: Told = lambda step: None) -> Pushed:
    """Publish what was examined as what `place` names. The caller opens and closes the place.

    Raises: NotFoundError if there is no such base; ChangedError if a file changes meanwhile; UsageError, AccessError,
    StoreError, IntegrityError.
    """
    if place.model is None or place.manifest is not None:
        raise UsageError(f"{place.store.identity}: expected …/MODEL:TAG to push to")
    base = named_base(place.store, options.base) if options.base else None
    return _publish(place.store, place.model, place.tag or TAG, prepare(found, checked, told), options, base, told)


def _publish(
    store: Store, model: str, tag: str, prepared: Prepared, options: Options, base: Revision | None, told: Told
) -> Pushed:
    """All after hashing."""
    before = tags.current(store, model, tag, deadline_s=_soon())
    known = _known(store, model, before)
    warnings = [*prepared.checked.warnings]
    sending = Sending(store, prepared.scan.source(), prepared.chunks(), options.effort, lambda *step: told(Step(*step)))
    with work.pushing(
        store, manifests=[_name(r) for r in (*known, *([base] if base else []))], deadline_s=_soon()
    ) as lease:
        lease.name(sending.chunks, deadline_s=_soon())
        sending.ask([revision.manifest for revision in known])
        if options.base != "" and options.effort is not Effort.NONE:
            sending.choose_base(model, known, base, lease)
        sending.send()
        sending.name_bases(lease)

        def finish() -> tuple[Revision, bool, bool]:
            _check_unchanged(prepared.scan)
            made = sending.manifest(prepared.files, annotations={**prepared.annotations, **options.annotations})
            same = next((r for r in known if says_the_same(made, r.manifest)), None)
            revision = same or _store(store, model, made)
            if options.sign is not None:
                options.sign(store, model, _body(store, revision))
            return revision, same is None, _move(store, model, tag, before, revision, warnings)

        def tell(line: str) -> None:
            told(Step("waiting", line, 0, 0))

        revision, is_new, is_moved = lease.settle(
            lambda: sending.check(lease), finish, deadline_s=time.monotonic() + SETTLE_S, tell=tell
        )
    if base is not None and sending.sent.chunks_count and not sending.sent.differences_count:
        warnings.append(f"--base {options.base}: nothing came smaller as a difference to it")
    used = sending.base.revision if sending.base and sending.sent.differences_count else None
    return Pushed(model, tag, revision, is_new, is_moved, used, sending.sent, tuple(warnings), prepared.scan.left_out)


def _soon() -> float:
    return time.monotonic() + IO_S


def _name(revision: Revision) -> str:
    return f"{revision.model}/{revision.manifest_id}"


def _known(store: Store, model: str, before: tags.Move | None) -> list[Revision]:
    """What the model's tags mean: that of the tag to be moved first."""
    found = list(revisions_of(store, Tags(store), model))
    if before is not None and before.manifest is not None:
        found.sort(key=lambda revision: revision.manifest_id != before.manifest)
    return found


def _store(store: Store, model: str, manifest: Manifest) -> Revision:
    """Write a manifest, once it was read as everybody will. Raises: AccessError, StoreError, IntegrityError."""
    body = manifest.encode()
    made_id = manifest_id(body)
    parse_manifest(body, made_id)
    store.create(layout.manifest_key(model, made_id), body, deadline_s=_soon())
    return Revision(model, made_id, manifest)


def _body(store: Store, revision: Revision) -> bytes:
    """The manifest's bytes as they are stored: who made it may have written the same in another way."""
    body = revision.manifest.encode()
    if manifest_id(body) == revision.manifest_id:
        return body
    return store.read(layout.manifest_key(revision.model, revision.manifest_id), deadline_s=_soon())


def _move(
    store: Store, model: str, tag: str, before: tags.Move | None, revision: Revision, warnings: list[str]
) -> bool:
    """Move the tag unless it means the revision already: whether it was moved."""
    now = tags.current(store, model, tag, deadline_s=_soon())
    if now is not None and now.manifest == revision.manifest_id:
        return False
    moved = tags.move(store, model, tag, revision.manifest_id, how="push", deadline_s=_soon())
    expected = before.manifest if before else None
    if moved.previous != expected and moved.previous is not None:
        warnings.append(
            f"{model}:{tag} was moved to {moved.previous[:12]} by somebody else while this push ran; both revisions "
            f"exist, and it means this one now: see 'mfs log'"
        )
    return True


def _check_unchanged(before: Scan) -> None:
    """That the directory holds what was hashed. Raises: ChangedError."""
    now = {file.path: file for file in scan(before.root).files}
    for file in before.files:
        other = now.pop(file.path, None)
        if other != file:
            what = "is gone" if other is None else "changed"
            raise ChangedError(f"{before.root}/{file.path}: {what} while it was pushed; push again when it is at rest")
    if now:
        raise ChangedError(f"{before.root}/{min(now)}: came while its directory was pushed; push again")

"""Moving a tag to a revision that is there, and stays: beside a collection too, see `work`, race 4.

Going back is at once: what a tag meant lately no collection takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mfs.errors import NotFoundError, UsageError
from mfs.registry import layout, tags, work
from mfs.registry.store import Store
from mfs.registry.tags import Move
from mfs.registry.work import Record

IO_S = 120.0
"""Until one request gives up."""
SETTLE_S = 3600.0
"""Until a collection that is under way has ended, or this gives up."""


def retag(
    store: Store,
    model: str,
    tag: str,
    manifest: str,
    *,
    how: str,
    note: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> Move:
    """Move a tag to a manifest of the model, wherever it stood. Raises: NotFoundError if there is no such manifest."""

    def publish() -> Move:
        return tags.move(store, model, tag, manifest, how=how, note=note, deadline_s=_deadline())

    return _settled(store, model, tag, manifest, tell, publish)


def rollback(
    store: Store, model: str, tag: str, *, steps_count: int = 1, tell: Callable[[str], None] = lambda _: None
) -> Move:
    """Move a tag to what it meant `steps_count` revisions before.

    Raises: ChangedError if somebody else moves it meanwhile; NotFoundError; UsageError if there are not so many.
    """
    entries = tags.entries(store, model, tag, deadline_s=_deadline())
    if not entries:
        raise NotFoundError(f"{model}:{tag}: no such tag")
    moves = [item for item in entries if isinstance(item, Move)]
    before = tags.revisions(moves)
    if is_lost := moves[:1] != entries[:1]:  # what it means now cannot be read; whatever it is, it lies behind us
        before.insert(0, None)
    if not 0 < steps_count < len(before):
        there_are = max(len(before) - 1, 0)
        raise UsageError(f"{model}:{tag}: cannot go back {steps_count}: its history has {there_are or 'no'} "
                         f"{'revision' if there_are == 1 else 'revisions'} before this one; see 'mfs log'")  # fmt: skip
    target = before[steps_count]
    if target is None:
        raise NotFoundError(f"{model}:{tag}: it was removed before the move that is damaged; name a revision instead")

    def publish() -> Move:
        how: Any = {"how": "rollback", "note": f"{steps_count} back", "deadline_s": _deadline()}
        if is_lost:
            return tags.move(store, model, tag, target, **how)
        return tags.swap(store, model, tag, moves[0].manifest, target, **how)

    return _settled(store, model, tag, target, tell, publish)


def _settled(
    store: Store, model: str, tag: str, manifest: str, tell: Callable[[str], None], publish: Callable[[], Move]
) -> Move:
    """Publish beside collections, without waiting for those that keep the manifest anyway: `work`, race 4."""

    def check() -> None:
        if store.size(layout.manifest_key(model, manifest), deadline_s=_deadline()) is None:
            raise NotFoundError(f"{store.identity}: {model}@sha256:{manifest[:12]} is not there (any more)")

    passed: list[Record] = []

    def harmless(collection: Record) -> bool:
        if not _is_kept(store, model, manifest, collection.history_count):
            return False
        passed.append(collection)
        return True

    check()  # before a record is written for nothing
    with work.pushing(store, manifests=[f"{model}/{manifest}"], deadline_s=_deadline()) as lease:
        moved = lease.settle(check, publish, deadline_s=time.monotonic() + SETTLE_S, tell=tell, harmless=harmless)
        if passed:
            try:
                if not all(_is_kept(store, model, manifest, one.history_count, moved) for one in passed):
                    lease.settle(check, lambda: None, deadline_s=time.monotonic() + SETTLE_S, tell=tell)
                check()
            except NotFoundError:
                tags.swap(store, model, tag, manifest, moved.previous, how="rollback", note="it is gone",
                          deadline_s=_deadline())  # fmt: skip
                raise
    return moved


def _is_kept(store: Store, model: str, manifest: str, count: int, but: Move | None = None) -> bool:
    """Whether a tag of the model that is there meant a manifest in its last so many moves. but: a move not to count."""
    for tag in store.names(f"tags/{model}/", deadline_s=_deadline()) if count else ():
        found = tags.entries(store, model, tag, deadline_s=_deadline(), count_max=count + 1)
        moves = [item for item in found if but is None or getattr(item, "token", "") != but.token][:count]
        last = moves[0] if moves else None
        is_there = isinstance(last, Move) and last.manifest is not None
        if is_there and any(isinstance(item, Move) and item.manifest == manifest for item in moves):
            return True
    return False


def _deadline() -> float:
    return time.monotonic() + IO_S

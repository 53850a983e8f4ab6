"""Tags: names that move from revision to revision, each move an object that never changes. FORMAT.md, "Tags".

    tags/<model>/<tag>/<number>            ten digits; the highest number holds
    tags/<model>/<tag>/<number>.<token>    where the store cannot decide who is first: of equal numbers the greatest
                                           token holds, and all are history

What cannot be used of a tag - a move that is damaged, too long, of a newer version, or not to be read - costs that tag
alone (`EntryFault`): whoever may write one tag of a registry takes away none of the others.

A move creates the next number, and the store lets one of two do so: that is the whole of compare-and-swap. A tag is
removed by a move to nothing. What is older than the last moves is trimmed by `gc`, never the last one, so that a number
is not given twice.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from mfs.errors import (
    ChangedError,
    IntegrityError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
)
from mfs.registry import layout, work
from mfs.registry.parallel import for_each
from mfs.registry.store import Store

log = logging.getLogger(__name__)

ENTRY_BYTES_MAX = 64 << 10
"""Of one move, as it is written."""
NUMBER_MAX = 10**10 - 1
"""Ten digits. A tag that moves a thousand times a second gets there in four months, others never."""
NUMBERS_SKIPPED_MAX = 10**6
"""Between two moves that follow each other: an entry that is further ahead was not made by a move, and is passed over,
with all beyond it. Gaps are of moves that were taken back, and of a collection that trims just now, oldest first."""
READS_PARALLEL = 16
"""Entries read at once."""
TRIES_MAX = 100
"""Times that others may be quicker, before a move is given up."""

_CONTEST_PAUSE_S = 0.3
"""At most, after a move that was taken back."""
_LOOKS_MAX = 5
"""Listings, where what they name is gone when it is read."""

_ENTRY = re.compile(r"(\d{10})(?:\.([0-9a-f]{32}))?", re.ASCII)
_TEXT_CHARACTERS_MAX = 1000


class EntryFault(IntegrityError):
    """One move that cannot be used; nothing is wrong with others."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move of a tag."""

    number: int
    """From 1; gaps and equals are possible."""
    manifest: str | None
    """What the tag means from here on; None: it is removed."""
    previous: str | None
    """What it meant before, as its mover saw it."""
    at: str
    """UTC, 'YYYY-MM-DDTHH:MM:SSZ', by the mover's clock."""
    by: str
    """'user@host', as the mover says."""
    how: str
    """'push', 'tag', 'rollback', 'rm'."""
    note: str
    """What else its mover says: which name it was moved to, say."""
    token: str
    """32 hex digits, of this move alone."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """An entry as a listing has it; in the order in which they hold."""

    number: int
    token: str
    key: str
    modified_ns: int
    """By the store's clock."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A move that is there and cannot be used."""

    number: int
    key: str
    what: str
    """Why, in one line."""


class Tags:
    """The tags of models, for whoever looks again and again: what was read once is not read again. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._moves: dict[str, Move] = {}
        """By key; of what holds now."""
        self._lock = threading.Lock()

    def read(self, model: str, *, deadline_s: float) -> dict[str, Move]:
        """tag -> the move that holds, of a model; what was removed is not there.

        One listing, and a read for each entry that is new. A tag whose entry cannot be used is left out, and said. What
        was read before a deadline passed is kept, so that the next try has less to do.
        """
        prefix = f"tags/{model}/"
        for tries_left in reversed(range(_LOOKS_MAX)):
            last = {tag: places[-1] for (its, tag), places in _places(self._store, prefix, deadline_s).items()}
            try:
                moves = self._read({place.key for place in last.values()}, prefix, deadline_s)
                break
            except NotFoundError:  # taken back since it was listed, see `swap`
                if not tries_left:
                    raise
        found = ((tag, moves.get(place.key)) for tag, place in last.items())
        return {tag: move for tag, move in found if move is not None and move.manifest is not None}

    def _read(self, keys: Set[str], prefix: str, deadline_s: float) -> dict[str, Move]:
        with self._lock:
            known = keys & self._moves.keys()

        def one(key: str) -> None:
            try:
                move = _read(self._store, key, deadline_s)
            except EntryFault as e:
                log.warning("%s", e)
                return
            with self._lock:
                self._moves[key] = move

        for_each(sorted(keys - known), one, at_once=READS_PARALLEL)
        with self._lock:
            for key in [key for key in self._moves if key.startswith(prefix) and key not in keys]:
                del self._moves[key]
            return {key: self._moves[key] for key in keys if key in self._moves}


def current(store: Store, model: str, tag: str, *, deadline_s: float) -> Move | None:
    """The move that holds; None if there is no such tag, or it was removed."""
    _, move = _last(store, model, tag, deadline_s)
    return move if move is not None and move.manifest is not None else None


def entries(
    store: Store, model: str, tag: str, *, deadline_s: float, count_max: int | None = None
) -> list[Move | Damaged]:  # fmt: skip
    """A tag's moves, the last first, also those that cannot be used; count_max: of those, the first so many."""
    places = _history(store, model, tag, deadline_s)[::-1][:count_max]
    moves, faults = read_entries(store, [place.key for place in places], deadline_s=deadline_s)
    wrong = dict(faults)
    found = (
        moves.get(place.key) or (Damaged(place.number, place.key, wrong[place.key]) if place.key in wrong else None)
        for place in places
    )
    return [item for item in found if item is not None]


def history(store: Store, model: str, tag: str, *, deadline_s: float) -> list[Move]:
    """A tag's moves, the last first, but those that cannot be used."""
    return [item for item in entries(store, model, tag, deadline_s=deadline_s) if isinstance(item, Move)]


def move(
    store: Store, model: str, tag: str, manifest: str | None, *, how: str, note: str = "", deadline_s: float
) -> Move:
    """Move a tag to a manifest, or to nothing, from wherever it stands. The manifest must be there, and stay (`work`).

    Raises: AccessError, StoreError; TransientStoreError where it is not known whether it was moved.
    """
    for _ in range(TRIES_MAX):
        try:
            number, last = _last(store, model, tag, deadline_s)
        except EntryFault as e:  # this move is what mends it
            log.warning("%s", e)
            number, last = _history(store, model, tag, deadline_s)[-1].number, None
        if moved := _append(store, model, tag, number, last, manifest, how, note, deadline_s):
            return moved
    raise TransientStoreError(f"{model}:{tag}: others moved it {TRIES_MAX} times while we tried to; try again")


def swap(
    store: Store,
    model: str,
    tag: str,
    expected: str | None,
    manifest: str | None,
    *,
    how: str,
    note: str = "",
    deadline_s: float,
) -> Move:
    """Move a tag as `move` does, if it means `expected` (None: there is no such tag).

    Raises: ChangedError if it means something else, or somebody else is quicker.
    """
    for _ in range(TRIES_MAX):
        number, last = _last(store, model, tag, deadline_s)
        found = last.manifest if last else None
        if found != expected:
            by = f", moved by {last.by} at {last.at} ({last.how})" if last else ""
            raise ChangedError(f"{model}:{tag}: means {_shown(found)} and not {_shown(expected)}{by}: look again")
        moved = _append(store, model, tag, number, last, manifest, how, note, deadline_s)
        if moved and not _is_contested(store, model, tag, moved, deadline_s):
            return moved
    raise TransientStoreError(f"{model}:{tag}: others moved it {TRIES_MAX} times while we tried to; try again")


def remove(store: Store, model: str, tag: str, *, deadline_s: float) -> Move:
    """Move a tag to nothing. Raises: NotFoundError if there is none."""
    found = current(store, model, tag, deadline_s=deadline_s)
    if found is None:
        raise NotFoundError(f"{model}:{tag}: no such tag")
    return swap(store, model, tag, found.manifest, None, how="rm", deadline_s=deadline_s)


def trimmable(
    store: Store, *, count_max: int, deadline_s: float
) -> tuple[dict[tuple[str, str], list[Entry]], list[str]]:  # fmt: skip
    """((model, tag) -> its last `count_max` moves, at least one, the last first; keys of all older ones).

    The oldest first, and so must they go: a hole in the numbers would pass for the end (NUMBERS_SKIPPED_MAX).
    """
    kept: dict[tuple[str, str], list[Entry]] = {}
    old: list[str] = []
    for name, places in _places(store, "tags/", deadline_s).items():
        kept[name] = places[-max(1, count_max) :][::-1]
        old += [place.key for place in places[: -max(1, count_max)]]
    return kept, old


def read_entries(
    store: Store, keys: Iterable[str], *, deadline_s: float
) -> tuple[dict[str, Move], list[tuple[str, str]]]:
    """(moves by key, (key, what is wrong) of those that cannot be). One that is gone meanwhile is in neither."""
    moves: dict[str, Move] = {}
    faults: list[tuple[str, str]] = []

    def one(key: str) -> None:
        try:
            moves[key] = _read(store, key, deadline_s)
        except EntryFault as e:
            faults.append((key, str(e)))
        except NotFoundError:
            return

    for_each(keys, one, at_once=READS_PARALLEL)
    return moves, faults


def revisions(moves: list[Move]) -> list[str | None]:
    """What a tag meant, the last first: as one who steps back sees it. moves: as `history` gives them.

    A rollback is a move like any other, but who rolls back twice wants to be two revisions back: what a rollback left
    behind is skipped, as an editor's undo does.
    """
    stack: list[str | None] = []
    for one in reversed(moves):
        if one.how == "rollback" and one.manifest in stack:
            del stack[len(stack) - stack[::-1].index(one.manifest) :]
        elif not stack or stack[-1] != one.manifest:
            stack.append(one.manifest)
    return [manifest for number, manifest in enumerate(reversed(stack)) if manifest is not None or not number]


def _append(
    store: Store,
    model: str,
    tag: str,
    number: int,
    last: Move | None,
    manifest: str | None,
    how: str,
    note: str,
    deadline_s: float,
) -> Move | None:
    """Write the move after `number`; None if somebody else was quicker."""
    if not layout.is_name(model) or not layout.is_name(tag):
        raise UsageError(f"{model!r:.100}:{tag!r:.100}: expected letters, digits, '.', '_' and '-' as names")
    number += 1
    if number > NUMBER_MAX:
        taken = layout.tag_key(model, tag, NUMBER_MAX)
        raise StoreError(f"{store.identity}: {taken} leaves no number for the next move; no mover made it: remove it")
    token = secrets.token_hex(16)
    key = layout.tag_key(model, tag, number)
    is_decided = store.is_conditional(deadline_s=deadline_s)
    if not is_decided:
        key += f".{token}"
    made = Move(
        number,
        manifest,
        last.manifest if last else None,
        work.utc(),
        work.who(),
        how,
        note[:_TEXT_CHARACTERS_MAX],
        token,
    )
    said = {"format": "mfs-tag", "version": 1, **asdict(made)}
    body = (
        json.dumps(said, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8", "replace") + b"\n"
    )
    if not store.create(key, body, deadline_s=deadline_s):
        return None
    # Who moves the tag after us must find this one: where the store does not decide, a number given twice would leave
    # the order to the tokens. And nobody shall be told of a move that no reader will see.
    _wait_until_listed(store, model, tag, number, key, deadline_s)
    return made


def _wait_until_listed(store: Store, model: str, tag: str, number: int, key: str, deadline_s: float) -> None:
    for _ in range(work.LOOKS_MAX):
        if any(place.key == key or place.number > number for place in _history(store, model, tag, deadline_s)):
            return
        time.sleep(work.UNLISTED_PAUSE_S)
    raise TransientStoreError(
        f"{store.identity}: {key} was written and is not listed: this store shows what is written only later; look at "
        "'mfs log' in a while"
    )


def _is_contested(store: Store, model: str, tag: str, moved: Move, deadline_s: float) -> bool:
    """Whether, on a store that does not decide, somebody else made the same move number; ours is taken back then.

    Each writes first and lists then, so that at least one of two sees the other: never do both take themselves for the
    one. Both may see it so and take back theirs: then both try again, and look what the tag means first. In between
    readers may see either, as they may where one moves right after the other.
    """
    if store.is_conditional(deadline_s=deadline_s):
        return False
    key = f"{layout.tag_key(model, tag, moved.number)}.{moved.token}"
    same = [place for place in _history(store, model, tag, deadline_s) if place.number >= moved.number]
    if len(same) <= 1:
        return False
    store.delete([key], deadline_s=deadline_s)
    time.sleep(secrets.randbelow(1000) / 1000 * _CONTEST_PAUSE_S)  # not in step with the other
    return True


def _last(store: Store, model: str, tag: str, deadline_s: float) -> tuple[int, Move | None]:
    """(number of the last move, 0 without any; that move). Raises: IntegrityError."""
    for tries_left in reversed(range(_LOOKS_MAX)):
        places = _history(store, model, tag, deadline_s)
        if not places:
            break
        try:
            return places[-1].number, _read(store, places[-1].key, deadline_s)
        except NotFoundError:  # taken back since it was listed, see `swap`
            if not tries_left:
                raise
    return 0, None


def _history(store: Store, model: str, tag: str, deadline_s: float) -> list[Entry]:
    return _places(store, layout.tag_prefix(model, tag), deadline_s).get((model, tag), [])


def _places(store: Store, prefix: str, deadline_s: float) -> dict[tuple[str, str], list[Entry]]:
    """(model, tag) -> what counts as its entries, the last one last."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for stored in store.list(prefix, deadline_s=deadline_s):
        parts = stored.key.split("/")
        if len(parts) == 4 and (match := _ENTRY.fullmatch(parts[3])):
            entry = Entry(int(match[1]), match[2] or "", stored.key, stored.modified_ns)
            found.setdefault((parts[1], parts[2]), []).append(entry)
    for places in found.values():
        places.sort()
        ahead = next(
            (n for n, (a, b) in enumerate(pairwise(places), 1) if b.number - a.number > NUMBERS_SKIPPED_MAX), None
        )
        if ahead is not None:
            log.warning("%s: %s is numbered too far ahead, no move made it: passed over; remove it", store.identity,
                        places[ahead].key)  # fmt: skip
            del places[ahead:]
    return found


def _read(store: Store, key: str, deadline_s: float) -> Move:
    """Raises: EntryFault for all that concerns this entry alone; NotFoundError, TransientStoreError."""
    try:
        return _parsed(key, store.read(key, bytes_max=ENTRY_BYTES_MAX, deadline_s=deadline_s))
    except (NotFoundError, TransientStoreError):
        raise
    except MfsError as e:
        raise EntryFault(f"{store.identity}: {key}: {e}; move the tag anew") from None


def _parsed(key: str, body: bytes) -> Move:
    """Raises: IntegrityError, StoreError."""
    try:
        said = json.loads(body)
        if said["format"] != "mfs-tag":
            raise ValueError("no entry of a tag")
        if said["version"] != 1:
            raise StoreError(f"of version {said['version']!r:.40}, this mfs reads 1: upgrade it")
        number = int(key.rpartition("/")[2].partition(".")[0])
        return Move(number, _id(said["manifest"]), _id(said["previous"]), *(
            _text(said[name]) for name in ("at", "by", "how", "note", "token")))  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise IntegrityError(f"{type(e).__name__}: {str(e)[:200]}") from None


def _id(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and layout.is_id(value)):
        raise ValueError(f"{value!r:.80} is not 64 hexadecimal digits")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_CHARACTERS_MAX:
        raise ValueError(f"expected a text, got {value!r:.80}")
    return value


def _shown(manifest: str | None) -> str:
    return manifest[:12] if manifest else "nothing"

"""Who is pushing and who is collecting: the records by which `gc` and `push` keep out of each other's way.

    work/push-<token>        JSON: who, since when, and the manifests that are relied upon; written again every BEAT_S
    work/push-<token>.<n>    ids of chunks that this push relies on, one a line; n from 1, never changed
    work/gc-<token>          JSON, as of a push, and how many moves of a tag it keeps
    work/tmp-…, probe-…      what a store leaves where a process is killed; nobody's record

A record is *live* while its last change is less than `Pace.stale_s` ago by the store's clock: now is the change of a
record that we have just written ourselves, so that no two machines' clocks are compared. Who was not able to write his
own again for `Pace.lapse_s` has *lapsed*: others may take him for dead, and he must not rely on anything he saw before.
Nor is a record live that did not change for `stale_s` while we looked (its time may lie in the future), nor that of a
process of this machine that is gone.

How the two are kept apart (after Dekker: each writes first and looks then; the store is strongly consistent, so that at
least one sees the other):

    push                                            collection
    P1  write work/push-t                           G1  write work/gc-u
    P2  write work/push-t.<n>: the ids it needs     G2  list work/: live pushes; mark what they name
    P3  see which are there, store what is not      G3  list tags, then manifests; mark what these name
    P4  list work/: wait for live collections       G4  list chunks; delete what is not marked and older than the grace
    P5  see once more whether all are there         G5  delete work/gc-u
    P6  store the manifest, move the tag
    P7  delete work/push-t.<n>, then work/push-t

1.  P2 before G2: G2 sees the ids, and G4 spares them.
2.  G2 before P2: then G1 before P4. P4 sees the collection and waits for its end, P5 finds what it took, and stores it.
3.  The push ends between G1 and G2: its manifest and its tag were there before its record went (P6 before P7), so that
    G3 sees them; G3 lists after G2 for that reason.
4.  A tag moves to an old manifest while G3 lists: who moves it holds a record that names the manifest (P1), and looks
    for it after P4 (P5), as for a chunk. It need not wait (P4) for a collection that keeps the manifest as history:
    the record of a collection says how many moves of a tag it keeps (n). If after P6 the manifest is among the last n
    of a tag that is there, our own move apart, then so it was when G3 listed before P6, since moves only come on top;
    and where G3 listed after P6 it saw our move. Else P4 and P5 follow after all, and P6 is undone if P5 fails.
5.  A push is killed: its record lives for an hour, what it stored for the grace. Run again it finds what is there.
6.  A push sleeps (a laptop's lid) from P3 to P5 for hours: its record is stale, a collection takes what it stored, and
    the record. Awake, it has lapsed: it writes record and ids anew and goes back to P4. Asleep between P5 and P6: it
    sees so after P6, and does P4 and P5 again, after which all that its tag names is there.
7.  A collection sleeps in G4: pushes take it for dead and pass P4. Awake, it has lapsed and deletes nothing more: it
    looks at its own record before each batch of deletions, which takes `gc.BATCH_S` at most: lapse_s + BATCH_S is less
    than stale_s, by five minutes.
8.  Two collections at once: each would delete what nobody needs, twice; but the second that sees another live one ends
    with an error, so that nobody waits for two.
9.  A collection is killed: pushes of its machine see that its process is gone, and pass P4 after DELIVERED_S, in which
    a batch that it had sent has come to its end; those of other machines when it is stale.

What remains: a machine that stops between that look and a request which is delivered a quarter of an hour later all the
same.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from mfs.errors import MfsError, NotFoundError, StoreError, TransientStoreError
from mfs.registry.layout import is_id, is_name
from mfs.registry.store import Store, Stored

T = TypeVar("T")

log = logging.getLogger(__name__)


class Pace(NamedTuple):
    """How often somebody gives a sign of life."""

    beat_s: float
    """A record is written again this often."""
    lapse_s: float
    """Without having written our record for so long we rely on nothing we saw before."""
    stale_s: float
    """A record not written for so long is a dead process's. The difference to lapse_s is what clocks of one store's
    servers, and a request on its way, may be late."""


PUSH = Pace(600, 1800, 3600)
"""Nobody waits for a push, so its signs are rare, and laptops may sleep for a while."""
COLLECTION = Pace(60, 300, 900)
"""Every push waits for a collection."""
DELIVERED_S = 15.0
"""After which nothing is under way any more of a process that is gone."""
PAUSE_S = 2.0
"""Between two looks for a collection's end."""
LOOKS_MAX = 10
UNLISTED_PAUSE_S = 0.5
"""Looks for our own record in a listing, and the pause between: Swift's are late where its containers are slow."""
BEAT_TIMEOUT_S = 120.0
"""Until one beat has failed; the next comes at its time."""
RECORD_BYTES_MAX = 64 << 10
"""Of a record without a number: of some hundred manifests."""
IDS_PER_PART = 100_000
"""Chunk ids in one object: 6.5 MB."""

_PREFIX = "work/"


class Record(NamedTuple):
    """A live record of somebody."""

    token: str
    who: str
    """For people: 'user@host'."""
    since: str
    """UTC, 'YYYY-MM-DDTHH:MM:SSZ', by that machine's clock."""
    manifests: tuple[str, ...]
    """'<model>/<manifest id>' that must stay."""
    parts: tuple[str, ...]
    """Keys of what names its chunks; see `named_chunks`."""
    key: str
    history_count: int
    """Moves of a tag that this collection keeps; 0 where it does not say."""
    is_gone: bool
    """Whether it was made on this machine, by a process that is there no more."""


class Around(NamedTuple):
    """Who is at work."""

    pushes: list[Record]
    """Live ones."""
    collections: list[Record]
    """Live ones."""
    dead: list[Stored]
    """What nobody has any more, those that are gone too."""
    now_ns: int
    """By the store's clock."""


class Lease:
    """Our own record, kept alive by a thread. Made by `pushing` and `collecting`."""

    def __init__(self, store: Store, kind: str, manifests: Iterable[str], *, history_count: int = 0) -> None:
        self.store = store
        self._pace = _pace(kind)
        self.token = secrets.token_hex(16)
        self._key = f"{_PREFIX}{kind}-{self.token}"
        self._body = _encode({
            "format": "mfs-work", "version": 1, "kind": kind, "token": self.token, "who": who(), "since": utc(),
            "manifests": sorted(manifests), "process": _process(), "history": history_count,
        })  # fmt: skip
        self._seen: dict[str, tuple[int, float]] = {}
        """Others' records: key -> (time of its change, since when we see it so)."""
        self._gone: dict[str, float] = {}
        """Keys of collections whose process is gone -> since when we know."""
        self._parts: dict[str, bytes] = {}
        self._beat_at_s = 0.0
        self._lapses_count = 0
        self._renewed_count = 0
        """Lapses after which the parts were written again."""
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name=f"{kind} lease", daemon=True)

    def name(self, chunk_ids: Iterable[str], *, deadline_s: float) -> None:
        """Say that these chunks are relied upon: before one looks whether they are there. May be called again.

        All that the manifest will need is named, also what is stored anew and what differences stand on
        (`Manifest.chunk_ids`).
        """
        left = list(dict.fromkeys(chunk_ids))
        for start in range(0, len(left), IDS_PER_PART):
            key = f"{self._key}.{len(self._parts) + 1}"
            body = "".join(f"{chunk_id}\n" for chunk_id in left[start : start + IDS_PER_PART]).encode()
            self.store.write(key, body, deadline_s=deadline_s)
            self._parts[key] = body

    def settle(
        self,
        check: Callable[[], object],
        publish: Callable[[], T],
        *,
        deadline_s: float,
        tell: Callable[[str], None] = lambda _: None,
        harmless: Callable[[Record], bool] = lambda _: False,
    ) -> T:
        """P4 to P6: wait for collections, `check`, `publish`; what `publish` returned.

        check: sees that everything named is there, and stores what is not. It may be called more than once.
        publish: makes the manifest and moves the tag. It is called once.
        tell: is told in a line that, and for whom, we wait. harmless: a collection that need not be waited for.
        Raises: TransientStoreError if a collection does not end by the deadline; whatever the two raise.
        """
        lapses_count = self._checked(check, deadline_s, tell, harmless)
        done = publish()
        while self.has_lapsed(since=lapses_count):
            lapses_count = self._checked(check, deadline_s, tell, harmless)
        return done

    def has_lapsed(self, *, since: int = 0) -> bool:
        """Whether we may have been taken for dead; since: what `lapses_count` was before."""
        return self.lapses_count > since

    @property
    def lapses_count(self) -> int:
        """How often we may have been taken for dead. Looks at the clock, asks nobody."""
        with self._writing:
            return self._lapses_count + (_awake_s() - self._beat_at_s > self._pace.lapse_s)

    def look(self, *, deadline_s: float) -> Around:
        """Who is at work beside us. Writes our record first: its time is now by the store's clock."""
        for _ in range(LOOKS_MAX):
            self.beat(deadline_s=deadline_s)
            if around := _look(self.store, self._key, self._seen, deadline_s):
                return around
            self._ended.wait(UNLISTED_PAUSE_S)
        raise StoreError(
            f"{self.store.identity}: {self._key} was just written and is not listed: this store shows what is written "
            "only later, which no registry can stand on"
        )

    def beat(self, *, deadline_s: float) -> None:
        """Write our record again."""
        began_s = _awake_s()  # the record is at least as new as this
        self.store.write(self._key, self._body, deadline_s=deadline_s)
        with self._writing:
            if self._beat_at_s and began_s - self._beat_at_s > self._pace.lapse_s:
                self._lapses_count += 1
            self._beat_at_s = max(self._beat_at_s, began_s)

    def start(self, *, deadline_s: float) -> None:
        """P1, G1."""
        self.beat(deadline_s=deadline_s)
        self._thread.start()

    def end(self, *, deadline_s: float) -> None:
        """P7, G5. What cannot be removed goes with the next collection."""
        self._ended.set()
        self._thread.join()
        try:
            self.store.delete([*self._parts, self._key], deadline_s=deadline_s)
        except MfsError as e:
            log.warning("%s: the record %s stays until the next collection: %s", self.store.identity, self._key, e)

    def _checked(
        self,
        check: Callable[[], object],
        deadline_s: float,
        tell: Callable[[str], None],
        harmless: Callable[[Record], bool],
    ) -> int:
        """Wait for collections, and check; how often we had lapsed when that began, and had not again when it ended."""
        while True:
            self._wait_for_collections(deadline_s, tell, harmless)
            lapses_count = self.lapses_count
            if lapses_count > self._renewed_count:  # what names our chunks may have been swept
                self._renewed_count = lapses_count
                for key, body in self._parts.items():
                    self.store.write(key, body, deadline_s=deadline_s)
                continue
            check()
            if not self.has_lapsed(since=lapses_count):
                return lapses_count
            if time.monotonic() >= deadline_s:
                raise TransientStoreError(f"{self.store.identity}: this push was asleep for too long, or its record "
                                          "could not be written: run it again")  # fmt: skip

    def _wait_for_collections(
        self, deadline_s: float, tell: Callable[[str], None], harmless: Callable[[Record], bool]
    ) -> None:
        told = ""
        while True:
            found = self.look(deadline_s=deadline_s).collections
            collections = [one for one in found if not self._is_long_gone(one) and not harmless(one)]
            if not collections:
                return
            first = collections[0]
            if told != first.token:
                told = first.token
                tell(f"waiting for a collection by {first.who} since {first.since}{_until(first)}")
            if time.monotonic() + PAUSE_S >= deadline_s:
                raise TransientStoreError(
                    f"{self.store.identity}: a collection by {first.who} since {first.since} does not end in time; "
                    f"what was stored stays: run this again later{_until(first)}"
                )
            self._ended.wait(PAUSE_S)

    def _is_long_gone(self, collection: Record) -> bool:
        if not collection.is_gone:
            return False
        return _awake_s() - self._gone.setdefault(collection.key, _awake_s()) >= DELIVERED_S

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._pace.beat_s):
            try:
                self.beat(deadline_s=time.monotonic() + BEAT_TIMEOUT_S)
            except MfsError as e:
                log.warning("%s: the record of this process could not be written again: %s", self.store.identity, e)


@contextlib.contextmanager
def pushing(store: Store, *, manifests: Iterable[str] = (), deadline_s: float) -> Iterator[Lease]:
    """A push's record while the block runs. manifests: '<model>/<manifest id>' that must stay.

    with work.pushing(store, deadline_s=…) as lease:
        lease.name(chunk_ids, deadline_s=…)       # P2: before asking which are there
        …                                         # P3
        lease.settle(check, publish, deadline_s=…)
    """
    lease = Lease(store, "push", manifests)
    lease.start(deadline_s=deadline_s)
    try:
        yield lease
    finally:
        lease.end(deadline_s=time.monotonic() + BEAT_TIMEOUT_S)


@contextlib.contextmanager
def collecting(store: Store, *, history_count: int = 0, deadline_s: float) -> Iterator[Lease]:
    """A collection's record while the block runs. history_count: moves of a tag that it keeps for sure.

    Raises: StoreError if another collection is under way.
    """
    lease = Lease(store, "gc", (), history_count=history_count)
    lease.start(deadline_s=deadline_s)
    try:
        collections = lease.look(deadline_s=deadline_s).collections
        if other := next((one for one in collections if not one.is_gone), None):
            raise StoreError(
                f"{store.identity}: a collection by {other.who} since {other.since} is under way{_until(other)}"
            )
        yield lease
    finally:
        lease.end(deadline_s=time.monotonic() + BEAT_TIMEOUT_S)


def peek(store: Store, *, deadline_s: float) -> Around:
    """Who is at work, by this machine's clock: for who changes nothing, and may have no right to write."""
    around = _look(store, None, {}, deadline_s)
    assert around is not None
    return around


def named_chunks(store: Store, record: Record, *, deadline_s: float) -> Iterator[str]:
    """Ids of the chunks that a push relies on. A part that is gone belongs to a push that has ended."""
    for key in record.parts:
        try:
            body = store.read(key, bytes_max=IDS_PER_PART * 65, deadline_s=deadline_s)
        except NotFoundError:
            continue
        yield from (text for line in body.split() if is_id(text := line.decode("ascii", "replace")))


def who() -> str:
    """Who we are, for people: 'user@host'."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a number without a name, as in containers
        user = str(os.geteuid())
    return f"{user}@{socket.gethostname()}"


def utc(seconds: float | None = None) -> str:
    """A time, now by default, as our JSON has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _awake_s() -> float:
    """A clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _pace(kind: str) -> Pace:
    return COLLECTION if kind == "gc" else PUSH


def _process() -> str:
    """This process, so that others of this machine can see whether it is there: '<machine>/<pid>'."""
    return f"{_machine()}/{os.getpid()}"


def _machine() -> str:
    """Since when it runs, and in which of its worlds of pids we are (containers have their own); '' if not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_gone(process: object) -> bool:
    """Whether a process was of this machine, and is no more."""
    machine, _, pid = process.rpartition("/") if isinstance(process, str) else ("", "", "")
    if not machine or machine != _machine() or not (pid.isascii() and pid.isdigit() and len(pid) < 10):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _until(collection: Record) -> str:
    """What a person can do about a collection that does not end."""
    return (
        f"; if it was killed, its record counts for {COLLECTION.stale_s / 60:.0f} minutes more, or until you remove "
        f"{collection.key}"
    )


def _look(store: Store, own_key: str | None, seen: dict[str, tuple[int, float]], deadline_s: float) -> Around | None:
    """None if our own record is not listed. seen: what was seen before, renewed."""
    listed = list(store.list(_PREFIX, deadline_s=deadline_s))
    now_ns = next((found.modified_ns for found in listed if found.key == own_key), None if own_key else time.time_ns())
    if now_ns is None:
        return None
    live: dict[str, list[Record]] = {"push": [], "gc": []}
    dead = []
    fresh = {found.key for found in listed if _is_fresh(found, now_ns, seen)}
    for found in listed:
        head = found.key.partition(".")[0]
        if head == own_key:
            continue
        if head not in fresh:
            dead.append(found)
        elif found.key == head and (kind := head.removeprefix(_PREFIX).partition("-")[0]) in live:
            parts = tuple(other.key for other in listed if other.key.startswith(f"{head}."))
            if record := _read(store, found.key, parts, deadline_s):
                live[kind].append(record)
                if kind == "gc" and record.is_gone:
                    dead.append(found)
    return Around(live["push"], live["gc"], dead, now_ns)


def _is_fresh(found: Stored, now_ns: int, seen: dict[str, tuple[int, float]]) -> bool:
    stale_s = _pace(found.key.removeprefix(_PREFIX).partition("-")[0]).stale_s
    modified_ns, since_s = seen.get(found.key, (-1, 0.0))
    if modified_ns != found.modified_ns:
        since_s = _awake_s()
        seen[found.key] = found.modified_ns, since_s
    return now_ns - found.modified_ns < stale_s * 1e9 and _awake_s() - since_s < stale_s


def _read(store: Store, key: str, parts: tuple[str, ...], deadline_s: float) -> Record | None:
    """None if it is gone. What cannot be read is a record all the same: better to wait for nobody than to delete."""
    body = b""
    try:
        body = store.read(key, bytes_max=RECORD_BYTES_MAX, deadline_s=deadline_s)
    except NotFoundError:
        return None
    except TransientStoreError:
        raise
    except MfsError as e:
        log.warning("%s: %s: a record that cannot be read counts all the same: %s", store.identity, key, e)
    said: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(body), dict):
            said = found
    named = said.get("manifests")
    manifests = [text for text in named if _is_manifest(text)] if isinstance(named, list) else []
    history_count = count if isinstance(count := said.get("history"), int) else 0
    return Record(key.partition("-")[2], _text(said.get("who")), _text(said.get("since")), tuple(manifests), parts, key,
                  history_count, _is_gone(said.get("process")))  # fmt: skip


def _is_manifest(text: object) -> bool:
    model, _, manifest = text.partition("/") if isinstance(text, str) else ("", "", "")
    return is_name(model) and is_id(manifest)


def _text(value: object) -> str:
    return value[:200] if isinstance(value, str) and value else "somebody"


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode() + b"\n"

"""What a server leaves: descriptors under names, in other hands than its own, and a page that says what they mean.

The hands are a service manager's: systemd's FD store, or `gpuload.holder`, which speak the same. The names:

    socket, lock     the listening socket; the file whose lock says that a server is there
    index            a memory file, rewritten with every change: what is served, what is leased by whom
    shared.A         what all of arena A's memory lives by, where that is one; A counts the index's devices
    piece.A.G.N      what N granules of it from G on live by, where memory comes in pieces and a model stands there
    model.M          a memory file, written once: a model's tables and digests (`records`)
    lease.L          the connection that a lease is

The rule that makes a killed server's successor safe: *no byte goes into a granule before the index says that nobody
has it*, and no client has a granule before the index says so. What a load was filling is in no index: nobody believes
it. Memory that no model stands in is not kept: it goes with the server.

The index is written in place, in two slots in turn, each with the digest of what stands in it: whoever is killed while
writing leaves the other one. It is a map (msgpack) of:

    format, version  FORMAT, and the program that wrote it
    is_clean         the server stopped in order; else its successor compares every byte with its digest first
    devices          of each arena: name, identity, granule_bytes, granules_count, budget_count
    counters         next model, next lease, how many servers there were before, the last generation
    since            when the first of them began, since the epoch
    models           of each: M, name or null, the name it has lost, is_pinned, generation, used_at
    leases           of each: L, M, whether its connection is kept, pid and uid of who attached
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import msgpack
import trio
from blake3 import blake3

from gpuload.descriptors import is_scarce
from gpuload.device.base import Run
from gpuload.errors import BusyError
from gpuload.server.catalog import Lease, Model
from gpuload.server.records import packed
from gpuload.server.site import Site
from gpuload.wire import close_all, rights
from mfs import manager
from mfs.errors import IntegrityError

log = logging.getLogger("gpuload.server")

FORMAT = 2
"""Of index and records together. Raised whenever one server would misread another's."""

SLOT_BYTES = 8 << 20
"""Models and leases of a server take tens of bytes each. Past half of it no model comes: the rest is for leases, and
for names that models have lost, which double what it takes at most."""

STORE_S = 5.0
"""Longest wait for a service manager to take a descriptor. It has not answered for thousands of them by then."""

_HEAD = struct.Struct(">8sQQ32s")
_MAGIC = b"gpuload\x01"


class Store:
    """Who keeps descriptors for us; nobody, without an address. Trio thread only, but for `is_there`."""

    def __init__(self, address: str = "") -> None:
        """address: a path, or '@' and a name in the abstract namespace, as NOTIFY_SOCKET has it."""
        self.address = address
        self._sock: trio.socket.SocketType | None = None
        self._turn = trio.Lock()
        self._unwanted: list[str] = []
        self.is_there = bool(address)
        """False also once it did not take something: what it has is not to be relied on any more."""

    async def put(self, name: str, fd: int, *, is_watched: bool = False) -> bool:
        """Have it keep a copy. is_watched: only until the other end hangs up. Returns whether it took it."""
        if not self.is_there:
            return False
        message = f"FDSTORE=1\nFDNAME={name}" + ("" if is_watched else "\nFDPOLL=0")
        return await self._say(message, [fd])

    def remove(self, name: str) -> None:
        """Have it keep that no more; now or with what is said next."""
        if self.is_there:
            self._unwanted.append(name)
            self._flush()

    def remove_now(self, names: Sequence[str]) -> None:
        """Have it keep these no more, and nothing be put any more. From any thread; waits."""
        self.is_there, was_there = False, self.is_there
        until = time.monotonic() + STORE_S
        for name in names if was_there else ():
            if time.monotonic() < until:
                manager.notify(f"FDSTOREREMOVE=1\nFDNAME={name}", address=self.address)

    async def settle(self) -> None:
        """Until everything was said."""
        while self._unwanted and self.is_there:
            await self._say(f"FDSTOREREMOVE=1\nFDNAME={self._unwanted.pop(0)}", [])

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def _flush(self) -> None:
        while self._unwanted:
            try:
                with socket.socket(fileno=os.dup(self._connected().fileno())) as same:
                    same.sendmsg([f"FDSTOREREMOVE=1\nFDNAME={self._unwanted[0]}".encode()], [], socket.MSG_DONTWAIT)
            except OSError:  # it is busy, or away: the next one who waits says it
                return
            self._unwanted.pop(0)

    async def _say(self, message: str, fds: Sequence[int]) -> bool:
        async with self._turn:
            try:
                with trio.fail_after(STORE_S):
                    await self._connected().sendmsg([message.encode()], rights(fds) if fds else [])
            except (OSError, trio.TooSlowError) as error:
                if self.is_there:
                    log.warning("the service manager takes no descriptors (%s): a crash loses the weights", error)
                self.is_there = False
                return False
        return True

    def _connected(self) -> trio.socket.SocketType:
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            try:
                sock.connect("\0" + self.address[1:] if self.address.startswith("@") else self.address)
            except OSError:
                sock.close()
                raise
            self._sock = trio.socket.from_stdlib_socket(sock)
        return self._sock


class Index:
    """The memory file that says what all others mean."""

    def __init__(self, fd: int | None = None) -> None:
        """fd: of one that is there, ours from here on. Raises: IntegrityError if nothing in it can be read."""
        self.fd = os.memfd_create("gpuload-index", os.MFD_CLOEXEC) if fd is None else fd
        self._number, self.content = 0, b""
        if fd is not None:
            slots = [found for at in (0, 1) if (found := self._read(at)) is not None]
            if not slots:
                os.close(fd)
                raise IntegrityError("the index of the server before cannot be read")
            self._number, self.content = max(slots)

    def write(self, content: bytes) -> None:
        """Replace what it says, whole or not at all. No checkpoint, no waiting: it is memory."""
        if content == self.content:
            return
        assert self.fd >= 0
        if len(content) > SLOT_BYTES - _HEAD.size:
            content = b""  # nothing that could be misread
        number = self._number + 1
        head = _HEAD.pack(_MAGIC, number, len(content), _sum(number, content))
        os.pwrite(self.fd, head + content, number % 2 * SLOT_BYTES)
        self._number, self.content = number, content

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _read(self, at: int) -> tuple[int, bytes] | None:
        head = os.pread(self.fd, _HEAD.size, at * SLOT_BYTES)
        if len(head) < _HEAD.size:
            return None
        magic, number, size, digest = _HEAD.unpack(head)
        if magic != _MAGIC or size > SLOT_BYTES - _HEAD.size:
            return None
        content = os.pread(self.fd, size, at * SLOT_BYTES + _HEAD.size)
        return (number, content) if len(content) == size and digest == _sum(number, content) else None


def _sum(number: int, content: bytes) -> bytes:
    return bytes(blake3(number.to_bytes(8, "big") + content).digest())


def piece_name(at: int, run: Run) -> str:
    """What a piece of arena `at` is kept as."""
    return f"piece.{at}.{run[0]}.{run[1]}"


def memory_file(name: str, content: bytes) -> int:
    """A file in memory, of nobody's but the holders of its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


@dataclass
class Counters:
    next_model: int = 1
    next_lease: int = 1
    servers_before: int = 0
    last_generation: int = 0


@dataclass
class Estate:
    """One server's; it begins empty, or is the one of the server before (`succession`). Trio thread only."""

    store: Store
    version: str
    index: Index = field(default_factory=Index)
    counters: Counters = field(default_factory=Counters)
    since: float = field(default_factory=time.time)
    """When the first server of these weights began."""
    began: float = field(default_factory=time.time)
    doors: dict[str, int] = field(default_factory=dict)
    """'socket' and 'lock'; the server's own descriptors."""
    sites: Mapping[str, Site] = field(default_factory=dict)
    records: dict[int, int] = field(default_factory=dict)
    """M -> memory file."""
    leases: dict[int, tuple[Lease, int, bool]] = field(default_factory=dict)
    """L -> what is leased, the connection's descriptor (its owner's), whether the store has it."""
    _stored: set[str] = field(default_factory=set)
    """Names of pieces that the store has."""
    _coming: set[int] = field(default_factory=set)
    """Records of models that are about to be served."""
    is_clean: bool = False
    is_open: bool = False
    """Between `resume` and `stop`."""

    async def keep(self, doors: Mapping[str, int], sites: Mapping[str, Site], stored: Sequence[str] = ()) -> None:
        """Have all that there is kept; nothing is said of it before `resume`. stored: names that are kept already."""
        self.doors, self.sites = dict(doors), sites
        self._stored |= {name for name in stored if name.startswith("piece.")}
        for name, fd in await trio.to_thread.run_sync(lambda: list(self.everything())):
            if name.startswith("piece."):
                await self._put_piece(name, fd)
            elif name not in stored:
                await self.store.put(name, fd, is_watched=name.startswith("lease."))
        for site in sites.values():
            site.before_release = self._before_release

    async def _put_piece(self, name: str, fd: int) -> None:
        if name not in self._stored:
            self._stored.add(name)
            await self.store.put(name, fd)

    def everything(self) -> Iterator[tuple[str, int]]:
        """Every name and descriptor; these stay whose they are."""
        yield from self.doors.items()
        yield "index", self.index.fd
        for at, site in enumerate(self.sites.values()):
            shared = site.arena.shared()
            if shared is not None:
                yield f"shared.{at}", shared
        yield from self._pieces(self._models())
        yield from ((f"model.{number}", fd) for number, fd in self.records.items())
        yield from ((f"lease.{number}", fd) for number, (_, fd, _) in self.leases.items())

    def _models(self) -> list[Model]:
        catalogs = [site.catalog for site in self.sites.values()]
        return list({id(m): m for c in catalogs for m in (*c.models.values(), *c.retired)}.values())

    def _pieces(self, models: Iterable[Model]) -> Iterator[tuple[str, int]]:
        """What the memory of these lives by, each piece once. May call a driver for each that is new."""
        for at, (name, site) in enumerate(self.sites.items()):
            if site.arena.has_pieces:
                parts = [part for model in models for part in model.parts if part.catalog.device == name]
                blocks = {id(block): block for part in parts for block in part.blocks}.values()
                runs = [run for block in blocks for run in block.runs]
                yield from zip((piece_name(at, run) for run in runs), site.arena.descriptors(runs), strict=True)

    async def _before_release(self, site: Site, runs: Sequence[Run]) -> None:
        """Memory goes back only where nobody keeps it for us."""
        self.sync()
        at = list(self.sites.values()).index(site)
        names = {piece_name(at, run) for run in runs} & self._stored
        for name in names:
            self._stored.discard(name)
            self.store.remove(name)
        if names:
            await self.store.settle()
            await trio.to_thread.run_sync(partial(manager.barrier, address=self.store.address))

    def life(self) -> dict[str, object]:
        """For `status`: since when this server serves, how many served these weights before it, and since when."""
        now = time.time()
        return {
            "uptime_s": round(now - self.began, 3),
            "servers_before": self.counters.servers_before,
            "weights_since_s": round(now - self.since, 3),
            "outlives_a_crash": self.store.is_there,
        }

    def devices(self) -> list[list[object]]:
        """As the index has them."""
        return [
            [name, s.device.identity, s.arena.granule_bytes, s.arena.granules_count, s.catalog.budget_count]
            for name, s in self.sites.items()
        ]

    @asynccontextmanager
    async def recorded(self, model: Model) -> AsyncIterator[None]:
        """Keep what a model is; inside, with no checkpoint, it is to be served. What is not served is forgotten.

        Raises: BusyError if no more can be kept.
        """
        if len(self.index.content) > SLOT_BYTES // 2:
            raise BusyError("the gpuload server has as many models as it can leave to a successor: evict some")
        content = await trio.to_thread.run_sync(packed, model)
        number, self.counters.next_model = self.counters.next_model, self.counters.next_model + 1
        record = memory_file("gpuload-model", content)
        if is_scarce(record):
            os.close(record)
            raise BusyError(
                "nearly all descriptors that the gpuload server may have (ulimit -n) are in use: evict some"
            )
        self.records[number] = record
        self._coming.add(number)
        try:
            model.number = number
            await self.store.put(f"model.{number}", self.records[number])
            if self.store.is_there:
                for name, fd in await trio.to_thread.run_sync(lambda: list(self._pieces([model]))):
                    await self._put_piece(name, fd)
            yield
        finally:
            self._coming.discard(number)
            self.sync()

    def begin_lease(self, lease: Lease, fd: int) -> int:
        """A lease is there, which its client may not hear of before `keep_lease`: its number. fd: the connection, the
        caller's.
        """
        number, self.counters.next_lease = self.counters.next_lease, self.counters.next_lease + 1
        self.leases[number] = (lease, fd, False)
        self.sync()
        return number

    async def keep_lease(self, number: int) -> None:
        """Have its connection kept."""
        lease, fd, _ = self.leases[number]
        if await self.store.put(f"lease.{number}", fd, is_watched=True) and number in self.leases:
            self.leases[number] = (lease, fd, True)
            self.sync()

    def end_lease(self, number: int) -> None:
        """Before the connection is closed and the model given up."""
        if self.leases.pop(number, None) is not None and self.is_open:
            self.store.remove(f"lease.{number}")

    def sync(self) -> None:
        """Have the index say what is so now. To be called before anything is done or told that rests on it."""
        if not self.is_open:
            return
        models = self._models()
        there = {model.number for model in models}
        content = {
            "format": FORMAT,
            "version": self.version,
            "is_clean": self.is_clean,
            "devices": self.devices(),
            "counters": asdict(self.counters),
            "since": self.since,
            "models": [[m.number, m.name, m.was, m.is_pinned, m.generation, m.used_at] for m in models],
            "leases": [
                [number, lease.model.number, is_kept, lease.pid, lease.uid]
                for number, (lease, _, is_kept) in self.leases.items()
            ],
        }
        self.index.write(msgpack.packb(content))
        for number in [n for n in self.records if n not in there and n not in self._coming]:
            os.close(self.records.pop(number))
            self.store.remove(f"model.{number}")

    def stop(self, *, is_clean: bool = False) -> None:
        """Say no more. is_clean: nothing is at work any more, so what is said can be believed as it stands."""
        if self.is_open:
            self.is_clean = is_clean
            self.sync()
            self.is_open = False

    def resume(self) -> None:
        """Say what is so, from now on; also after `stop`."""
        self.is_clean, self.is_open = False, True
        self.sync()

    def forget(self) -> None:
        """Leave nothing: the memory of a lost card is only free when nobody keeps it. Waits, some seconds at most; from
        any thread.
        """
        self.is_open = False
        self.index.write(b"")
        self.store.remove_now([name for name, _ in self.everything()])

    def close(self) -> None:
        """Give up our own copies of what is nobody else's."""
        self.index.close()
        close_all(list(self.records.values()))
        self.records.clear()
        self.store.close()

"""The resident process: reserves the arenas, listens, ties every lease to a connection, and leaves nothing behind.

A connection holds at most one lease. The kernel closes it when the client dies, however it dies, and a fork shares it,
so a lease ends exactly when the last process that could use the memory has let go.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import stat
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from gpuload.device.base import Device
from gpuload.errors import (
    AwayError,
    BusyError,
    DeviceError,
    DeviceLostError,
    FitError,
    ServerError,
    first_error,
    one_error,
    to_wire,
)
from gpuload.moving.kept import KeptFiles
from gpuload.moving.pipeline import Limits
from gpuload.moving.staging import Ring
from gpuload.server.catalog import Catalog, Lease
from gpuload.server.client_files import REQUESTS_MAX, ClientFiles, Shares
from gpuload.server.digest_files import DigestFiles
from gpuload.server.digests import SETTLED_S, DigestCache
from gpuload.server.layout import PIECE_BYTES
from gpuload.server.loader import Loader
from gpuload.server.operations import Answer, Operations, Peer
from gpuload.server.ram_tier import RamTier
from gpuload.server.site import Site
from gpuload.wire import Channel, close_all, encode
from mfs.control.ready import ping
from mfs.errors import ConfigError, MfsError
from mfs.manager import notify
from mfs.metrics import door
from mfs.tracing.export import Exporter
from mfs.tracing.spans import Row
from mfs.tracing.tracer import Tracer
from mfs.units import format_size

log = logging.getLogger("gpuload.server")

VERSION = "0.1.0"

STOP_S = 8.0
"""Longest way from a signal to the end. Beyond it a call hangs that cannot be cancelled: on a file, most likely."""

HEALTH_S = 5.0
"""Between two looks whether each card still answers. One that does not must not keep its memory, nor others waiting."""

ACCEPT_PAUSE_S = 0.2
"""After a failed accept, before the next: long enough not to spin, short enough not to be noticed."""

GARBAGE_COUNT = 100_000
"""Objects made until the collector looks for circles: a table is that many that stay, and looking at them again and
again while it is made took as long as making it."""

READERS_COUNT = max(2, min(20, os.cpu_count() or 2))
"""Threads that read and hash. At 10 and 4.3 GB/s each takes 3 GB/s to the device: eighteen fill a link of 55."""


@dataclass(frozen=True)
class ServerConfig:
    """How a server behaves."""

    socket_path: str
    socket_mode: int = 0o600
    """0600: this user alone. With more, others may attach and look, never change."""
    arena_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device name -> the most it may ever take."""
    floor_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device name -> of that, what is taken at start and kept; none: nothing."""
    ram_tier_bytes: int = 0
    """Page-locked host memory for blocks that leave cards, on each NUMA node that has some."""
    linger_s: float = 1.0
    """Memory that became free stays for so long: what is loaded next may want it."""
    connections_max: int = 1024
    """Half of them for users who may only attach: they must not keep the server's own user out."""
    idle_s: float = 300.0
    """A connection without a lease that asks nothing for so long is closed."""
    message_s: float = 30.0
    """Longest time one message may take either way."""
    fds_max: int = 4096
    """Files of one model."""
    backlog: int = 4096
    """Connections that wait to be accepted: a fleet starts at once. The kernel may allow fewer (net.core.somaxconn)."""
    settled_s: float = SETTLED_S
    """See `digests.DigestCache`."""
    digests_folder: str | None = None
    """Where digests outlive the process; None: nowhere. See `digest_files`."""
    limits: Limits = field(default_factory=lambda: Limits(readers_count=READERS_COUNT, buffers_count=READERS_COUNT + 4))
    metrics_addr: str | None = None
    """HOST:PORT to answer Prometheus on; None: nowhere but through the socket."""


async def serve(
    config: ServerConfig,
    open_one: Callable[[str], Device],
    *,
    must: list[Callable[[], object]] | None = None,
    on_lost: Callable[[], object] = lambda: None,
    task_status: trio.TaskStatus[Mapping[str, Site]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. `task_status.started` gets the sites, once the socket listens.

    must: gets what is to be called by somebody who ends the process while this has not returned.
    on_lost: called when a card is lost, which ends this: what still waits for that card may keep it a while.
    Raises: ConfigError, FitError, DeviceError, BusyError, all before it listens; later DeviceLostError alone.
    """
    if not config.arena_bytes:
        raise ConfigError("no device to serve: give one, such as cpu=4G or cuda:0=70G")
    files = DigestFiles(config.digests_folder) if config.digests_folder is not None else None
    digests = DigestCache(files, settled_s=config.settled_s)
    with one_error():
        async with contextlib.AsyncExitStack() as stack:
            sock, lock = stack.enter_context(_listening(config))
            doors = await door.listen(config.metrics_addr) if config.metrics_addr is not None else []
            for one in doors:
                stack.push_async_callback(one.aclose)
            devices: dict[str, Device] = {}
            for name in config.arena_bytes:
                devices[name] = open_one(name)
                stack.callback(devices[name].close)
            _check_fit(devices, config)
            tiers = _open_tiers(stack, devices, config)
            sites = {
                name: await _open_site(stack, name, device, config, tiers.get(device.node))
                for name, device in devices.items()
            }
            for tier in tiers.values():
                tier.is_resident = lambda digest: any(digest in site.catalog.blocks for site in sites.values())
            kept = KeptFiles(list(devices.values()))
            stack.callback(kept.close)
            for site in sites.values():
                if site.leaving is not None:
                    site.leaving.is_held_elsewhere = kept.holds
            tracer = Tracer()
            operations = Operations(Loader(sites, digests, config.limits, kept), kept, tracer, version=VERSION)
            if must is not None:
                # The kernel keeps a process, with all it has, while one of its threads is in a call on a hung file.
                must += [lambda: os.unlink(config.socket_path), lambda: fcntl.flock(lock, fcntl.LOCK_UN)]
                must += [site.arena.close for site in sites.values()]
            sock.listen(config.backlog)
            places, strangers = trio.Semaphore(config.connections_max), trio.Semaphore(config.connections_max // 2)
            shares = Shares(REQUESTS_MAX)
            exporting = _Exporting()
            stack.callback(exporting.close)
            stack.push_async_callback(tracer.flush, exporting.export)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ending_if_lost, on_lost, _look_after, devices)
                for site in sites.values():
                    nursery.start_soon(_ending_if_lost, on_lost, site.tend, config.linger_s)
                    if site.leaving is not None:
                        nursery.start_soon(_ending_if_lost, on_lost, site.leaving.run)
                for tier in tiers.values():
                    nursery.start_soon(_ending_if_lost, on_lost, tier.lock_all)
                if tracer.fault:
                    log.warning("%s", tracer.fault)
                nursery.start_soon(tracer.run, exporting.export)
                if doors:
                    log.info("metrics are at port %d of %s", door.port_of(doors), config.metrics_addr)
                    nursery.start_soon(door.serve, doors, operations.metrics)
                task_status.started(sites)
                listener = trio.socket.from_stdlib_socket(sock)
                while True:
                    try:
                        client, _ = await listener.accept()
                    except OSError as error:  # out of descriptors, say: those who are connected go on
                        log.warning("cannot accept a connection: %s", error)
                        await trio.sleep(ACCEPT_PAUSE_S)
                        continue
                    try:
                        places.acquire_nowait()
                    except trio.WouldBlock:
                        _refuse(client, config.connections_max)
                        continue
                    serving = (_connection, client, operations, config, places, strangers, shares)
                    nursery.start_soon(_ending_if_lost, on_lost, *serving)


async def _look_after(devices: Mapping[str, Device]) -> None:
    """See that every card answers. Raises: DeviceLostError."""
    cards = [device for name, device in devices.items() if not name.startswith("cpu")]
    while cards:
        await trio.sleep(HEALTH_S)
        for card in cards:
            try:
                await trio.to_thread.run_sync(card.memory, abandon_on_cancel=True)
            except DeviceLostError:
                raise
            except DeviceError as error:
                log.warning("%s: %s", card.name, error)


async def _ending_if_lost(on_lost: Callable[[], object], work: Callable[..., Awaitable[None]], *args: object) -> None:
    """`work`, with a word for the log when a card is lost. Only the end of this process frees that card's memory."""
    try:
        await work(*args)
    except DeviceLostError as error:
        log.error("a card is lost, and the weights on it; ending, so that its memory is free again: %s", error)
        on_lost()
        raise


class _Exporting:
    """Sends spans in a thread: a load ends in some ten of them, and no reader waits here."""

    def __init__(self) -> None:
        self._exporter: Exporter | None = None

    async def export(self, rows: list[Row]) -> None:
        await trio.to_thread.run_sync(self._export, rows, abandon_on_cancel=True)

    def _export(self, rows: list[Row]) -> None:
        self._exporter = self._exporter or Exporter("gpuload")
        self._exporter.export(rows)

    def close(self) -> None:
        if self._exporter is not None:
            self._exporter.close()


def _staging_bytes(config: ServerConfig) -> int:
    """Of one device's ring, in host memory."""
    return max(config.limits.buffer_bytes, PIECE_BYTES) * config.limits.buffers_count


def _check_fit(devices: Mapping[str, Device], config: ServerConfig) -> None:
    """See that all floors and rings together fit beside what others hold, before any is taken, and that no arena is
    larger than its device. Raises: FitError.
    """
    staging = _staging_bytes(config) * len(devices) + config.ram_tier_bytes * len(_nodes(devices))
    sums: dict[str, tuple[Device, int, int]] = {}  # all devices in host memory are one sum
    for name, device in devices.items():
        place = "host memory" if name.startswith("cpu") else name
        _, arenas, _ = sums.get(place, (device, 0, 0))
        sums[place] = (device, arenas + config.floor_bytes.get(name, 0), staging if place == "host memory" else 0)
    for place, (device, arenas, rings) in sums.items():
        memory = device.memory()
        most = max(config.arena_bytes[n] for n in devices if place == ("host memory" if n.startswith("cpu") else n))
        if most > memory.total_bytes:
            raise FitError(
                f"an arena of {format_size(most)} does not fit {place}, which has {format_size(memory.total_bytes)};"
                " nothing was taken",
                shortfall_bytes=most - memory.total_bytes,
            )
        others, short = memory.total_bytes - memory.free_bytes, arenas + rings - memory.free_bytes
        if short > 0:
            raise FitError(
                f"this does not fit {place}: floors {format_size(arenas)}, staging and RAM tier {format_size(rings)};"
                f" of its {format_size(memory.total_bytes)} others hold {format_size(others)}, free are"
                f" {format_size(memory.free_bytes)}; short by {format_size(short)}; nothing was taken",
                shortfall_bytes=short,
            )


def _nodes(devices: Mapping[str, Device]) -> dict[int | None, Device]:
    """One card of each NUMA node that has some."""
    return {device.node: device for device in devices.values() if not device.is_direct}


def _open_tiers(
    stack: contextlib.AsyncExitStack, devices: Mapping[str, Device], config: ServerConfig
) -> dict[int | None, RamTier]:
    """One for the cards of each NUMA node; the stack gives their memory back. Raises: ConfigError."""
    if not config.ram_tier_bytes:
        return {}
    cards = _nodes(devices)
    if not cards:
        raise ConfigError("a RAM tier stands behind cards: there is none among the arenas")
    tiers = {node: RamTier(config.ram_tier_bytes, card) for node, card in cards.items()}
    for tier in tiers.values():
        stack.callback(tier.close)
    return tiers


async def _open_site(
    stack: contextlib.AsyncExitStack, name: str, device: Device, config: ServerConfig, tier: RamTier | None
) -> Site:
    """Take the floor and the ring of one device; the stack gives them back."""
    nbytes, floor = config.arena_bytes[name], config.floor_bytes.get(name, 0)
    if floor > nbytes:
        raise ConfigError(f"a floor of {format_size(floor)} on {name}: its arena has {format_size(nbytes)} at most")
    if nbytes < device.granule_bytes:
        unit = format_size(device.granule_bytes)
        raise ConfigError(f"an arena of {format_size(nbytes)} on {name} is less than one granule of {unit}")
    arena = device.reserve_arena(nbytes)
    stack.callback(arena.close)
    floor_count = min(-(-floor // arena.granule_bytes), arena.granules_count)
    if floor_count:
        await trio.to_thread.run_sync(arena.commit, [(0, floor_count)])
    catalog = Catalog(name, arena.granules_count, arena.granule_bytes, present_count=floor_count)
    buffer_bytes, count = max(config.limits.buffer_bytes, PIECE_BYTES), config.limits.buffers_count
    ring = Ring(device, buffer_bytes=buffer_bytes, count=count)
    stack.callback(ring.close)
    await trio.to_thread.run_sync(ring.grow)
    return Site(name, device, arena, catalog, ring, None if device.is_direct else tier, floor_count)


def _refuse(client: trio.socket.SocketType, connections_max: int) -> None:
    """Say why, and close; never waits: an empty socket has room for this."""
    error = BusyError(f"the gpuload server has {connections_max} connections, and leases are some; try later")
    with client, contextlib.suppress(OSError), socket.socket(fileno=os.dup(client.fileno())) as same:
        same.send(encode(to_wire(error)), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


async def _connection(
    sock: trio.socket.SocketType,
    operations: Operations,
    config: ServerConfig,
    places: trio.Semaphore,
    strangers: trio.Semaphore,
    shares: Shares,
) -> None:
    """One client, from accept to its end; gives its place back. No error of a client leaves this function."""
    channel = Channel(sock)
    lease: Lease | None = None
    taken = [places]
    try:
        peer = _peer(sock)
        if not peer.may_change:
            try:
                strangers.acquire_nowait()
            except trio.WouldBlock:
                raise BusyError("too many connections of other users; try later") from None
            taken.append(strangers)
        while True:
            idle_s = float("inf") if lease else config.idle_s
            fds_max = config.fds_max if peer.may_change else 0  # the others have no use for any
            request = await channel.receive(idle_s=idle_s, message_s=config.message_s, fds_max=fds_max)
            if request is None:
                return
            message, count = request
            if lease:
                raise ServerError("this connection holds a lease; ask on another one")
            async with contextlib.AsyncExitStack() as brought:
                files = None
                if count:
                    files = ClientFiles(shares, peer.pid)
                    brought.push_async_callback(files.close)
                    await channel.receive_fds(count, files.fds, message_s=config.message_s)
                answer = await _answered(channel, operations, message, files, peer)
                lease = answer.lease if answer is not None else None
            if answer is None:
                return
            try:
                await channel.send(answer.message, answer.fds, message_s=config.message_s)
            finally:
                close_all(answer.fds)
                if answer.lost is not None:
                    raise answer.lost
    except DeviceLostError:
        raise
    except (ServerError, BusyError) as error:  # AwayError too
        log.info("connection ended: %s", error)
        with contextlib.suppress(AwayError):
            await channel.send(to_wire(error), message_s=1.0)
    except Exception as error:  # what one client brings about must not end the others' weights
        log.error("connection ended, unexpectedly: %s", error, exc_info=error)
    finally:
        sock.close()
        for place in taken:
            place.release()
        if lease:
            lease.end()


async def _answered(
    channel: Channel, operations: Operations, message: dict[str, object], files: ClientFiles | None, peer: Peer
) -> Answer | None:
    """The answer, or the refusal as an answer; None if the client left meanwhile, which cancels what it asked for."""
    answers: list[Answer] = []

    async def work() -> None:
        answers.append(await operations.answer(message, files, peer))
        nursery.cancel_scope.cancel()

    async def watch() -> None:
        await channel.wait_closed()
        if not answers and await channel.is_closed():
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(watch)
    except BaseExceptionGroup as group:
        error = first_error(group)
        if not isinstance(error, Exception):
            raise
        if not isinstance(error, MfsError):
            log.error("unexpected: %s", error, exc_info=error)
        return Answer(to_wire(error), lost=error if isinstance(error, DeviceLostError) else None)
    return answers[0] if answers else None


def _peer(sock: trio.socket.SocketType) -> Peer:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Peer(pid, uid)


@contextlib.contextmanager
def _listening(config: ServerConfig):  # type: ignore[no-untyped-def]
    """The bound socket, and the descriptor of its lock; both gone afterwards, with its name in the file system.

    The lock tells a dead server's socket from a live one's without asking it, and without a race.
    """
    path = config.socket_path
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.stat(folder)
        if found.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{folder} belongs to user {found.st_uid}; the socket would not be safe there")
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise ConfigError(f"{folder} is writable for everybody; the socket would not be safe there")
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot make a socket at {path}: {error.strerror}") from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"a server is already running at {path}") from None
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError(f"{path} is there and is no socket; give another path")
            os.unlink(path)  # a dead server's
        except FileNotFoundError:
            pass
        try:
            sock.bind(path)
            os.chmod(path, config.socket_mode)
        except OSError as error:
            raise ConfigError(f"cannot make a socket at {path}: {error.strerror or error}") from None
        try:
            yield sock, lock
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        sock.close()
        os.close(lock)


def run(config: ServerConfig, open_one: Callable[[str], Device], on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then leave nothing behind. The process is the server's own from here on: it ends
    STOP_S after a signal, or after a card was lost, whatever its threads are at. Raises: as `serve`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a 16 GB model on CUDA is handed out as 2000 descriptors

    gc.set_threshold(GARBAGE_COUNT)
    must: list[Callable[[], object]] = []
    ends: list[threading.Timer] = []

    def end_in_time(status: int) -> None:
        ends.append(threading.Timer(STOP_S, _end, [must, status]))
        ends[-1].daemon = True
        ends[-1].start()

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                serving = partial(serve, must=must, on_lost=partial(end_in_time, 1))
                await nursery.start(serving, config, open_one)
                nursery.start_soon(ping)
                on_ready()
                notify("READY=1\nSTATUS=serving")
                await anext(signals)
                notify("STOPPING=1")
                end_in_time(0)
                nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    finally:
        for end in ends:
            end.cancel()


def _end(must: Sequence[Callable[[], object]], status: int) -> None:
    log.warning("a file or a card does not answer: ended without waiting for it")
    for step in must:
        with contextlib.suppress(Exception):
            step()
    os._exit(status)

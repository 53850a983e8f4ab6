"""The resident process: takes the arenas, listens, and leaves behind what another one can go on with, or nothing.

beginning    door, arenas and clients: anew, or as another server had them (succession, handover)
connections  the clients, each with a lease at most
operations   what they ask; loader moves weights
estate       what outlives this process, kept by a service manager
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import trio

from gpuload.device.base import Device
from gpuload.errors import DeviceError, DeviceLostError, first_error, one_error
from gpuload.moving.kept import KeptFiles
from gpuload.server.beginning import Beginning
from gpuload.server.config import ServerConfig
from gpuload.server.connections import Connections
from gpuload.server.digest_files import DigestFiles
from gpuload.server.digests import DigestCache
from gpuload.server.estate import Store
from gpuload.server.handover import Giver, Heir
from gpuload.server.loader import Loader
from gpuload.server.operations import Operations
from gpuload.server.site import Site
from gpuload.server.succession import Left, from_manager
from mfs.control.ready import ping
from mfs.errors import ConfigError
from mfs.manager import barrier, notify
from mfs.metrics import door
from mfs.tracing.export import Exporter
from mfs.tracing.spans import Row
from mfs.tracing.tracer import Tracer

__all__ = ["ServerConfig", "run", "serve"]

log = logging.getLogger("gpuload.server")

VERSION = "0.1.0"

STOP_S = 8.0
"""Longest way from a signal to the end. Beyond it a call hangs that cannot be cancelled: on a file, most likely."""

HEALTH_S = 5.0
"""Between two looks whether each card still answers. One that does not must not keep its memory, nor others waiting."""

GARBAGE_COUNT = 100_000
"""Objects made until the collector looks for circles: a table is that many that stay, and looking at them again and
again while it is made took as long as making it."""

STOP_DRAIN_S = 0.5
"""What is asked may end so long after a signal, before it is refused."""


async def serve(
    config: ServerConfig,
    open_one: Callable[[str], Device],
    *,
    left: Left | None = None,
    takes_over: bool = False,
    ending: trio.Event | None = None,
    must: list[Callable[[], object]] | None = None,
    on_serving: Callable[[], object] = lambda: None,
    on_lost: Callable[[], object] = lambda: None,
    task_status: trio.TaskStatus[Mapping[str, Site]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, until `ending` is set, or until another server has taken over. `task_status.started` gets
    the sites, once clients are served; `on_serving` is called before.

    left: what a service manager kept of a server that died; what cannot be used of it is given up.
    takes_over: from the server that is at the socket; whatever fails leaves that one as it is.
    ending: what is asked is refused then, and what is kept is said to be in order.
    must: gets what is to be called by somebody who ends the process while this has not returned.
    on_lost: called when a card is lost, which ends this: what still waits for that card may keep it a while.
    Raises: ConfigError, FitError, DeviceError, BusyError, what another server says, all before it serves; later
        DeviceLostError alone.
    """
    if not config.arena_bytes:
        raise ConfigError("no device to serve: give one, such as cpu=4G or cuda:0=70G")
    files = DigestFiles(config.digests_folder) if config.digests_folder is not None else None
    digests = DigestCache(files, settled_s=config.settled_s)
    ending = trio.Event() if ending is None else ending
    with one_error():
        async with contextlib.AsyncExitStack() as stack:
            waits = takes_over or left is not None  # another server may have the address a while
            doors = await door.listen(config.metrics_addr) if config.metrics_addr is not None and not waits else []
            for one in doors:
                stack.push_async_callback(one.aclose)
            stored = list(left.fds) if left is not None else []
            heir = stack.enter_context(contextlib.closing(Heir(config.socket_path, VERSION))) if takes_over else None
            devices: dict[str, Device] = {}
            store = Store(config.store_address)
            beginning = Beginning(stack, config, devices, store, VERSION)
            if heir is None and left is None:
                beginning.open_door()
            for name in config.arena_bytes:
                devices[name] = open_one(name)
                stack.callback(devices[name].close)
            if heir is not None:
                begun = await beginning.take_over(heir)
            else:
                begun = (await beginning.go_on(left) if left is not None else None) or await beginning.anew(left)
            estate, sites, tiers = begun.estate, begun.sites, beginning.tiers()
            for tier in tiers.values():
                tier.is_resident = lambda digest: any(digest in site.catalog.blocks for site in sites.values())
            stack.callback(estate.close)
            kept = KeptFiles(list(devices.values()))
            stack.callback(kept.close)
            for site in sites.values():
                if site.leaving is not None:
                    site.leaving.is_held_elsewhere = kept.holds
            tracer = Tracer()
            operations = Operations(
                Loader(sites, digests, config.limits, estate, kept), kept, tracer, estate, version=VERSION
            )

            def lost(error: DeviceLostError) -> None:
                """Only the end of this process frees that card's memory, and only if nobody keeps it."""
                log.error("a card is lost, and the weights on it; ending, so that its memory is free: %s", error)
                if must is not None:
                    must.append(estate.forget)
                on_lost()

            connections = Connections(config, operations, estate, lost)
            stack.callback(connections.close)
            for client in begun.clients:
                connections.add(*client)
            giver = Giver(estate, connections, begun.door, ending, VERSION, is_kept_on=config.is_kept_on)
            if must is not None:
                # The kernel keeps a process, with all it has, while one of its threads is in a call on a hung file.
                must += [estate.stop, begun.door.shut, *(site.arena.close for site in sites.values())]
            await estate.keep({"socket": begun.door.sock.fileno(), "lock": begun.door.lock}, sites, stored)
            if heir is not None:
                await heir.hold()
                await heir.serves()
                begun.door.is_left = False
            estate.resume()
            exporting = _Exporting()
            stack.callback(exporting.close)
            stack.push_async_callback(tracer.flush, exporting.export)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_look_after, devices, lost)
                    for site in sites.values():
                        nursery.start_soon(_until_lost, lost, begun.settle, site)
                        nursery.start_soon(_until_lost, lost, site.tend, config.linger_s)
                        if site.leaving is not None:
                            nursery.start_soon(_until_lost, lost, site.leaving.run)
                    for tier in tiers.values():
                        nursery.start_soon(_until_lost, lost, tier.lock_all)
                    if tracer.fault:
                        log.warning("%s", tracer.fault)
                    nursery.start_soon(tracer.run, exporting.export)
                    if config.metrics_addr is not None:
                        nursery.start_soon(_show_metrics, config.metrics_addr, doors, operations)
                    nursery.start_soon(connections.run, trio.socket.from_stdlib_socket(begun.door.sock))
                    nursery.start_soon(giver.run)
                    begun.door.sock.listen(config.backlog)  # from here on the kernel names us to who connects
                    on_serving()
                    if heir is not None:
                        heir.close()
                    task_status.started(sites)
                    await ending.wait()
                    if not giver.has_given:
                        await connections.pause(STOP_DRAIN_S, "the gpuload server stops; nothing was changed")
                        estate.stop(is_clean=True)
                        begun.door.is_left = store.is_there and config.is_kept_on
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                if isinstance(first_error(group), DeviceLostError):
                    estate.forget()
                raise


async def _show_metrics(address: str, doors: list[trio.SocketListener], operations: Operations) -> None:
    """doors: where another server of ours cannot be."""
    doors = doors or await door.listen(address, waits=True)
    log.info("metrics are at port %d of %s", door.port_of(doors), address)
    await door.serve(doors, operations.metrics)


async def _look_after(devices: Mapping[str, Device], on_lost: Callable[[DeviceLostError], object]) -> None:
    """See that every card answers. Raises: DeviceLostError."""
    cards = [device for name, device in devices.items() if not name.startswith("cpu")]
    while cards:
        await trio.sleep(HEALTH_S)
        for card in cards:
            try:
                await trio.to_thread.run_sync(card.memory, abandon_on_cancel=True)
            except DeviceLostError as error:
                on_lost(error)
                raise
            except DeviceError as error:
                log.warning("%s: %s", card.name, error)


async def _until_lost(
    on_lost: Callable[[DeviceLostError], object], work: Callable[..., Awaitable[None]], *args: object
) -> None:
    """`work`, with a word at once when a card is lost. Raises: DeviceLostError."""
    try:
        await work(*args)
    except DeviceLostError as error:
        on_lost(error)
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


def run(
    config: ServerConfig,
    open_one: Callable[[str], Device],
    on_ready: Callable[[], None] = lambda: None,
    *,
    takes_over: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, or until another has taken over, and leave nothing behind but what a service
    manager keeps. The process is the server's own from here on: it ends STOP_S after a signal, or after a card was
    lost, whatever its threads are at. Raises: as `serve`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each piece of a card that somebody attached to

    gc.set_threshold(GARBAGE_COUNT)
    must: list[Callable[[], object]] = []
    ends: list[threading.Timer] = []
    left = from_manager()

    def end_in_time(status: int) -> None:
        ends.append(threading.Timer(STOP_S, _end, [must, status]))
        ends[-1].daemon = True
        ends[-1].start()

    def on_serving() -> None:
        on_ready()
        notify("READY=1\nSTATUS=serving" + (f"\nMAINPID={os.getpid()}" if takes_over else ""))
        if takes_over:
            barrier()  # the one that was here may end: the service is us by now

    async def main() -> None:
        ending = trio.Event()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:

                async def end_by_signal() -> None:
                    await anext(signals)
                    notify("STOPPING=1")
                    end_in_time(0)
                    ending.set()

                nursery.start_soon(end_by_signal)
                nursery.start_soon(ping)
                await serve(
                    config,
                    open_one,
                    left=left,
                    takes_over=takes_over and left is None,  # once it was taken over, a crash is a crash
                    ending=ending,
                    must=must,
                    on_serving=on_serving,
                    on_lost=partial(end_in_time, 1),
                )
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

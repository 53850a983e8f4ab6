"""The daemon process: `python -m mfs.daemon`, started by `mfs mount`. See `control.ready` for how they talk."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from mfs.config import MountConfig, check_cache_dir, check_mountpoint, check_paths
from mfs.control import leftovers, lending_door, mountinfo, runtime, server
from mfs.control.holding import HolderLink, listen_to_signals
from mfs.control.ready import DaemonStart, ping
from mfs.errors import MfsError, StoreError
from mfs.handover import Giver, Heir, door_path
from mfs.lending import RamLender
from mfs.logs import set_up_logging
from mfs.manager import notify
from mfs.metrics import door
from mfs.mount import Mount
from mfs.page import site
from mfs.service import Service
from mfs.shown import mask_url
from mfs.succession import Remains
from mfs.units import parse_local_address

logger = logging.getLogger(__name__)
Signals = AsyncIterator[int]

_OOM_SCORE = "-500"  # a killed daemon is SIGBUS for every reader that maps a file; others should go first
_SAY_AFTER_S, _LOOK_S = 2.0, 0.25
_BORROWERS_S = 60.0
"""How long a daemon that handed its mount over waits for those who borrowed of its RAM."""


def main() -> NoReturn:
    """Serve one mount until it is unmounted or told to stop. Exit status 0, or 1 if it never came or we failed."""
    start = DaemonStart.receive(sys.argv[1:])
    try:
        config = MountConfig.from_json(start.config_json)
        _set_up_logging(config)
        trio.run(_run, config, start)
    except BaseException as error:
        cause = _cause(error)
        if not isinstance(cause, MfsError):
            logger.error("the daemon failed", exc_info=error)
        else:
            logger.error("%s", cause)
        start.failed(cause)
        _end(1)
    _end(0)


def _end(status: int) -> NoReturn:
    """End at once. All is closed, and taking the interpreter apart would cost whoever unmounts 30 ms."""
    logging.shutdown()
    os._exit(status)


async def _run(config: MountConfig, start: DaemonStart) -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # only root may lower it
        file.write(_OOM_SCORE)
    # mountinfo, records and sockets know real paths only
    config = replace(config, mountpoint=Path(mountinfo.real_mountpoint(str(config.mountpoint))))
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        listen_to_signals()
        begin = _succeed if start.held else _take_over if start.handover else _mount
        await begin(config, start, signals)


async def _succeed(config: MountConfig, start: DaemonStart, signals: Signals) -> None:
    """Go on for a daemon that was killed. What fails here is tried again by the holder."""
    remains = Remains(start.held)
    mount = Mount(config, identities=remains.identities)
    record = _record(mount, start.holder)
    stops = list[trio.CancelScope]()
    with _forgotten_after(mount, remains.lock), _announced(mount, record) as socket_path:
        async with trio.open_nursery() as nursery:
            stops.append(nursery.cancel_scope)
            nursery.start_soon(_stop_on_signal, signals, stops)
            _keep(mount, start.holder, remains.lock)
            async with mount.serving(remains) as ended:
                stops.append(ended)
                await _answer(mount, ended, start, socket_path, remains.lock, lambda: None)
            nursery.cancel_scope.cancel()
        if len(stops) == 1:
            start.holder.end()
            await trio.to_thread.run_sync(mount.give_up)


async def _take_over(config: MountConfig, start: DaemonStart, signals: Signals) -> None:
    with Heir(door_path(runtime.socket_path(str(config.mountpoint)))) as heir:
        heir.check_same(config)
        heir.main_pid = start.holder.pid or os.getpid()
        mount = Mount(config, coming_bytes=heir.coming_bytes)
        record = _record(mount, start.holder)
        await trio.to_thread.run_sync(check_cache_dir, config)
        async with AsyncExitStack() as stack:
            mount.on_connected = partial(heir.take_hold, mount, start.holder)
            mount.on_closing, mount.is_held = start.holder.end, lambda: start.holder.is_there
            with runtime.room_held():  # once the mount is ours there is no way back
                ended = await stack.enter_async_context(mount.serving(heir))
            with _forgotten_after(mount, heir.lock), _announced(mount, record) as socket_path:
                async with trio.open_nursery() as nursery:  # not before: a mount half handed over would be lost
                    nursery.start_soon(_stop_on_signal, signals, [ended])
                    await _answer(mount, ended, start, socket_path, heir.lock, heir.close)
                    nursery.cancel_scope.cancel()


async def _mount(config: MountConfig, start: DaemonStart, signals: Signals) -> None:
    mount = Mount(config)
    record = _record(mount, start.holder)
    stops = list[trio.CancelScope]()
    with runtime.locked(record.mountpoint) as lock, _forgotten_after(mount, lock):
        await trio.to_thread.run_sync(leftovers.sweep)
        dead = await trio.to_thread.run_sync(leftovers.dead_daemon, record.mountpoint)
        if dead is not None:
            mount.make_way = partial(_replace, mount, dead)
        with _announced(mount, record) as socket_path:
            async with trio.open_nursery() as nursery:
                stops.append(nursery.cancel_scope)
                nursery.start_soon(_stop_on_signal, signals, stops)
                _keep(mount, start.holder, lock)
                waiting = await nursery.start(_tell_waiting, mount, start.waiting)
                # The shell command looks too, before it starts us; a service manager that starts us need not.
                await trio.to_thread.run_sync(partial(check_paths, config, is_replacing=dead is not None))
                listeners = await door.listen(config.metrics_addr) if config.metrics_addr is not None else None
                async with mount.serving() as ended:
                    waiting.cancel()
                    stops.append(ended)
                    await _answer(mount, ended, start, socket_path, lock, lambda: None, listeners)
                nursery.cancel_scope.cancel()
            if len(stops) == 1:
                raise StoreError("told to stop before the mount could be used")


def _keep(mount: Mount, holder: HolderLink, lock: int) -> None:
    """Have the mount held from when it serves until it ends; where nobody could answer in our place, it is not."""

    def hold() -> None:
        if mount.session.agreement.can_resend:
            holder.hold(mount.session.device, lock, mount.operations.journal.fd)

    mount.on_closing, mount.on_connected = holder.end, hold
    mount.is_held = lambda: holder.is_there and mount.session.agreement.can_resend


def _forgotten_after(mount: Mount, lock: int) -> AbstractContextManager[None]:
    config = mount.config
    return leftovers.forgotten_after(str(config.mountpoint), lock, lambda: mount.is_ours, config.log_file)


def _announced(mount: Mount, record: runtime.Record) -> AbstractContextManager[Path]:
    return runtime.announced(record, lambda: not mount.is_ours)


def _replace(mount: Mount, dead: str) -> None:
    """Take a dead mount away, now that we can stand in its place. dead: its daemon, in words. Raises: MfsError."""
    place = mount.config.mountpoint
    leftovers.take_dead_away(str(place))
    check_mountpoint(place)
    mount.warnings.append(f"replaced a stale mount at {place}: its {dead} had ended without unmounting")


async def _tell_waiting(
    mount: Mount, tell: Callable[[str], None], *, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    """Tell whoever mounts what is waited for, once a source and only if it takes long; until the scope is cancelled."""
    told: set[int] = set()
    with trio.CancelScope() as scope:
        task_status.started(scope)
        while True:
            await trio.sleep(_LOOK_S)
            for source, asked in mount.listings.asked.items():
                if source in told or asked.is_answered or time.monotonic() - asked.since_s < _SAY_AFTER_S:
                    continue
                told.add(source)
                origin = mount.config.sources[source]
                why = f"{asked.fault or 'no answer yet'}; asked until {asked.until}"
                said = str(MfsError(f"waiting for source {origin.name or origin.url}: {why}"))
                logger.warning("%s", said)
                tell(said)


def _record(mount: Mount, holder: HolderLink) -> runtime.Record:
    config = mount.config
    return runtime.record_of_self(
        str(config.mountpoint),
        cache_dir=str(config.cache_dir) if config.cache_dir else None,
        log_file=str(config.log_file) if config.log_file else None,
        started_at=mount.started_at,
        sources=tuple(mask_url(source.url) for source in config.sources),
        holder_pid=holder.pid,
    )


async def _answer(
    mount: Mount, ended: trio.CancelScope, start: DaemonStart, socket_path: Path, lock: int,
    on_registered: Callable[[], None], listeners: list[trio.SocketListener] | None = None,
) -> None:  # fmt: skip
    """Be there for the shell, borrowers and the next daemon, until the mount is taken away or handed over.

    listeners: on the address for metrics; None: to be had from the daemon before us.
    """
    mountpoint = mount.config.mountpoint
    async with trio.open_nursery() as nursery:
        service = Service(mount, ended.cancel, nursery)
        lender = RamLender(mount)
        giver = Giver(mount, lock, dict(os.environ), start.holder)
        await nursery.start(giver.serve, door_path(socket_path))
        await nursery.start(lending_door.serve, lender, lending_door.door_path(socket_path))
        await nursery.start(server.serve, service, socket_path)  # last: who is answered there finds the others
        metrics = trio.CancelScope()
        if mount.config.metrics_addr is not None:
            nursery.start_soon(_serve_metrics, mount, service, listeners, metrics)
        if mount.config.page_addr is not None:
            address = parse_local_address(mount.config.page_addr)
            await nursery.start(
                site.serve, service, address, socket_path, lambda: not mount.is_ours, mount.note_page_fault
            )
        nursery.start_soon(_end_after_handover, mount, giver, lender, metrics, ended)
        nursery.start_soon(_watch_holder, mount, start.holder)
        nursery.start_soon(ping)
        on_registered()
        gc.freeze()  # as workers do
        start.ready(mount.all_warnings)
        logger.info("%s is served", mountpoint)
        with ended:
            await trio.sleep_forever()
        if mount.session.is_ours:
            notify("STOPPING=1")
            logger.info("%s is being unmounted", mountpoint)
        nursery.cancel_scope.cancel()


async def _watch_holder(mount: Mount, holder: HolderLink) -> None:
    """Say so once nobody would start a successor."""
    if not mount.session.agreement.can_resend:
        mount.unheld = f"Linux {os.uname().release} cannot ask again what it did not answer (6.9 or later can)"
    if holder.socket is None:
        mount.unheld = mount.unheld or "nobody holds it"
        return
    await trio.lowlevel.wait_readable(holder.socket)
    mount.unheld = mount.unheld or f"the process that held it (pid {holder.pid}) has ended"
    holder.lost()
    logger.warning("the holder of %s has ended: the mount would not outlive this daemon", mount.config.mountpoint)


async def _serve_metrics(
    mount: Mount, service: Service, listeners: list[trio.SocketListener] | None, scope: trio.CancelScope
) -> None:
    """Answer Prometheus, as soon as the address is ours, until the mount is another daemon's."""
    address = mount.config.metrics_addr
    assert address is not None
    with scope:
        if listeners is None:
            listeners = await door.listen(address, waits=True)
        mount.metrics_at = f"{address.rpartition(':')[0]}:{door.port_of(listeners)}"
        logger.info("metrics are at http://%s/metrics", mount.metrics_at)
        await door.serve(listeners, service.metrics)


async def _end_after_handover(
    mount: Mount, giver: Giver, lender: RamLender, metrics: trio.CancelScope, ended: trio.CancelScope
) -> None:
    """Once another daemon serves the mount, only who has borrowed of ours still needs us."""
    await giver.gone.wait()
    metrics.cancel()  # the next daemon waits for the address
    mount.cache.drop_idle()
    with trio.move_on_after(_BORROWERS_S):
        await lender.wait_unused()
    ended.cancel()


async def _stop_on_signal(signals: Signals, stops: Sequence[trio.CancelScope]) -> None:
    """stops: the last of them ends what goes on at the moment: the start, then the mount."""
    async for number in signals:
        logger.info("%s received", signal.Signals(number).name)
        stops[-1].cancel()


def _set_up_logging(config: MountConfig) -> None:
    """Log to standard error, which becomes the log file: workers and libfuse write there too."""
    if config.log_file is not None:
        fd = os.open(config.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(fd, 2)
        os.dup2(fd, 1)
        os.close(fd)
    set_up_logging(config.log_level.upper(), "mfs", config.log_format)


def _cause(error: BaseException) -> BaseException:
    """The one error behind groups of one, as trio wraps them; several become one line."""
    while isinstance(error, BaseExceptionGroup):
        ours = [e for e in error.exceptions if isinstance(e, MfsError)]
        if len(error.exceptions) > 1 and not ours:
            return StoreError("; ".join(str(e) for e in error.exceptions))
        error = ours[0] if ours else error.exceptions[0]
    return error


if __name__ == "__main__":
    main()

"""The daemon process: `python -m mfs.daemon`, started by `mfs mount`. See `control.ready` for how they talk."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import trio

from mfs.config import MountConfig, check_cache_dir, check_paths, mask_url
from mfs.control import mountinfo, runtime, server, slots
from mfs.control.ready import DaemonStart, notify
from mfs.control.slots_client import slots_path
from mfs.errors import MfsError, StoreError
from mfs.fuse.session import reads_that_end
from mfs.handover import Giver, Heir, door_path
from mfs.lending import SlotLender
from mfs.mount import Mount
from mfs.service import Service

logger = logging.getLogger(__name__)

_OOM_SCORE = "-500"  # a killed daemon is SIGBUS for every reader that maps a file; others should go first
_BORROWERS_S = 60.0
"""How long a daemon that handed its mount over waits for those who borrowed its slots."""


def main() -> None:
    """Serve one mount until it is unmounted or told to stop. Exit status 0, or 1 if it never came about."""
    start = DaemonStart.receive(sys.argv[1:])
    try:
        config = MountConfig.from_json(start.config_json)
        _set_up_logging(config)
        with reads_that_end():
            trio.run(_run, config, start)
    except BaseException as error:
        cause = _cause(error)
        if not isinstance(cause, MfsError):
            logger.error("the daemon failed", exc_info=error)
        else:
            logger.error("%s", cause)
        start.failed(cause)
        sys.exit(1)


async def _run(config: MountConfig, start: DaemonStart) -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # only root may lower it
        file.write(_OOM_SCORE)
    # mountinfo, records and sockets know real paths only
    config = replace(config, mountpoint=Path(mountinfo.real_mountpoint(str(config.mountpoint))))
    mount = Mount(config)
    record = runtime.record_of_self(
        str(config.mountpoint),
        cache_dir=str(config.cache_dir) if config.cache_dir else None,
        log_file=str(config.log_file) if config.log_file else None,
        started_at=mount.started_at,
        sources=tuple(mask_url(source.url) for source in config.sources),
    )
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        if start.handover:
            with Heir(door_path(runtime.socket_path(record.mountpoint))) as heir:
                heir.check_same(config)
                await trio.to_thread.run_sync(check_cache_dir, config)
                async with AsyncExitStack() as stack:
                    with runtime.room_held():  # once the mount is ours there is no way back
                        ended = await stack.enter_async_context(mount.serving(heir))
                    with runtime.announced(record) as socket_path:
                        await _answer(mount, ended, signals, start, socket_path, heir.lock, heir.close)
        else:
            with runtime.locked(record.mountpoint) as lock, runtime.announced(record) as socket_path:
                # The shell command looks too, before it starts us; a service manager that starts us need not.
                await trio.to_thread.run_sync(check_paths, config)
                async with mount.serving() as ended:
                    await _answer(mount, ended, signals, start, socket_path, lock, lambda: None)


async def _answer(
    mount: Mount, ended: trio.CancelScope, signals: object, start: DaemonStart, socket_path: Path, lock: int,
    on_registered: Callable[[], None],
) -> None:  # fmt: skip
    """Be there for the shell, borrowers and the next daemon, until the mount is taken away or handed over."""
    mountpoint = mount.config.mountpoint
    async with trio.open_nursery() as nursery:
        service = Service(mount, ended.cancel, nursery)
        lender = SlotLender(mount)
        giver = Giver(mount, lock, dict(os.environ))
        await nursery.start(giver.serve, door_path(socket_path))
        await nursery.start(slots.serve, lender, slots_path(socket_path))
        await nursery.start(server.serve, service, socket_path)  # last: who is answered there finds the others
        nursery.start_soon(_stop_on_signal, signals, ended)
        nursery.start_soon(_end_after_handover, giver, lender, ended)
        on_registered()
        start.ready(mount.warnings)
        logger.info("%s is served", mountpoint)
        with ended:
            await trio.sleep_forever()
        if mount.session.is_ours:
            notify("STOPPING=1")
            logger.info("%s is being unmounted", mountpoint)
        nursery.cancel_scope.cancel()


async def _end_after_handover(giver: Giver, lender: SlotLender, ended: trio.CancelScope) -> None:
    """Once another daemon serves the mount, only who has borrowed slots of ours still needs us."""
    await giver.gone.wait()
    with trio.move_on_after(_BORROWERS_S):
        await lender.wait_unused()
    ended.cancel()


async def _stop_on_signal(signals: object, ended: trio.CancelScope) -> None:
    async for number in signals:  # type: ignore[attr-defined]
        logger.info("%s received", signal.Signals(number).name)
        ended.cancel()


def _set_up_logging(config: MountConfig) -> None:
    """Log to standard error, which becomes the log file: workers and libfuse write there too."""
    if config.log_file is not None:
        fd = os.open(config.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        os.dup2(fd, 2)
        os.dup2(fd, 1)
        os.close(fd)
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr,
        format="%(asctime)s %(levelname)s mfs[%(process)d] %(name)s: %(message)s",
    )  # fmt: skip


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

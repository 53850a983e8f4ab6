"""How a daemon is started and says that it is ready: one command line, one line of JSON.

    python -m mfs.holder --config-fd N [--ready-fd M] [--handover]

The configuration (`MountConfig.to_json`) is read from descriptor N until its end. Once the tree can be used, or
cannot be, the daemon writes one line to M, for the `mfs mount` that waits: {"ready": true, "warnings": [...]} or
{"error": {"type": ..., "message": ...}}; before it, if that takes long, {"waiting": "for what"}; and READY=1 to the
service manager where NOTIFY_SOCKET names one. With --handover it takes the mount from the daemon that serves it.

With WATCHDOG_USEC the daemon says WATCHDOG=1 three times as often, from the task loop that answers the kernel: once
that hangs, nobody does.

The holder (`mfs.holder`) starts the daemon, `mfs.daemon`, with the same arguments and --holder-fd; the successor of one
that was killed with --successor, the numbers of the descriptors that it was held by. A daemon may also stand alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import suppress

import trio

from mfs.control.holding import HolderLink
from mfs.errors import MfsError, to_wire
from mfs.manager import notify

_CONFIG_BYTES_MAX = 1 << 22


def daemon_arguments(*, config_fd: int, ready_fd: int | None, handover: bool = False) -> list[str]:
    """The arguments of `python -m mfs.holder`, or of the daemon itself; `DaemonStart.receive` reads them."""
    ready = [] if ready_fd is None else ["--ready-fd", str(ready_fd)]
    return ["--config-fd", str(config_fd), *ready, *(["--handover"] if handover else [])]


class DaemonStart:
    """The daemon's side of its own start: what it was told, and to whom it must answer, once."""

    def __init__(
        self, config_json: str, ready_fd: int | None, *, handover: bool = False, holder_fd: int | None = None,
        held: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.config_json = config_json
        """For `MountConfig.from_json`."""
        self.handover = handover
        """Whether another daemon serves the mount, and gives it."""
        self.holder = HolderLink(holder_fd)
        self.held = held
        """/dev/fuse, the mount's lock and its journal, of a daemon that was killed; empty if there was none."""
        self._ready_fd = ready_fd

    @classmethod
    def receive(cls, argv: Sequence[str]) -> DaemonStart:
        """Read the arguments (without the program's name) and the configuration behind them."""
        parser = argparse.ArgumentParser(prog="mfs.daemon", description="Started by 'mfs mount', not by hand.")
        parser.add_argument("--config-fd", type=int, required=True)
        parser.add_argument("--ready-fd", type=int)
        parser.add_argument("--handover", action="store_true")
        parser.add_argument("--holder-fd", type=int)
        parser.add_argument("--successor", default="")
        options = parser.parse_args(argv)
        held = [int(fd) for fd in options.successor.split(",") if fd]
        for fd in (options.ready_fd, options.holder_fd, *held):
            if fd is not None:
                os.set_inheritable(fd, False)  # a worker holding it open would hide our death
        with open(options.config_fd, "rb") as file:
            return cls(
                file.read(_CONFIG_BYTES_MAX).decode(), options.ready_fd, handover=options.handover,
                holder_fd=options.holder_fd, held=held,
            )  # fmt: skip

    def waiting(self, text: str) -> None:
        """Say what keeps the tree from being used yet. Never raises; may be called before `ready` or `failed` is."""
        if self._ready_fd is not None:
            with suppress(OSError):  # whoever started us has gone
                os.write(self._ready_fd, json.dumps({"waiting": text}).encode() + b"\n")
        notify(f"STATUS={text}")

    def ready(self, warnings: Sequence[str] = ()) -> None:
        """Say that the tree can be used. Never raises: whoever waited may be gone. Blocks for a second at most."""
        self._answer({"ready": True, "warnings": list(warnings)})
        notify("READY=1\nSTATUS=serving")

    def failed(self, error: BaseException) -> None:
        """Say that the mount did not come about, and why. Never raises."""
        name, message = to_wire(error)
        self._answer({"error": {"type": name, "message": message}})
        notify(f"STATUS=failed: {MfsError(message)}")

    def _answer(self, line: dict[str, object]) -> None:
        if self._ready_fd is None:
            return
        fd, self._ready_fd = self._ready_fd, None
        try:
            os.write(fd, json.dumps(line).encode() + b"\n")
        except OSError:  # whoever started us has gone; the mount is no worse for it
            pass
        finally:
            os.close(fd)


async def ping() -> None:
    """Tell the service manager's watchdog that this loop runs, for as long as it does; returns if there is none.

    WATCHDOG_PID is not asked: it is the process that the manager started, ours is its child, and after a handover it is
    another's. Who starts a daemon in the background takes the variable away (`mfs.launch`).
    """
    try:
        interval_s = int(os.environ.get("WATCHDOG_USEC", "")) / 3e6
    except ValueError:
        return
    if interval_s <= 0:
        return
    while True:
        await trio.to_thread.run_sync(notify, "WATCHDOG=1")
        await trio.sleep(interval_s)

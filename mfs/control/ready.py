"""How a daemon is started and says that it is ready: one command line, one line of JSON.

    python -m mfs.holder --config-fd N [--ready-fd M] [--handover]

The configuration (`MountConfig.to_json`) is read from descriptor N until its end. Once the tree can be used, or
cannot be, the daemon writes one line to M, for the `mfs mount` that waits: {"ready": true, "warnings": [...]} or
{"error": {"type": ..., "message": ...}}; before it, if that takes long, {"waiting": "for what"}; and READY=1 to the
service manager where NOTIFY_SOCKET names one. With --handover it takes the mount from the daemon that serves it.

The holder (`mfs.holder`) starts the daemon, `mfs.daemon`, with the same arguments and --holder-fd; the successor of one
that was killed with --successor, the numbers of the descriptors that it was held by. A daemon may also stand alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

from mfs.control.holding import HolderLink
from mfs.errors import MfsError, to_wire

_NOTIFY_TIMEOUT_S = 1.0  # a service manager that does not read must not keep the mount from serving
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


def notify(message: str) -> bool:
    """Tell the service manager named by NOTIFY_SOCKET. Returns whether there is one and it took the message.

    Source: sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_NOTIFY_TIMEOUT_S)
        try:
            sock.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            return False
    return True

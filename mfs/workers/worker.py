"""One worker process as the daemon sees it: its start, the socket between us, its end. Knows nothing of queues."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from mfs.workers.frames import Decoder, Frame, encode

if TYPE_CHECKING:
    from mfs.workers.pool import Job

logger = logging.getLogger(__name__)

_SEND_BUFFER_BYTES = 4 << 20


class Worker:
    """A process and what it is doing. Belongs to the trio thread once it is made."""

    def __init__(self, number: int, slots_fd: int, setup: Frame) -> None:
        """Start the process and tell it `setup`. May block for milliseconds. Raises: OSError if none can be started."""
        self.number = number
        self.jobs: dict[int, Job] = {}
        """What the pool has given it, by serial."""
        self.ready = False
        self._unsent = bytearray()
        """Frames its socket had no room for yet; bounded by what the lanes may have in flight."""
        self._sending = trio.Event()
        """Set when `_unsent` gets its first byte."""
        self._channel, theirs = socket.socketpair()
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(self._channel.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mfs.workers.process", str(theirs.fileno()), str(slots_fd)],
                pass_fds=(theirs.fileno(), slots_fd),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            on_failure.pop_all()
        with contextlib.suppress(OSError):  # it may have died already; `_receive` will hear of it
            self._channel.sendall(encode(setup))
        self._channel.setblocking(False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """How it ended, as `subprocess` says it; None while it runs."""
        return self._process.returncode

    def send(self, frame: Frame) -> None:
        """Send a frame, at once or as soon as the socket has room; never waits."""
        data = encode(frame)
        sent = 0
        if not self._unsent:
            try:
                sent = self._channel.send(data)
            except OSError:  # full, or dead: then `_receive` hears of it
                pass
        if sent < len(data):
            self._unsent += data[sent:]
            self._sending.set()

    async def run(self, take: Callable[[Frame], None]) -> None:
        """Hand each of its answers to `take`, until it ends or sends what is none."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest)
            await self._receive(take)
            nursery.cancel_scope.cancel()

    def kill(self) -> None:
        """End the process; `run` returns then."""
        self._process.kill()

    async def end(self) -> None:
        """Kill it and wait until it is gone, whoever is cancelled: only then may its slots be used again."""
        self._process.kill()
        self._channel.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._process.wait)

    async def _receive(self, take: Callable[[Frame], None]) -> None:
        decoder = Decoder()
        while True:
            await trio.lowlevel.wait_readable(self._channel)
            try:
                data = self._channel.recv(1 << 18)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            try:
                frames = list(decoder.feed(data))
            except ValueError as error:  # too long, or no frame
                logger.error("worker %d sends what is no answer (%s); killing it", self.pid, error)
                return
            for frame in frames:
                take(frame)

    async def _send_rest(self) -> None:
        """Send what did not fit into the socket at once. A worker that never takes it dies of its operations'
        deadlines.
        """
        while True:
            await self._sending.wait()
            await trio.lowlevel.wait_writable(self._channel)
            try:
                del self._unsent[: self._channel.send(self._unsent)]
            except BlockingIOError:
                continue
            except OSError:
                return
            if not self._unsent:
                self._sending = trio.Event()

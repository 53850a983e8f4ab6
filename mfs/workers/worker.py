"""One worker process as the daemon sees it: its start, the socket between us, its end. Knows nothing of queues."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable

import trio

from mfs import children
from mfs.cache.pieces import Piece
from mfs.workers.frames import Decoder, Frame, encode
from mfs.workers.job import Job

logger = logging.getLogger(__name__)

_SEND_BUFFER_BYTES = 4 << 20
_TURN_S = 0.005  # of taking answers without giving way to readers


class Worker:
    """A process and what it is doing. Belongs to the trio thread once it is made."""

    def __init__(self, number: int, setup: Frame) -> None:
        """Start the process and tell it `setup`. May block for milliseconds. Raises: OSError if none can be started."""
        self.number = number
        self.jobs: dict[int, Job] = {}
        """What the pool has given it, by serial."""
        self.ready = False
        self.tier_fault: str | None = None
        """Why it serves without the SSD tier, as it says."""
        self.silent_since_s: float | None = None
        """time.monotonic() when it was asked whether it is there, until it says anything."""
        self._unsent: deque[tuple[bytes, int]] = deque()
        """Frames its socket had no room for yet, each with the descriptor that goes with it, ours to close, or -1;
        bounded by what the lanes may have in flight."""
        self._has_common = False
        """It was sent the RAM tier's common file."""
        self._has_device = False
        """It was sent what replies are written to."""
        self._sending = trio.Event()
        """Set when `_unsent` gets its first byte."""
        self._channel, theirs = socket.socketpair()
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(self._channel.close)
            self._process = subprocess.Popen(
                children.python("-m", "mfs.workers.process", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                cwd=children.CWD,
                env=children.environment() | {"PYTHONUNBUFFERED": "1"},
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
        """Send a frame, and the descriptor of its `piece` unless it has that file; at once or as soon as the socket has
        room; never waits.
        """
        piece: Piece | None = frame.get("piece")
        if piece is not None and piece.stays and self._has_common:
            piece = piece._replace(fd=-1)
            frame = {**frame, "piece": piece}
        fd = piece.fd if piece is not None else -1
        self._has_common = self._has_common or (piece is not None and piece.stays)
        self._send_soon(encode(frame), fd)

    def give_device(self, fd: int) -> None:
        """Let it write replies to that from the next order on."""
        if not self._has_device:
            self._has_device = True
            self._send_soon(encode({"op": "device", "is_there": True}), fd)

    def take_device_back(self) -> None:
        """Have it close what it was given by `give_device`."""
        if self._has_device:
            self._has_device = False
            self._send_soon(encode({"op": "device", "is_there": False}), -1)

    def _send_soon(self, data: bytes, fd: int) -> None:
        sent = 0
        if not self._unsent:
            with contextlib.suppress(OSError):  # full, or dead: then `_receive` hears of it
                sent = self._send(data, fd)
        if sent < len(data):
            self._unsent.append((data[sent:], os.dup(fd) if fd >= 0 and not sent else -1))
            self._sending.set()

    def _send(self, data: bytes, fd: int) -> int:
        """The descriptor goes with the first byte. Raises: OSError."""
        return socket.send_fds(self._channel, [data], [fd]) if fd >= 0 else self._channel.send(data)

    def is_silent(self, now_s: float, limit_s: float) -> bool:
        """Whether it has not answered for that long; asks it, if it has something to do."""
        if not self.ready or not self.jobs:
            self.silent_since_s = None
        elif self.silent_since_s is None:
            self.silent_since_s = now_s
            self.send({"op": "ping"})
        return self.silent_since_s is not None and now_s - self.silent_since_s > limit_s

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
        """Kill it and wait until it is gone, whoever is cancelled: only then may what it fills be used again."""
        self._process.kill()
        self._channel.close()
        for _, fd in self._unsent:
            if fd >= 0:
                os.close(fd)
        self._unsent.clear()
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
            turn_ends = time.monotonic() + _TURN_S
            for frame in frames:  # thousands, where each is the page of a small directory
                take(frame)
                if time.monotonic() > turn_ends:
                    await trio.lowlevel.checkpoint()
                    turn_ends = time.monotonic() + _TURN_S

    async def _send_rest(self) -> None:
        """Send what did not fit into the socket at once. A worker that never takes it dies of its operations'
        deadlines.
        """
        while True:
            await self._sending.wait()
            await trio.lowlevel.wait_writable(self._channel)
            data, fd = self._unsent[0]
            try:
                sent = self._send(data, fd)
            except BlockingIOError:
                continue
            except OSError:
                return
            if fd >= 0:
                os.close(fd)
            self._unsent[0] = data[sent:], -1
            if not self._unsent[0][0]:
                self._unsent.popleft()
            if not self._unsent:
                self._sending = trio.Event()

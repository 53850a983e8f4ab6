"""The daemon's side of `process`: one process beside it that exports traces, started when there is something to send.

Whatever is wrong with it costs the batch: it is killed when it does not answer, and started again later.
"""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import time

import msgpack
import trio

from mfs import children
from mfs.errors import StoreError
from mfs.tracing.process import FRAME_BYTES_MAX
from mfs.tracing.spans import Row

ANSWER_S = 30.0
"""For one batch: three times what the exporter gives a collector."""
AGAIN_S = 30.0
"""Between two starts."""
_LAST_S = 1.0
"""For it to end by itself."""


class Beside:
    """A process that exports, while it is needed. Belongs to the trio thread; one call at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: trio.socket.SocketType
        self._unsent = bytearray()
        self._owed = 0
        """Batches, sent or still in `_unsent`, that it has not answered."""
        self._answers: msgpack.Unpacker
        self._started_s = -math.inf

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def send(self, rows: list[Row]) -> None:
        """Have rows exported. Raises: StoreError if they were not.

        Cancellation: they may be on their way all the same, and the next call sees to that first.
        """
        try:
            with trio.fail_after(ANSWER_S):
                if self._process is None:
                    await self._start()
                self._unsent += msgpack.packb(rows)
                self._owed += 1
                await self._exchange()
        except trio.TooSlowError:
            await self._end(kill=True)
            raise StoreError(f"the process that exports traces did not answer within {ANSWER_S:.0f} s") from None
        except (OSError, ValueError, msgpack.UnpackException) as error:  # it is gone, or says what is no answer
            await self._end(kill=True)
            raise StoreError(f"the process that exports traces fails: {error}") from error

    async def _start(self) -> None:
        left_s = self._started_s + AGAIN_S - time.monotonic()
        if left_s > 0:
            raise StoreError(f"the process that exports traces has ended; another is started in {left_s:.0f} s")
        self._started_s = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            command = children.python("-m", "mfs.tracing.process", str(theirs.fileno()), str(math.ceil(ANSWER_S)))
            self._process = await trio.to_thread.run_sync(_popen, command, theirs.fileno())
            on_failure.pop_all()
        self._channel = trio.socket.from_stdlib_socket(ours)
        self._answers = msgpack.Unpacker(max_buffer_size=FRAME_BYTES_MAX)
        self._unsent.clear()
        self._owed = 0

    async def _exchange(self) -> None:
        """Send what is left, and take the answers to all of it. Raises: StoreError as the last of them says."""
        while self._unsent:
            sent = await self._channel.send(self._unsent)  # so many, or cancelled
            del self._unsent[:sent]
        said = ""
        while self._owed:
            data = await self._channel.recv(1 << 16)
            if not data:
                raise ConnectionError("it has ended; see the log file")
            self._answers.feed(data)
            answers = list(self._answers)
            self._owed -= len(answers)
            said = answers[-1] if answers else said
        if said:
            raise StoreError(said)

    async def close(self) -> None:
        """Let it end. It takes what it has been sent; whoever is cancelled does not wait for that."""
        await self._end(kill=False)

    async def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._channel.close()
        if kill:
            process.kill()
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(process.wait, _LAST_S)
            except subprocess.TimeoutExpired:
                process.kill()
                await trio.to_thread.run_sync(process.wait)


def _popen(command: list[str], fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, pass_fds=(fd,), stdin=subprocess.DEVNULL, cwd=children.CWD,
        env=children.environment() | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip

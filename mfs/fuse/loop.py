"""The device's loop: reads what the kernel asks, has it answered, writes the answer.

One handler for each operation. What it can say at once it returns, and that goes out before anything else runs; where
it must wait it returns a coroutine, which becomes a task. So a request that memory can answer costs two system calls
and no task: through pyfuse3 it cost four times as much or more (decisions/0012).

Readers do not hold up who only looks. The kernel hands requests over in the order in which they came, so a LOOKUP may
stand behind hundreds of READs of 1 MiB, each of which takes a third of a millisecond to copy. So the device is emptied
first, and again after each answer to a READ: what is small is answered as it comes, READs stand in a line of our own.

The device is read without blocking. The kernel takes a request back when its reader is killed just as we are told that
there is one; a read that blocked then would hold the whole process up.

Source: fs/fuse/dev.c (fuse_dev_do_read, fuse_dev_do_write).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import trio

from mfs.durations import Durations
from mfs.errors import MfsError
from mfs.fuse.errnos import errno_of
from mfs.fuse.protocol import (
    ANSWERED_FIRST,
    IN_HEADER,
    IN_HEADER_BYTES,
    OUT_HEADER,
    OUT_HEADER_BYTES,
    UNANSWERED,
    Opcode,
)
from mfs.fuse.times import OperationTimes

logger = logging.getLogger(__name__)

Body = tuple[bytes | memoryview, ...]
"""Of an answer: what stands behind its header, in pieces."""
Waited = Coroutine[Any, Any, Body]
Beginning = Callable[[int | None], Waited]
"""Where others than the loop may answer: begins, told by what number the kernel knows the request; None: only the loop.
"""
Handler = Callable[[int, memoryview], Body | Waited | Beginning]
"""(node, body of the request, good until the handler returns) -> the answer, or a coroutine that will return it, or
what begins one.

Raises: RefusedError or MfsError, from any of them. A view in an answer is good until the next checkpoint."""

_REQUESTS_AT_ONCE = 16  # before others have a turn; none of them waits for anything
_SPIN_S, _REST_S = 20e-6, 10e-3
"""Who asks one thing after the other mostly does so this soon, and then we have not slept: to sleep until then, with a
timer, costs more than to look (decisions/0028). Once looked for in vain, it is let be: somebody else has the core."""
_ROOM_BYTES = 1 << 16  # beside the longest write, which a read-only tree never gets but the kernel wants room for


class RefusedError(Exception):
    """An answer that is an errno and nothing to log."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


class Loop:
    """Serves one device, until the kernel ends the connection or the loop is cancelled."""

    def __init__(
        self, device: int, handlers: Mapping[Opcode, Handler], *, write_bytes_max: int, tasks_max: int,
        times: OperationTimes | None = None,
    ) -> None:  # fmt: skip
        """device: non-blocking. write_bytes_max: as agreed at INIT. tasks_max: requests that may wait at once; further
        ones get EIO. times: where answers are counted; None: nowhere that anybody looks.
        """
        self._device = device
        self._handlers: dict[int, Handler] = {int(opcode): handler for opcode, handler in handlers.items()}
        self._names = {int(opcode): opcode.name.lower() for opcode in handlers}
        self._asked = select.poll()
        self._asked.register(device, select.POLLIN)
        self._buffer = bytearray(write_bytes_max + _ROOM_BYTES)
        self._tasks_max = tasks_max
        self._tasks_count = 0
        self._reads: deque[tuple[int, int, bytes, float]] = deque()
        """READs that were not looked at yet: unique, node, body, time.perf_counter() when it was read. Bounded, with
        the tasks, by what may wait."""
        self._spins_from_s = 0.0
        """time.perf_counter() from which on the next request is looked for again."""
        self._is_working = False
        """Whether somebody comes back to the line."""
        self._times = times or OperationTimes(self._handlers)
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Returns when the mount is gone. Cancelled: what waits is dropped unanswered, for the kernel to send again."""
        self._reads.clear()
        self._is_working = False
        async with trio.open_nursery() as self._nursery:
            while True:
                await trio.lowlevel.wait_readable(self._device)
                await self._work_off()

    async def _work_off(self) -> None:
        """Answer what the device has and what stands in line, giving others their turns."""
        assert self._nursery is not None
        self._is_working = True
        while True:
            if not self._turn():
                self._nursery.cancel_scope.cancel()
            if not self._reads:
                break
            await trio.lowlevel.checkpoint()
        self._is_working = False

    def _turn(self) -> bool:
        """Answer what can be answered at once, for a while; False once the mount is gone. No checkpoint."""
        before, answers_left = self._tasks_count, _REQUESTS_AT_ONCE
        while answers_left > 0:
            answered = self._empty_device(answers_left)
            if answered is None:
                return False
            answers_left -= answered
            if self._reads:
                unique, node, body, since_s = self._reads.popleft()
                self._handle(Opcode.READ, unique, node, memoryview(body), since_s)
                answers_left -= 1
            elif self._tasks_count > before or not self._is_asked_again():
                break  # a task that was begun does not wait for the next request
        return True

    def _is_asked_again(self) -> bool:
        """Whether there is a request, or comes at once: see `_SPIN_S`."""
        now_s = time.perf_counter()
        if now_s < self._spins_from_s:
            return bool(self._asked.poll(0))
        until_s = now_s + _SPIN_S
        while not self._asked.poll(0):
            now_s = time.perf_counter()
            if now_s > until_s:
                self._spins_from_s = now_s + _REST_S
                return False
        return True

    def _empty_device(self, answers_max: int) -> int | None:
        """Answer so many of what is small, and put READs into their line; how many were answered, None once the mount
        is gone. No checkpoint.
        """
        body, answered = memoryview(self._buffer)[IN_HEADER_BYTES:], 0
        while answered < answers_max:
            try:
                length = os.readv(self._device, [self._buffer])
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return None
                if error.errno in (errno.ENOENT, errno.EINTR):  # taken back while we read it
                    continue
                raise
            since_s = time.perf_counter()
            opcode, unique, node = IN_HEADER.unpack_from(self._buffer)
            if opcode == Opcode.READ and self._may_wait:
                self._reads.append((unique, node, bytes(body[: length - IN_HEADER_BYTES]), since_s))
                continue
            answered += 1
            if opcode == Opcode.READ:
                self._refuse_more(opcode, unique)
            else:
                self._handle(opcode, unique, node, body[: length - IN_HEADER_BYTES], since_s)
        return answered

    def _handle(self, opcode: int, unique: int, node: int, body: memoryview, since_s: float) -> None:
        """Answer a request, or begin to. No checkpoint."""
        handler = self._handlers.get(opcode)
        if handler is None:
            if opcode not in UNANSWERED:
                self._write(unique, -errno.ENOSYS, ())
            return
        took = self._times.by_opcode[opcode]
        if opcode in ANSWERED_FIRST:
            self._write(unique, 0, ())
            opcode = Opcode.FORGET  # whatever becomes of it, nobody waits for it any more
        elif opcode == Opcode.OPEN and not self._may_wait:
            self._refuse_more(opcode, unique)  # at once: what it would open, nobody would close
            return
        try:
            answer = handler(node, body)
            if callable(answer):
                answer = answer(unique)
        except Exception as error:
            self._refuse(opcode, unique, error)
            took.note(time.perf_counter() - since_s)
            return
        if isinstance(answer, tuple):
            if opcode not in UNANSWERED:
                self._write(unique, 0, answer)
            took.note(time.perf_counter() - since_s)
        elif self._tasks_count < self._tasks_max:
            assert self._nursery is not None
            self._tasks_count += 1
            self._nursery.start_soon(self._answer, opcode, unique, answer, took, since_s)
        else:
            answer.close()
            self._refuse_more(opcode, unique)

    @property
    def _may_wait(self) -> bool:
        """Whether one more request may; those that stand in line may all have to."""
        return self._tasks_count + len(self._reads) < self._tasks_max

    def _refuse_more(self, opcode: int, unique: int) -> None:
        """As many wait as may."""
        self._times.errors[opcode, errno.EIO] += 1
        self._write(unique, -errno.EIO, ())

    async def _answer(self, opcode: int, unique: int, answer: Waited, took: Durations, since_s: float) -> None:
        try:
            body = await answer
        except Exception as error:
            self._refuse(opcode, unique, error)
        else:
            self._write(unique, 0, body)  # no checkpoint since the handler returned: its views are good
        finally:
            self._tasks_count -= 1
            took.note(time.perf_counter() - since_s)
        if opcode == Opcode.READ:  # tasks that go on together may be dozens
            self._empty_device(_REQUESTS_AT_ONCE)
            if self._reads and not self._is_working:
                assert self._nursery is not None
                self._is_working = True
                self._nursery.start_soon(self._work_off)

    def _refuse(self, opcode: int, unique: int, error: Exception) -> None:
        name = self._names[opcode]
        if isinstance(error, RefusedError):
            number = error.errno
        elif isinstance(error, MfsError):
            logger.warning("%s: %s", name, error)
            number = errno_of(error, opened=opcode == Opcode.READ)
        else:
            logger.error("unforeseen error in %s", name, exc_info=error)
            number = errno.EIO
        self._times.errors[opcode, number] += 1
        if opcode not in UNANSWERED:
            self._write(unique, -number, ())

    def _write(self, unique: int, status: int, body: Body) -> None:
        length = OUT_HEADER_BYTES + sum(map(len, body))
        try:
            os.writev(self._device, [OUT_HEADER.pack(length, status, unique), *body])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more, or a worker has answered
                return
            logger.error("an answer of %d bytes was not taken (%s)", length, error)
            if status == 0:
                self._write(unique, -errno.EIO, ())

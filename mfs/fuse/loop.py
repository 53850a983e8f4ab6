"""The device's loop: reads what the kernel asks, has it answered, writes the answer.

One handler for each operation. What it can say at once it returns, and that goes out before anything else runs; where
it must wait it returns a coroutine, which becomes a task. So a request that memory can answer costs two system calls
and no task: through pyfuse3 it cost four times as much or more (decisions/0012).

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
Handler = Callable[[int, memoryview], Body | Coroutine[Any, Any, Body]]
"""(node, body of the request, good until the handler returns) -> the answer, or a coroutine that will return it.

Raises: RefusedError or MfsError, from either. A view in an answer is good until the next checkpoint."""

_REQUESTS_AT_ONCE = 16  # before others have a turn; none of them waits for anything
_LINGER_S = 50e-6  # for the next request of somebody who asks one after the other (decisions/0012)
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
        self._buffer = bytearray(write_bytes_max + _ROOM_BYTES)
        self._tasks_max = tasks_max
        self._tasks_count = 0
        self._times = times or OperationTimes(self._handlers)

    async def run(self) -> None:
        """Returns when the mount is gone. Cancelled: what waits is dropped unanswered, for the kernel to send again."""
        async with trio.open_nursery() as nursery:
            buffer, body = self._buffer, memoryview(self._buffer)[IN_HEADER_BYTES:]
            while True:
                await trio.lowlevel.wait_readable(self._device)
                for _ in range(_REQUESTS_AT_ONCE):
                    try:
                        length = os.readv(self._device, [buffer])
                    except BlockingIOError:
                        if select.select([self._device], [], [], _LINGER_S)[0]:
                            continue
                        break
                    except OSError as error:
                        if error.errno == errno.ENODEV:
                            nursery.cancel_scope.cancel()
                            return
                        if error.errno in (errno.ENOENT, errno.EINTR):  # taken back while we read it
                            continue
                        raise
                    self._take(nursery, body[: length - IN_HEADER_BYTES])

    def _take(self, nursery: trio.Nursery, body: memoryview) -> None:
        """Answer the request in the buffer, or begin to. No checkpoint."""
        opcode, unique, node = IN_HEADER.unpack_from(self._buffer)
        handler = self._handlers.get(opcode)
        if handler is None:
            if opcode not in UNANSWERED:
                self._write(unique, -errno.ENOSYS, ())
            return
        since_s, took = time.perf_counter(), self._times.by_opcode[opcode]
        if opcode in ANSWERED_FIRST:
            self._write(unique, 0, ())
            opcode = Opcode.FORGET  # whatever becomes of it, nobody waits for it any more
        elif opcode == Opcode.OPEN and self._tasks_count >= self._tasks_max:
            self._times.errors[opcode, errno.EIO] += 1
            self._write(unique, -errno.EIO, ())  # at once: what it would open, nobody would close
            return
        try:
            answer = handler(node, body)
        except Exception as error:
            self._refuse(opcode, unique, error)
            took.note(time.perf_counter() - since_s)
            return
        if isinstance(answer, tuple):
            if opcode not in UNANSWERED:
                self._write(unique, 0, answer)
            took.note(time.perf_counter() - since_s)
        elif self._tasks_count < self._tasks_max:
            self._tasks_count += 1
            nursery.start_soon(self._answer, opcode, unique, answer, took, since_s)
        else:
            answer.close()
            self._times.errors[opcode, errno.EIO] += 1
            self._write(unique, -errno.EIO, ())

    async def _answer(
        self, opcode: int, unique: int, answer: Coroutine[Any, Any, Body], took: Durations, since_s: float
    ) -> None:
        try:
            body = await answer
        except Exception as error:
            self._refuse(opcode, unique, error)
        else:
            self._write(unique, 0, body)  # no checkpoint since the handler returned: its views are good
        finally:
            self._tasks_count -= 1
            took.note(time.perf_counter() - since_s)

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
            if error.errno in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                return
            logger.error("an answer of %d bytes was not taken (%s)", length, error)
            if status == 0:
                self._write(unique, -errno.EIO, ())

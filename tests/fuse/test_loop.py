"""The device's loop against messages laid out by hand: a socket that keeps messages apart stands for the device."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio

from mfs.errors import AccessError, NotFoundError, StoreError
from mfs.fuse.loop import Body, Handler, Loop, RefusedError, Waited
from mfs.fuse.protocol import Opcode

HEADER = "<IIQQIIIHH"  # fuse_in_header
REFUSALS = [
    (RefusedError(errno.EROFS), errno.EROFS),
    (AccessError("no"), errno.EACCES),
    (NotFoundError("gone"), errno.ENOENT),
    (ZeroDivisionError(), errno.EIO),
]


class Kernel:
    """The other end: asks, and hears answers."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours = ours
        self._unique = 0

    def ask(self, opcode: int, body: bytes = b"", *, node: int = 1) -> int:
        """Send a request; its number is returned."""
        self._unique += 2
        header = struct.pack(HEADER, 40 + len(body), opcode, self._unique, node, 0, 0, 0, 0, 0)
        self._ours.send(header + body)
        return self._unique

    async def hear(self) -> tuple[int, int, bytes]:
        """(unique, errno, body) of the next answer."""
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(self._ours)
        message = self._ours.recv(1 << 16)
        length, error, unique = struct.unpack_from("<IiQ", message)
        assert length == len(message)
        return unique, -error, message[16:]

    def has_heard(self) -> bool:
        try:
            return bool(self._ours.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    with near, far:
        yield near, far


@pytest.fixture
async def loops(ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery) -> AsyncIterator[Any]:
    """Begins a loop with handlers; what it returns is its kernel."""

    def begin(handlers: dict[Opcode, Handler], *, tasks_max: int = 10) -> Kernel:
        loop = Loop(ends[1].fileno(), handlers, write_bytes_max=4096, tasks_max=tasks_max)
        nursery.start_soon(loop.run)
        return Kernel(ends[0])

    yield begin
    nursery.cancel_scope.cancel()


async def test_what_a_handler_returns_goes_out_in_pieces_at_once(loops: Any) -> None:
    def read(node: int, body: memoryview) -> Body:
        return bytes(body), memoryview(b"abc"), b"%d" % node

    kernel = loops({Opcode.READ: read})
    asked = kernel.ask(Opcode.READ, b"body", node=7)
    assert await kernel.hear() == (asked, 0, b"bodyabc7")


async def test_a_handler_that_waits_holds_up_nobody(loops: Any) -> None:
    released = trio.Event()

    async def wait() -> Body:
        await released.wait()
        return (b"late",)

    kernel = loops({Opcode.OPEN: lambda node, body: wait(), Opcode.READLINK: lambda node, body: (b"now",)})
    late, now = kernel.ask(Opcode.OPEN), kernel.ask(Opcode.READLINK)
    assert await kernel.hear() == (now, 0, b"now")
    released.set()
    assert await kernel.hear() == (late, 0, b"late")


@pytest.mark.parametrize(("error", "number"), REFUSALS)
@pytest.mark.parametrize("waits", [False, True])
async def test_an_error_is_an_errno(
    loops: Any, error: Exception, number: int, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(node: int, body: memoryview) -> Any:
        if waits:
            return refuse_later()
        raise error

    async def refuse_later() -> Body:
        await trio.lowlevel.checkpoint()
        raise error

    with caplog.at_level(logging.CRITICAL, "mfs.fuse.loop"):
        kernel = loops({Opcode.LOOKUP: refuse})
        asked = kernel.ask(Opcode.LOOKUP)
        assert await kernel.hear() == (asked, number, b"")


async def test_a_name_that_is_gone_is_stale_to_who_holds_it_open(loops: Any) -> None:
    def gone(node: int, body: memoryview) -> Body:
        raise NotFoundError("gone")

    kernel = loops({Opcode.READ: gone})
    asked = kernel.ask(Opcode.READ)
    assert await kernel.hear() == (asked, errno.ESTALE, b"")


async def test_only_what_wants_an_answer_gets_one(loops: Any) -> None:
    """FORGET has a handler and INTERRUPT none; a request that no handler knows is refused, not left waiting."""
    forgotten = []

    def forget(node: int, body: memoryview) -> Body:
        forgotten.append(node)
        if node == 9:
            raise StoreError("never heard")
        return ()

    kernel = loops({Opcode.FORGET: forget, Opcode.ACCESS: lambda node, body: ()})
    for node in (5, 9):
        kernel.ask(Opcode.FORGET, bytes(8), node=node)
    kernel.ask(Opcode.INTERRUPT, bytes(8))
    setattr_ = kernel.ask(4)
    access = kernel.ask(Opcode.ACCESS)
    assert await kernel.hear() == (setattr_, errno.ENOSYS, b"")
    assert await kernel.hear() == (access, 0, b"")
    assert forgotten == [5, 9]
    assert not kernel.has_heard()


async def test_requests_that_wait_are_bounded(loops: Any) -> None:
    kernel = loops({Opcode.OPEN: lambda node, body: trio.sleep_forever()}, tasks_max=2)
    kernel.ask(Opcode.OPEN)
    kernel.ask(Opcode.OPEN)
    third = kernel.ask(Opcode.OPEN)
    assert await kernel.hear() == (third, errno.EIO, b"")
    assert not kernel.has_heard()


async def test_who_begins_an_answer_is_told_for_which_request_before_its_task_runs(loops: Any) -> None:
    begun: list[int | None] = []

    async def wait(unique: int | None) -> Body:
        return (b"%d of %d" % (begun.index(unique), len(begun)),)

    def begin(unique: int | None) -> Waited:
        begun.append(unique)
        if len(begun) == 3:
            raise RefusedError(errno.EAGAIN)
        return wait(unique)

    kernel = loops({Opcode.READ: lambda node, body: begin})
    first, second, third = (kernel.ask(Opcode.READ) for _ in range(3))
    heard = [await kernel.hear() for _ in range(3)]
    assert begun == [first, second, third]
    assert sorted(heard) == [(first, 0, b"0 of 3"), (second, 0, b"1 of 3"), (third, errno.EAGAIN, b"")]


async def test_a_cancelled_loop_leaves_what_waits_to_whoever_serves_next(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    began, ended = trio.Event(), []

    async def wait() -> Body:
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)
        return ()

    kernel = Kernel(ends[0])
    loop = Loop(ends[1].fileno(), {Opcode.OPEN: lambda node, body: wait()}, write_bytes_max=0, tasks_max=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        kernel.ask(Opcode.OPEN)
        await began.wait()
        nursery.cancel_scope.cancel()
    assert ended
    assert not kernel.has_heard()


async def test_readers_who_left_are_no_error(loops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes no answer for a request it took back (ENOENT); the loop goes on."""
    real, failures = os.writev, [OSError(errno.ENOENT, "gone")]

    def writev(fd: int, buffers: Any) -> int:
        if failures:
            raise failures.pop()
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", writev)
    kernel = loops({Opcode.ACCESS: lambda node, body: ()})
    kernel.ask(Opcode.ACCESS)
    second = kernel.ask(Opcode.ACCESS)
    assert await kernel.hear() == (second, 0, b"")


async def test_a_release_is_answered_before_it_is_done(loops: Any) -> None:
    """Killed in between, the next daemon must not hear of it once more."""
    heard: list[bool] = []
    kernel: Kernel = loops({Opcode.RELEASE: lambda node, body: heard.append(kernel.has_heard()) or ()})
    unique = kernel.ask(Opcode.RELEASE, bytes(24))
    assert await kernel.hear() == (unique, 0, b"")
    await trio.sleep(0.01)
    assert heard == [True]
    assert not kernel.has_heard()


async def test_where_no_more_may_wait_a_file_is_not_even_opened(loops: Any) -> None:
    opened: list[int] = []

    async def never(node: int, body: memoryview) -> Body:
        await trio.sleep_forever()
        raise AssertionError

    kernel: Kernel = loops(
        {Opcode.READ: never, Opcode.OPEN: lambda node, body: opened.append(node) or (b"",)}, tasks_max=1
    )
    kernel.ask(Opcode.READ, bytes(40))
    unique = kernel.ask(Opcode.OPEN, bytes(8))
    assert await kernel.hear() == (unique, errno.EIO, b"")
    assert not opened


async def test_who_only_looks_does_not_stand_behind_readers(ends: tuple[socket.socket, socket.socket]) -> None:
    kernel = Kernel(ends[0])
    handlers: dict[Opcode, Handler] = {opcode: lambda node, body: () for opcode in (Opcode.READ, Opcode.GETATTR)}
    reads = [kernel.ask(Opcode.READ, bytes(40)) for _ in range(3)]
    look = kernel.ask(Opcode.GETATTR, bytes(16))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Loop(ends[1].fileno(), handlers, write_bytes_max=0, tasks_max=10).run)
        assert [(await kernel.hear())[0] for _ in range(4)] == [look, *reads]
        nursery.cancel_scope.cancel()


async def test_a_read_that_comes_while_another_is_answered_is_answered_too(loops: Any) -> None:
    """It is taken from the device by whoever has answered, while the loop waits for the device."""
    asked: list[int] = []

    async def read(node: int, body: bytes) -> Body:
        await trio.sleep(0.01)  # the loop waits by then
        if len(asked) == 1:
            asked.append(kernel.ask(Opcode.READ, bytes(40)))
        return ()

    kernel: Kernel = loops({Opcode.READ: lambda node, body: read(node, bytes(body))})
    asked.append(kernel.ask(Opcode.READ, bytes(40)))
    assert [(await kernel.hear())[0] for _ in range(2)] == asked


async def test_reads_that_stand_in_line_are_left_to_whoever_serves_next(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """More than one turn's; those that were dropped are not answered when the loop runs again."""
    kernel, count = Kernel(ends[0]), 40
    cancelled = trio.CancelScope()

    def read(node: int, body: memoryview) -> Body:
        cancelled.cancel()
        return ()

    loop = Loop(ends[1].fileno(), {Opcode.READ: read}, write_bytes_max=0, tasks_max=100)
    for _ in range(count):
        kernel.ask(Opcode.READ, bytes(40))
    with cancelled:
        await loop.run()
    heard = 0
    while kernel.has_heard():
        await kernel.hear()
        heard += 1
    assert 0 < heard < count
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        last = kernel.ask(Opcode.READ, bytes(40))
        assert (await kernel.hear())[0] == last
        nursery.cancel_scope.cancel()

"""Readers answered by the worker that brings their bytes; a socket that keeps messages apart stands for the device."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from mfs.cache.chunk_cache import Begun
from mfs.errors import IntegrityError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from tests.workers.rig import Rig, running_rig, until


@pytest.fixture
def device() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the kernel's end, what replies are written to)"""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with near, far:
        yield near, far


@pytest.fixture
async def rig(tmp_path: Path, device: tuple[socket.socket, socket.socket]) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path, origin_limit=1, background_limit=1) as running:
        running.pool.device = device[1].fileno()
        yield running
        await running.cache.saver.wait_saved()
        await until(lambda: not any(running.pool.inflight(lane) for lane in ("origin", "ssd", "disk")), "rest")
        running.assert_idle()


async def read(rig: Rig, obj: ObjectId, start: int, stop: int, head: bytes, *, begin: bool = True) -> None:
    """As FUSE does: what is missing is ordered, then waited for. begin: whether it could be ordered at once."""
    state, span = rig.cache.open(obj, 0), ByteRange(start, stop)
    try:
        begun = rig.cache.begin(state, span, head=head) if begin else Begun(0.0, {}, False, head)
        assert b"".join(await rig.cache.read(state, span, begun)) == rig.contents[obj][start:stop]
    finally:
        rig.cache.close(state)


def heard(device: tuple[socket.socket, socket.socket]) -> list[bytes]:
    """The replies so far. Whoever waits for bytes waits for the worker, which has replied before it says so."""
    device[0].setblocking(False)
    found = []
    while True:
        try:
            found.append(device[0].recv(1 << 20))
        except BlockingIOError:
            return found


async def test_from_the_origin_and_from_disk_one_reply_of_exactly_what_was_asked(
    rig: Rig, device: tuple[socket.socket, socket.socket]
) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES + 3 * BLOCK_BYTES + 77)
    content = rig.contents[obj]
    for start, stop in ((5, 4101), (BLOCK_BYTES - 5, BLOCK_BYTES + 5), (CHUNK_BYTES + 3 * BLOCK_BYTES + 1, obj.size)):
        await read(rig, obj, start, stop, b"head")
        assert heard(device) == [b"head" + content[start:stop]]
    await read(rig, obj, 6, 700, b"head")
    assert heard(device) == [], "what RAM has is the daemon's to answer"
    rig.cache.saver.save_quiet(older_than_s=0)
    await rig.cache.saver.wait_saved()
    rig.cache.evict(obj, 0)
    fetched = len(rig.origin_reads())
    await read(rig, obj, 5, BLOCK_BYTES + 5, b"again")
    assert heard(device) == [b"again" + content[5 : BLOCK_BYTES + 5]]
    assert len(rig.origin_reads()) == fetched


async def test_what_no_single_order_brings_is_left_to_the_daemon(
    rig: Rig, device: tuple[socket.socket, socket.socket]
) -> None:
    obj = rig.put_ramp("model.bin", 2 * CHUNK_BYTES)
    await read(rig, obj, CHUNK_BYTES - 10, CHUNK_BYTES + 10, b"two chunks")
    gate = rig.gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, rig, obj, 0, 10, b"first")
        await until(lambda: any(start == 0 for _, start, _ in rig.origin_reads()), "its order")
        nursery.start_soon(read, rig, obj, 0, BLOCK_BYTES + 10, b"two orders")
        nursery.start_soon(read, rig, obj, 5, 15, b"too late")
        await until(lambda: rig.pool.queued("origin") == 1, "the other block's order")
        await trio.testing.wait_all_tasks_blocked()
        gate.unlink()
    assert [reply[:5] for reply in heard(device)] == [b"first"]


async def test_who_asks_before_the_order_is_out_goes_along(
    rig: Rig, device: tuple[socket.socket, socket.socket]
) -> None:
    obj, other = rig.put_ramp("model.bin", CHUNK_BYTES), rig.put_ramp("other.bin", CHUNK_BYTES)
    state = rig.cache.open(obj, 0)
    await state.ssd_known.wait()
    gate = rig.gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, rig, other, 0, 10, b"other")
        await until(lambda: bool(rig.origin_reads()), "the order that has the only connection")
        for number in range(3):
            nursery.start_soon(partial(read, rig, obj, number, 100, b"%d" % number, begin=number != 1))
        await until(lambda: rig.pool.queued("origin") == 1, "the order that waits")
        await trio.testing.wait_all_tasks_blocked()
        gate.unlink()
    rig.cache.close(state)
    content = rig.contents[obj]
    assert sorted(heard(device)) == sorted(
        [b"other" + rig.contents[other][:10], *(b"%d" % number + content[number:100] for number in range(3))]
    )


async def test_nothing_is_said_of_bytes_that_did_not_come(
    rig: Rig, device: tuple[socket.socket, socket.socket]
) -> None:
    obj = rig.put_ramp("model.bin", CHUNK_BYTES)
    rig.fail(1, IntegrityError)
    with pytest.raises(IntegrityError):
        await read(rig, obj, 0, 10, b"head")
    assert heard(device) == []
    await read(rig, obj, 0, 10, b"head")
    assert heard(device) == [b"head" + rig.contents[obj][:10]]


async def test_a_device_taken_back_is_open_nowhere(rig: Rig, device: tuple[socket.socket, socket.socket]) -> None:
    obj = rig.put_ramp("model.bin", 4 * CHUNK_BYTES)
    near, far = device
    for index in range(4):
        await read(rig, obj, index * CHUNK_BYTES, index * CHUNK_BYTES + 10, b"head")
    assert len(heard(device)) == 4
    rig.pool.take_device_back()
    far.close()
    with trio.fail_after(20):
        await trio.lowlevel.wait_readable(near)
    assert near.recv(1) == b"", "the last who had it has closed it"
    await read(rig, obj, BLOCK_BYTES, BLOCK_BYTES + 10, b"head")

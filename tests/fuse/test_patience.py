"""Questions about nodes that a daemon does not know yet."""

from __future__ import annotations

from collections.abc import Coroutine

import pytest
import trio
from trio.testing import MockClock

from mfs.fuse.loop import Beginning, Body, Handler, Waited
from mfs.fuse.patience import UnknownNodeError, patient

KNOWN = set[int]()
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    KNOWN.clear()


def handler(inode: int, body: memoryview) -> Body:
    if inode not in KNOWN:
        raise UnknownNodeError
    return (bytes(body),)


def ask(handler: Handler, inode: int) -> Coroutine[object, object, Body]:
    answer = handler(inode, memoryview(b"what"))
    assert not isinstance(answer, tuple)
    assert not callable(answer)
    return answer


async def test_they_wait_until_the_tree_has_settled(autojump_clock: MockClock) -> None:
    settled = trio.Event()
    answers: list[Body] = []

    async def wait() -> None:
        answers.append(await ask(patient(handler, lambda: settled, TIMEOUT_S), 7))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(TIMEOUT_S / 2)
        KNOWN.add(7)
        settled.set()
    assert answers == [(b"what",)]
    with pytest.raises(UnknownNodeError):
        patient(handler, lambda: settled, TIMEOUT_S)(8, memoryview(b"what"))


async def test_they_do_not_wait_longer_than_a_reader_may(autojump_clock: MockClock) -> None:
    with trio.fail_after(2 * TIMEOUT_S), pytest.raises(UnknownNodeError):
        await ask(patient(handler, lambda: trio.Event(), TIMEOUT_S), 7)


async def test_nobody_else_answers_who_waited(autojump_clock: MockClock) -> None:
    """By then the number that the kernel knows a request by is not at hand, and 0 is no request."""
    told: list[int | None] = []

    async def read() -> Body:
        return (b"bytes",)

    def begin(unique: int | None) -> Waited:
        told.append(unique)
        return read()

    def reads(node: int, body: memoryview) -> Beginning:
        handler(node, body)
        return begin

    waits = ask(patient(reads, lambda: trio.Event(), TIMEOUT_S), 9)
    KNOWN.add(9)
    assert await waits == (b"bytes",)
    assert told == [None]

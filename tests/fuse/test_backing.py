"""Ids of backing files: how long they stay, and how they are given back."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mfs.fuse import backing
from mfs.fuse.backing import Passthrough


class Counted(Passthrough):
    """One whose kernel only writes down what it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[int] = []
        self.forgotten: list[int] = []
        self.on_closed = self.forgotten.append
        self.turns = 0

    def _close_each(self, backings: object) -> None:
        self.turns += 1
        super()._close_each(backings)  # type: ignore[arg-type]

    def _close(self, backing: int) -> None:
        if backing == 13:
            raise OSError("the mount is gone")
        self.closed.append(backing)


async def given_back(passthrough: Counted, count: int) -> None:
    with trio.fail_after(20):
        while len(passthrough.closed) < count:
            await trio.sleep(0.01)


async def test_who_comes_back_in_time_finds_the_id_and_others_do_not() -> None:
    passthrough = Counted()
    passthrough.linger(0x100, 7)
    assert passthrough.resume(0x100) == 7
    assert passthrough.resume(0x100) == 0
    assert not passthrough.closed


async def test_ids_that_nobody_came_back_for_are_given_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_LINGER_S", 0.0)
    passthrough = Counted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(passthrough.run)
        for number in range(1, 5):
            passthrough.linger(number << 8, number)
        assert passthrough.resume(2 << 8) == 2
        await given_back(passthrough, 3)
        nursery.cancel_scope.cancel()
    assert passthrough.closed == [1, 3, 4]
    assert passthrough.forgotten == [1 << 8, 3 << 8, 4 << 8]
    assert passthrough.turns == 1


async def test_what_is_dropped_is_given_back_at_once_and_one_that_fails_costs_no_other() -> None:
    passthrough = Counted()
    for number in (11, 13, 12):
        passthrough.linger(number << 8, number)
    passthrough.drop_all()
    assert not passthrough.resume(11 << 8)
    await given_back(passthrough, 2)
    assert passthrough.closed == [11, 12]
    assert passthrough.forgotten == [11 << 8, 13 << 8, 12 << 8]


async def test_what_another_daemon_is_told_of_is_given_back_only_if_the_mount_stays_ours() -> None:
    passthrough = Counted()
    passthrough.linger(0x100, 1)
    passthrough.hold()
    passthrough.drop_all()
    await trio.testing.wait_all_tasks_blocked()
    assert not passthrough.closed
    passthrough.go_on()
    await given_back(passthrough, 1)
    assert passthrough.closed == [1]

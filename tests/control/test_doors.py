"""The doors that speak in messages, lending and handover, against clients that send anything."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from mfs.control import lending_door
from mfs.control.holding import HolderLink
from mfs.control.lending_door import CONNECTIONS_MAX
from mfs.handover import Giver

Serve = Callable[..., Awaitable[None]]

NESTED = [depth * b"[" + depth * b"]" for depth in (17, 900, 980, 1000, 30_000)]
NESTED += [b'{"open":' + NESTED[0] + b"}", b'{"ask":' + 40 * b'{"a":' + b"1" + 40 * b"}" + b"}"]
ODD = [
    b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"ask": 5}', b'{"open": "\\ud800", "inode": null}', b'{"open": 1}',
    b'{"file": 99, "start": 0, "stop": 1}', b'{"release": []}', b"1" * 5000,
]  # fmt: skip


class _Lender:
    lease_bytes_max = 4096

    async def open(self, path: str, inode: int | None) -> Any:
        path.encode()  # as the tree does
        return SimpleNamespace(size=1, identity="x", close=lambda: None), os.memfd_create("lent")

    async def lease(self, file: Any, start: int, stop: int, *, here: bool) -> Any:
        raise AssertionError


def borrowers_door(path: Path) -> Serve:
    lender = _Lender()

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await lending_door.serve(lender, path, task_status=task_status)

    return serve


def handover_door(path: Path) -> Serve:
    giver = Giver(SimpleNamespace(), -1, {}, HolderLink())  # type: ignore[arg-type]

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await giver.serve(path, task_status=task_status)

    return serve


async def connected(path: Path) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await sock.connect(str(path))
    return sock


@pytest.mark.parametrize("door", [borrowers_door, handover_door])
async def test_whatever_is_sent_is_answered_in_one_line_and_the_door_stays(
    door: Callable[[Path], Serve], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "d"
    async with trio.open_nursery() as nursery:
        await nursery.start(door(path))
        sock = await connected(path)
        if door is borrowers_door:
            await sock.recv(4096)
        for message in filter(None, [*NESTED, *ODD]):
            await sock.send(message)
            with trio.fail_after(20):
                answer = await sock.recv(65536)
            name, said = json.loads(answer)["error"]
            assert name in ("UsageError", "StoreError"), message[:50]
            assert "\n" not in said
            assert len(said) < 500
        sock.close()
        again = await connected(path)
        again.close()
        nursery.cancel_scope.cancel()
    assert "RecursionError" not in caplog.text


@pytest.mark.parametrize(
    ("door", "places"),
    [(borrowers_door, CONNECTIONS_MAX), (handover_door, 16)],
    ids=["lending", "handover"],
)
async def test_who_finds_a_door_full_is_told_so(door: Callable[[Path], Serve], places: int, tmp_path: Path) -> None:
    path = tmp_path / "d"
    async with trio.open_nursery() as nursery:
        await nursery.start(door(path))
        held = [await connected(path) for _ in range(places)]
        late = await connected(path)
        with trio.fail_after(20):
            name, said = json.loads(await late.recv(4096))["error"]
        assert name == "TransientStoreError"
        assert said.startswith(f"{places} ")
        for sock in (*held, late):
            sock.close()
        nursery.cancel_scope.cancel()

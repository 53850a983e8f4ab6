"""Frames that no client of ours sends."""

from __future__ import annotations

import struct

import pytest
import trio

from gpuload.errors import ServerError
from gpuload.server.channel import Channel


@pytest.mark.parametrize("depth", [17, 320, 900, 970, 990, 1000, 100_000])
@pytest.mark.parametrize("form", ["[%s]", '{"op":%s}', '{"op":"status","fds":%s}', '{"op":"load","options":{"a":%s}}'])
async def test_a_request_nested_beyond_reason_is_refused_in_one_line(form: str, depth: int) -> None:
    ours, theirs = trio.socket.socketpair()
    body = (form % ("[" * depth + "]" * depth)).encode()
    with ours, theirs, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.SocketStream(theirs).send_all, struct.pack(">I", len(body)) + body)
            with pytest.raises(ServerError) as refused:
                await Channel(ours).receive(message_s=30, fds_max=0)
    assert len(str(refused.value)) < 200

"""The protocol's bytes: one JSON object per frame, with file descriptors behind it. The page on it is ARCHITECTURE.md.

    frame        4 bytes, big-endian length of the JSON; the JSON, UTF-8, an object
    descriptors  for every FDS_PER_MESSAGE of the object's "fds": one byte 'F' with them as SCM_RIGHTS

Every length is bounded before anything is allocated. Descriptors that arrive and are not wanted are closed.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import trio

from gpuload.errors import AwayError, ServerError

REQUEST_BYTES_MAX = 4 << 20
REPLY_BYTES_MAX = 128 << 20
"""A table of 90,000 tensors is 12 MB."""

FDS_MAX = 65536
"""A model of 512 GiB over several cards, in granules of 8 MiB."""

FDS_PER_MESSAGE = 200
"""The kernel passes 253 at most (SCM_MAX_FD, include/net/scm.h)."""

_LENGTH = struct.Struct(">I")
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_MESSAGE * _FD_BYTES)


def encode(message: dict[str, Any], fds: Sequence[int] = ()) -> bytes:
    body = json.dumps({**message, "fds": len(fds)}, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


def groups(fds: Sequence[int]) -> list[Sequence[int]]:
    return [fds[at : at + FDS_PER_MESSAGE] for at in range(0, len(fds), FDS_PER_MESSAGE)]


def rights(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def take_rights(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return list(fds)


def decode_length(raw: bytes, bytes_max: int) -> int:
    (length,) = _LENGTH.unpack(raw)
    if length > bytes_max:
        raise ServerError(f"a message of {length} bytes, more than {bytes_max}")
    return int(length)


def decode(body: bytes) -> tuple[dict[str, Any], int]:
    """(message, how many descriptors follow). Raises: ServerError."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise ServerError("a message that is not JSON") from None
    if not isinstance(message, dict):
        raise ServerError("a message that is not a JSON object")
    count = message.pop("fds", 0)
    if type(count) is not int or not 0 <= count <= FDS_MAX:
        raise ServerError(f"a message with {count!r} descriptors, expected 0 to {FDS_MAX}")
    return message, count


class Channel:
    """The server's end of one connection, on the trio thread."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock

    async def receive(
        self, *, idle_s: float, message_s: float, fds_max: int
    ) -> tuple[dict[str, Any], list[int]] | None:
        """The next request and its descriptors (the caller closes them); None when the peer has closed.

        idle_s: longest wait for a request to begin. message_s: longest wait for the rest of it.
        Raises: ServerError for a request that breaks the protocol or comes too slowly.
        """
        fds: list[int] = []
        try:
            with trio.fail_after(idle_s):
                first = await self.sock.recv(1)
            if not first:
                return None
            with trio.fail_after(message_s):
                raw = first + await self._exactly(_LENGTH.size - 1)
                message, count = decode(await self._exactly(decode_length(raw, REQUEST_BYTES_MAX)))
                if count > fds_max:
                    raise ServerError(f"a request with {count} descriptors, more than {fds_max}")
                while len(fds) < count:
                    _, ancillary, _, _ = await self.sock.recvmsg(1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
                    got = take_rights(ancillary)
                    fds += got
                    if not got:
                        raise ServerError("a request without the descriptors it announced")
            return message, fds
        except BaseException as error:
            close_all(fds)
            if isinstance(error, trio.TooSlowError):
                raise ServerError("a request that took too long to arrive") from None
            if isinstance(error, OSError):
                raise AwayError("the client's connection broke") from None
            raise

    async def send(self, message: dict[str, Any], fds: Sequence[int] = (), *, message_s: float) -> None:
        """Raises: AwayError if the peer is gone or does not read."""
        try:
            with trio.fail_after(message_s):
                left = memoryview(encode(message, fds))
                while left:
                    left = left[await self.sock.send(left) :]
                for group in groups(fds):
                    await self.sock.sendmsg([b"F"], rights(group))
        except (OSError, trio.TooSlowError):
            raise AwayError("the client does not take its answer") from None

    async def wait_closed(self) -> None:
        """Until the peer closes; returns early, meaning nothing, if it sends another request meanwhile."""
        with contextlib.suppress(OSError):
            await self.sock.recv(1, socket.MSG_PEEK)

    async def is_closed(self) -> bool:
        """After `wait_closed`: whether the peer has closed, rather than asked something else."""
        try:
            return not await self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    async def _exactly(self, nbytes: int) -> bytes:
        body = bytearray()
        while len(body) < nbytes:
            more = await self.sock.recv(min(nbytes - len(body), 1 << 20))
            if not more:
                raise AwayError("the connection ended inside a message")
            body += more
        return bytes(body)


def close_all(fds: Sequence[int]) -> None:
    """Never raises: a file of a dead mount is closed by an error, which is nobody's fault here."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def send_blocking(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """The client's side of `Channel.receive`. The socket's own timeout is the deadline."""
    sock.sendall(encode(message, fds))
    for group in groups(fds):
        sock.sendmsg([b"F"], rights(group))


def receive_blocking(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One answer and its descriptors; the caller closes them. Raises: AwayError, ServerError, TimeoutError."""
    raw = _exactly_blocking(sock, _LENGTH.size)
    message, count = decode(_exactly_blocking(sock, decode_length(raw, REPLY_BYTES_MAX)))
    fds: list[int] = []
    try:
        while len(fds) < count:
            _, ancillary, _, _ = sock.recvmsg(1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            got = take_rights(ancillary)
            fds += got
            if not got:
                raise AwayError(
                    f"the server announced {count} descriptors, {len(fds)} arrived: this process may open no more of"
                    " them, perhaps (ulimit -n)"
                )
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def _exactly_blocking(sock: socket.socket, nbytes: int) -> bytes:
    body = bytearray(nbytes)
    view = memoryview(body)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise AwayError("the server closed the connection")
        view = view[got:]
    return bytes(body)

"""The protocol's bytes: one JSON object per frame, with file descriptors behind it. The page on it is PROTOCOL.md.

    frame        4 bytes, big-endian length of the JSON; the JSON, UTF-8, an object
    descriptors  for every FDS_PER_MESSAGE of the object's "fds": one byte 'F' with them as SCM_RIGHTS

Every length is bounded before anything is allocated. Descriptors that arrive and are not wanted are closed.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import math
import os
import reprlib
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpuload.errors import AwayError, ServerError

REQUEST_BYTES_MAX = 4 << 20
REPLY_BYTES_MAX = 128 << 20
"""A table of 90,000 tensors is 12 MB."""

ROWS_AT_ONCE = 500
"""Rows of a table that are encoded in one go: in between, other threads have their turn."""

FDS_MAX = 65536
"""Of a card there is one for each block of a model, of 64 MiB or more but for the last of a file."""

FDS_PER_MESSAGE = 200
"""The kernel passes 253 at most (SCM_MAX_FD, include/net/scm.h)."""

LENGTH = struct.Struct(">I")
_FD_BYTES = array.array("i").itemsize
ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_MESSAGE * _FD_BYTES)


def encode(message: dict[str, Any], fds: Sequence[int] = ()) -> bytes:
    parts = (f"{_dumped(key)}:{_encoded(value)}" for key, value in {**message, "fds": len(fds)}.items())
    body = f"{{{','.join(parts)}}}".encode()
    return LENGTH.pack(len(body)) + body


def _encoded(value: Any) -> str:
    if not isinstance(value, list) or len(value) <= ROWS_AT_ONCE:
        return _dumped(value)
    groups_ = (value[at : at + ROWS_AT_ONCE] for at in range(0, len(value), ROWS_AT_ONCE))
    return f"[{','.join(_dumped(group)[1:-1] for group in groups_)}]"


def _dumped(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


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
    (length,) = LENGTH.unpack(raw)
    if length > bytes_max:
        raise ServerError(f"a message of {length} bytes, more than {bytes_max}")
    return int(length)


def decode(body: bytes) -> tuple[dict[str, Any], int]:
    """(message, how many descriptors follow). Raises: ServerError."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise ServerError("a message that is not JSON, or nested too deeply") from None
    if not isinstance(message, dict):
        raise ServerError("a message that is not a JSON object")
    count = message.pop("fds", 0)
    if type(count) is not int or not 0 <= count <= FDS_MAX:
        raise ServerError(f"a message with {reprlib.repr(count)} descriptors, expected 0 to {FDS_MAX}")
    return message, count


def close_all(fds: Sequence[int]) -> None:
    """Never raises: a file of a dead mount is closed by an error, which is nobody's fault here."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def send_blocking(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """The client's side of `server.channel`. The socket's own timeout is the deadline."""
    send_groups(sock, message, len(fds), groups(fds))


def send_groups(sock: socket.socket, message: dict[str, Any], count: int, lent: Iterable[Sequence[int]]) -> None:
    """As `send_blocking`, of `count` descriptors that come in groups of FDS_PER_MESSAGE at most; a group may be closed
    when the next one is asked for.
    """
    sock.sendall(encode(message, range(count)))
    for group in lent:
        until = time.monotonic() + (sock.gettimeout() or math.inf)
        while True:
            try:
                sock.sendmsg([b"F"], rights(group))
                break
            except OSError as error:  # too many are on their way for this user: until some arrive
                if error.errno != errno.ETOOMANYREFS or time.monotonic() > until:
                    raise
                time.sleep(0.01)


def receive_blocking(
    sock: socket.socket, admit: Callable[[int], object] = lambda count: None
) -> tuple[dict[str, Any], list[int]]:
    """One answer and its descriptors; the caller closes them. Raises: AwayError, ServerError, TimeoutError.

    admit: told how many descriptors there will be, before they are taken.
    """
    raw = _exactly_blocking(sock, LENGTH.size)
    message, count = decode(_exactly_blocking(sock, decode_length(raw, REPLY_BYTES_MAX)))
    admit(count)
    fds: list[int] = []
    try:
        while len(fds) < count:
            _, ancillary, _, _ = sock.recvmsg(1, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
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

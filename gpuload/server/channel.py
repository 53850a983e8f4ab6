"""The server's end of a connection: `wire` on the trio thread. Clients do without trio, whose import takes 0.1 s."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import trio

from gpuload.errors import AwayError, ServerError
from gpuload.wire import (
    ANCILLARY_BYTES,
    LENGTH,
    REQUEST_BYTES_MAX,
    ROWS_AT_ONCE,
    decode,
    decode_length,
    encode,
    groups,
    rights,
    take_rights,
)
from mfs.control.wire import check_depth
from mfs.errors import UsageError


class Channel:
    """The server's end of one connection, on the trio thread."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock

    async def wait_request(self, *, idle_s: float) -> None:
        """Until the peer asks something or has closed; nothing of it is read. Cancellation: safe.

        idle_s: longest wait. Raises: ServerError.
        """
        with _told(), trio.fail_after(idle_s):
            await trio.lowlevel.wait_readable(self.sock)

    async def receive(self, *, message_s: float, fds_max: int) -> tuple[dict[str, Any], int] | None:
        """The next request, and how many descriptors follow it (`receive_fds`); None when the peer has closed.

        message_s: longest wait for all of it.
        Raises: ServerError for a request that breaks the protocol or comes too slowly.
        """
        with _told(), trio.fail_after(message_s):
            first = await self.sock.recv(1)
            if not first:
                return None
            raw = first + await self._exactly(LENGTH.size - 1)
            message, count = decode(await self._exactly(decode_length(raw, REQUEST_BYTES_MAX)))
            check_depth(message)
            if count > fds_max:
                raise ServerError(f"a request with {count} descriptors, more than {fds_max}")
            return message, count

    async def receive_fds(self, count: int, into: list[int], *, message_s: float) -> None:
        """Take the descriptors of a request. What arrived is in `into`, whatever happens: the caller closes it, and not
        on this thread, which a file on a hung file system would stop.

        Raises: as `receive`.
        """
        with _told(), trio.fail_after(message_s):
            while len(into) < count:
                _, ancillary, _, _ = await self.sock.recvmsg(1, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
                got = take_rights(ancillary)
                into += got
                if not got:
                    raise ServerError("a request without the descriptors it announced")

    async def send(self, message: dict[str, Any], fds: Sequence[int] = (), *, message_s: float) -> None:
        """Raises: AwayError if the peer is gone or does not read."""
        try:
            with trio.fail_after(message_s):
                is_long = len(message.get("tensors", ())) > ROWS_AT_ONCE
                frame = await trio.to_thread.run_sync(encode, message, fds) if is_long else encode(message, fds)
                left = memoryview(frame)
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


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise ServerError(f"a request of {error}") from None
    except trio.TooSlowError:
        raise ServerError("a request that took too long to arrive") from None
    except OSError:
        raise AwayError("the client's connection broke") from None

"""Requests about nodes that a daemon does not know yet: it has followed another one, and still looks at the sources."""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from mfs.fuse.loop import Beginning, Body, Handler, RefusedError, Waited


class UnknownNodeError(RefusedError):
    """The kernel asks about a node that we know nothing of: it looks the name up anew, and asks about what it finds."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE)


def patient(handler: Handler, settled: Callable[[], trio.Event], timeout_s: float) -> Handler:
    """A handler that looks again for an unknown node once the tree has settled, or after `timeout_s`."""

    def answer(inode: int, body: memoryview) -> Body | Waited | Beginning:
        try:
            return handler(inode, body)
        except UnknownNodeError:
            if settled().is_set():
                raise
            return later(inode, bytes(body))

    async def later(inode: int, body: bytes) -> Body:
        with trio.move_on_after(timeout_s):
            await settled().wait()
        found = handler(inode, memoryview(body))
        if callable(found):
            found = found(None)
        return found if isinstance(found, tuple) else await found

    return answer

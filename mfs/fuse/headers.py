"""Headers of opened files on their way into the page cache, before their first reader can fault on them.

A fault on the first page would have the kernel read around it, 4 MiB for a header of some KiB: too much for a loader
that opens all shards to look at their tables (decisions/0004).
"""

from __future__ import annotations

import logging

import pyfuse3
import trio

from mfs.workers.shares import Group, Shares

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_STORES_MAX = 4  # of one model at once, each in a thread


class Headers:
    """Stores them, so many of a model at once and no more. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._storing = Shares(2 * _STORES_MAX)
        self._limiter = trio.CapacityLimiter(4 * _STORES_MAX)

    async def store(self, inode: int, header: bytes, group: Group) -> None:
        """Put the first bytes of a file there; returns when they are, after two seconds, or at once where the model's
        share is used up: the reader's own fault brings them then.

        Safe where `notify_store` otherwise deadlocks: it waits for pages that a READ in flight holds, but here nobody
        waits for it on this loop, so that READ gets its answer. Where that answer hangs, so does the thread.
        Cancellation: the thread goes on.
        """
        if not self._storing.may_take(group):
            return
        self._storing.take(group)
        ended = trio.Event()

        async def run() -> None:
            try:
                await trio.to_thread.run_sync(
                    pyfuse3.notify_store, inode, 0, header, abandon_on_cancel=True, limiter=self._limiter
                )
            except Exception as error:
                logger.info("header not stored in the page cache: %s", error)
            finally:
                self._storing.give(group)
                ended.set()

        trio.lowlevel.spawn_system_task(run)  # it may outlive the handler that began it
        with trio.move_on_after(_TIMEOUT_S):
            await ended.wait()

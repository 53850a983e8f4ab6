"""Memory for the first chunks of a load, found before there is one.

A mount is mostly followed by a program that takes seconds to start, and then reads. Touching memory meanwhile is taken
slowly, by one worker, half of the time and only while nothing else is to be done: nobody waits for it. Where files are
read past us it was given back for them (`whole`), and is touched again once something is fetched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from mfs.cache.chunks import full_mask
from mfs.cache.pieces import Piece
from mfs.cache.ram import RamTier
from mfs.cache.slots import Slots
from mfs.errors import MfsError, StoreError
from mfs.types import CHUNK_BYTES
from mfs.workers.job import Priority
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_LOOK_S = 5.0  # once there is enough, or none wanted
_BUSY_S = 0.05


async def keep_warm(memory: RamTier, slots: Slots, pool: WorkerPool, is_wanted: Callable[[], bool]) -> None:
    """Have pieces of the RAM tier touched that nobody uses yet, until cancelled.

    is_wanted: whether there will be a use for them.
    """
    while True:
        if not is_wanted():
            await trio.sleep(_LOOK_S)
            continue
        if any(worker["inflight"] for worker in pool.describe()):
            await trio.sleep(_BUSY_S)
            continue
        try:
            place = memory.warm_up()
        except StoreError as error:
            logger.info("no memory is kept for what comes: %s", error)
            return
        if place is None:
            await trio.sleep(_LOOK_S)
            continue
        since_s = time.monotonic()
        is_clean = False
        try:
            piece = Piece(place.file.fd, place.start, CHUNK_BYTES, place.file.stays)
            await pool.call("warm", mask=full_mask(CHUNK_BYTES), piece=piece, priority=Priority.BACKGROUND)
            is_clean = True
        except MfsError as error:
            logger.info("no memory is kept for what comes: %s", error)
            await trio.sleep(_LOOK_S)
        finally:
            memory.give(place, is_clean=is_clean)
            slots.wake()
        await trio.sleep(time.monotonic() - since_s)

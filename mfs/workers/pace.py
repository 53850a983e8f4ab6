"""How much is asked of an origin at once, ahead of need, where its link is slow. Pure: no I/O, no clock.

Whatever shares a link that is too slow for it runs out of time together, and a reader who comes then shares it with all
of that. So no more is to be under way than comes within a quarter of the time-out. First each order becomes smaller,
since an origin may bound each connection by itself; then they become fewer.

    bytes of an order trickle in   the window becomes what would have come in time; once for all that was ordered before
    orders are quick               it grows by what they brought: twice as wide each time it is turned over
    it is wide enough              there is none any more

A link that is quick, or dead, has no window: how long an origin thinks before it sends says nothing here.
"""

from __future__ import annotations

from mfs.types import BLOCK_BYTES, CHUNK_BYTES

_SLOW, _QUICK = 1 / 4, 1 / 16  # of the time-out; between them the window stays, or it would swing
_ORDERS = 14  # that share a window, before each of them is as small as it may be
_ORDER_BYTES_MIN = 4 * BLOCK_BYTES  # a registry's frames on the edges of an order come twice
_SHRINK_MIN, _SHRINK_MAX = 1 / 16, 1 / 2


class Pace:
    """Of one source."""

    def __init__(self) -> None:
        self._window_bytes: int | None = None
        self._changed_s = 0.0
        self._came_s = 0.0
        self.trickled_s = 0.0
        """When an order was last seen to bring some of its bytes late."""

    @property
    def order_blocks(self) -> int | None:
        """Of a chunk, in one order ahead of need; None for as many as it has."""
        if self._window_bytes is None:
            return None
        return min(max(self._window_bytes // _ORDERS, _ORDER_BYTES_MIN), CHUNK_BYTES) // BLOCK_BYTES

    @property
    def orders_max(self) -> int | None:
        """Orders under way ahead of need at once; None where only others bound them."""
        if self._window_bytes is None or self.order_blocks is None:
            return None
        return max(1, self._window_bytes // (self.order_blocks * BLOCK_BYTES))

    def note_trickle(
        self, *, since_s: float, now_s: float, asked_bytes: int, came_bytes: int, under_way_bytes: int, timeout_s: float
    ) -> None:
        """An order's bytes come one after the other.

        since_s: when it began. under_way_bytes: all that is asked of the source now.
        """
        aim_s = timeout_s * _SLOW
        if now_s - since_s <= aim_s or not came_bytes:
            return
        self.trickled_s = self._came_s = now_s
        if since_s <= self._changed_s:
            return
        takes_s = (now_s - since_s) * asked_bytes / came_bytes
        shrink = min(max(aim_s / takes_s, _SHRINK_MIN), _SHRINK_MAX)
        window_bytes = under_way_bytes if self._window_bytes is None else min(self._window_bytes, under_way_bytes)
        self._window_bytes = max(_ORDER_BYTES_MIN, int(window_bytes * shrink))
        self._changed_s = now_s

    def note_failed(self, *, since_s: float) -> None:
        """An order that began then has brought nothing."""
        if self._came_s < since_s:  # nor has any other: dead, and orders that wait for each other would fail one by one
            self._window_bytes = None

    def note_done(self, *, now_s: float, took_s: float, nbytes: int, timeout_s: float) -> None:
        """An order has brought so much."""
        self._came_s = now_s
        order_blocks = self.order_blocks
        if self._window_bytes is None or order_blocks is None or 2 * nbytes < order_blocks * BLOCK_BYTES:
            return  # one that is small says little
        if took_s < timeout_s * _QUICK:
            self._window_bytes += nbytes
            if self._window_bytes >= _ORDERS * CHUNK_BYTES:
                self._window_bytes = None

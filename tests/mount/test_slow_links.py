"""Links so slow that no chunk comes within the time-out: what comes counts, and nobody waits for more than is his."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mfs.testing import ramp
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.nginx import NginxServer

MIB = 1 << 20
CONTENT = ramp(16 * MIB + 5, 3)
TIMEOUT_S = 3.0
RATE = {"rate_mb_s": 4 * MIB / (3 * TIMEOUT_S) / 1e6, "window_kib": 16}
"""4 MiB take three times as long as they may."""


class Slow:
    """A mount of nginx behind a link, and what has come over that."""

    def __init__(
        self, nginx: NginxServer, mounted: Mounted, chaos: Callable[[str], ChaosProxy], **weather: Any
    ) -> None:
        origin = origins.WebOrigin(nginx)
        origin.put_all({"m/w.bin": CONTENT})
        self.proxy = chaos(origin.url)
        origin.url = self.proxy.url
        self.mount = mounted(origin, timeout_s=TIMEOUT_S)
        self.path = str(self.mount.path / "m/w.bin")
        self.proxy.set(**weather)
        self._before_bytes = self.proxy.stats().down_bytes

    def check_came_once(self) -> None:
        """All of the file, and nothing of it twice."""
        self.mount.wait_quiet(prefetch=False)
        assert self.mount.client.status()["origin"]["fetched_bytes"] == len(CONTENT)
        assert self.proxy.stats().down_bytes - self._before_bytes < 1.2 * len(CONTENT)


@pytest.mark.parametrize("how", [touching.read, touching.map_file], ids=["read", "mmap"])
def test_all_of_a_file_is_read_over_a_link_that_brings_no_chunk_in_time(
    nginx: NginxServer, mounted: Mounted, chaos: Callable[[str], ChaosProxy], how: Callable[..., bytes]
) -> None:
    slow = Slow(nginx, mounted, chaos, **RATE)
    args = ["shared"] if how is touching.map_file else []
    assert slow.mount.call(how, slow.path, *args, timeout_s=300) == CONTENT
    slow.check_came_once()


def test_orders_ahead_that_share_a_slow_link_do_not_run_out_together(
    nginx: NginxServer, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
) -> None:
    slow = Slow(nginx, mounted, chaos, **RATE)
    frames = list(slow.mount.client.prefetch(["m/w.bin"], "ssd", wait=True))
    assert not [frame for frame in frames if "error" in frame], frames
    assert slow.mount.call(touching.read, slow.path) == CONTENT
    slow.check_came_once()


def test_a_page_is_read_while_orders_ahead_take_the_link(
    nginx: NginxServer, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
) -> None:
    slow = Slow(nginx, mounted, chaos, **RATE)
    orders = slow.mount.client.prefetch(["m/w.bin"], "ram", wait=True)
    next(orders)
    for offset in (15 * MIB, 11 * MIB, 7 * MIB + 4096):
        assert slow.mount.call(touching.pread, slow.path, 4096, offset, timeout_s=60) == CONTENT[offset : offset + 4096]
    slow.proxy.clear()
    orders.close()
    slow.mount.wait_quiet(prefetch=False)

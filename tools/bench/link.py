"""A link of a given rate: what the origin sends over our namespace's loopback goes through a token bucket.

Only the origin's answers (by source port) are slowed; what Ceph's own daemons say to each other is not. The namespace
is `run`'s, so nobody else's loopback is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tools.bench.processes import BenchError, run


def bring_up_loopback() -> None:
    """A new network namespace starts with its loopback down."""
    run(["ip", "link", "set", "lo", "up"])


@contextmanager
def capped(port: int, gbit_s: float, *, device: str = "lo") -> Iterator[None]:
    """While this is open, TCP from local `port` leaves by `device` at `gbit_s` at most, headers included."""
    run(["tc", "qdisc", "replace", "dev", device, "root", "handle", "1:", "htb", "default", "0"])
    try:
        rate = f"{int(gbit_s * 1000)}mbit"
        shape = ["htb", "rate", rate, "burst", "256kb"]
        run(["tc", "class", "add", "dev", device, "parent", "1:", "classid", "1:1", *shape])
        match = ["u32", "match", "ip", "protocol", "6", "0xff", "match", "ip", "sport", str(port), "0xffff"]
        run(["tc", "filter", "add", "dev", device, "parent", "1:", "protocol", "ip", *match, "flowid", "1:1"])
        yield
    finally:
        run(["tc", "qdisc", "del", "dev", device, "root"])


def sent_bytes() -> int:
    """What went through the cap since it was opened, headers included."""
    shown = run(["tc", "-s", "class", "show", "dev", "lo", "classid", "1:1"])  # tc of Debian 12 has no JSON for it
    found = re.search(r"Sent (\d+) bytes", shown)
    if found is None:
        raise BenchError(f"tc shows no count of bytes: {shown!r}")
    return int(found[1])

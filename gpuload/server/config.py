"""How a server behaves: its settings, and nothing that it does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpuload.moving.pipeline import Limits
from gpuload.server.digests import SETTLED_S

READERS_COUNT = max(2, min(20, os.cpu_count() or 2))
"""Threads that read and hash. At 10 and 4.3 GB/s each takes 3 GB/s to the device: eighteen fill a link of 55."""


@dataclass(frozen=True)
class ServerConfig:
    """How a server behaves."""

    socket_path: str
    socket_mode: int = 0o600
    """0600: this user alone. With more, others may attach and look, never change."""
    arena_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device name -> the most it may ever take."""
    floor_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device name -> of that, what is taken at start and kept; none: nothing."""
    ram_tier_bytes: int = 0
    """Page-locked host memory for blocks that leave cards, on each NUMA node that has some."""
    linger_s: float = 1.0
    """Memory that became free stays for so long: what is loaded next may want it."""
    connections_max: int = 1024
    """Half of them for users who may only attach: they must not keep the server's own user out."""
    idle_s: float = 300.0
    """A connection without a lease that asks nothing for so long is closed."""
    message_s: float = 30.0
    """Longest time one message may take either way."""
    fds_max: int = 4096
    """Files of one model."""
    backlog: int = 4096
    """Connections that wait to be accepted: a fleet starts at once. The kernel may allow fewer (net.core.somaxconn)."""
    settled_s: float = SETTLED_S
    """See `digests.DigestCache`."""
    digests_folder: str | None = None
    """Where digests outlive the process; None: nowhere. See `digest_files`."""
    limits: Limits = field(default_factory=lambda: Limits(readers_count=READERS_COUNT, buffers_count=READERS_COUNT + 4))
    store_address: str = ""
    """Of the service manager that keeps what is to outlive this process, as NOTIFY_SOCKET has it; empty: nobody."""
    is_kept_on: bool = False
    """Whether that one keeps it also if this process ends well: systemd does where the service is started again."""
    metrics_addr: str | None = None
    """HOST:PORT to answer Prometheus on; None: nowhere but through the socket."""

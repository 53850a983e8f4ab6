"""What somebody means to run on this machine: the settings of a mount, as far as they are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mfs.config import MountConfig, SourceConfig
from mfs.shown import mask_url


@dataclass(frozen=True)
class Wanted:
    """See above. The defaults are a mount's own."""

    sources: tuple[SourceConfig, ...] = ()
    cache_dir: Path | None = None
    cache_bytes: int = MountConfig.cache_bytes
    cache_shared: bool = False
    ram_bytes: int = MountConfig.ram_bytes
    workers_count: int = MountConfig.workers_count
    connections_count: int = MountConfig.connections_count
    timeout_s: float = MountConfig.timeout_s
    allow_other: bool = False

    @classmethod
    def of(cls, config: MountConfig) -> Wanted:
        """What a configuration says."""
        return cls(
            config.sources, config.cache_dir, config.cache_bytes, config.cache_shared, config.ram_bytes,
            config.workers_count, config.connections_count, config.timeout_s, config.allow_other,
        )  # fmt: skip


def label(source: SourceConfig) -> str:
    """A source's name for people."""
    return source.name or mask_url(source.url)

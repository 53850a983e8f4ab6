"""The SSD tier of one worker: there, or away and tried again.

A disk that is full, read-only, failing or hung costs the cache, never the mount: the worker serves without the tier
and opens it again by itself, at a bounded pace. What a person got wrong (a foreign directory, another user's) is
refused where a mount begins; under a mount that serves already it is one more reason to go on without.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mfs.cache.directory import open_directory
from mfs.cache.residency import ResidencyTables
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.errors import ConfigError, MfsError, StoreError

_RETRY_S, _RETRY_MAX_S = 1.0, 30.0  # doubled each time
_OPEN_S = 15.0
"""That a start waits for large tables, or a disk that is slow; then it goes on, and the tier comes when it is open."""

Parts = tuple[SsdTier, ResidencyTables]


class Tier:
    """The objects on SSD and their tables, while they can be used. Thread-safe."""

    def __init__(
        self, config: SsdConfig | None, *, on_changed: Callable[[str | None], None] = lambda fault: None
    ) -> None:
        """config: None for a mount that wants no SSD tier. Opens nothing.

        on_changed: told in any thread that the tier went away, and why, or with None that it is there again.
        """
        self._config = config
        self._on_changed = on_changed
        self._parts: Parts | None = None
        self._fault: str | None = None
        self._refused: ConfigError | None = None
        self._tried = threading.Event()
        self._lock = threading.Lock()
        self._is_opening = False
        self._create = True

    def start(self, *, lenient: bool, after_s: float = 0.0) -> None:
        """Open the tier, waiting for that a while. Raises: ConfigError for what no waiting mends, unless lenient.

        after_s: serve without it so long: the last one to open it did not live through it.
        """
        if self._config is None:
            return
        self._create = not lenient
        if after_s:
            self._change(None, f"the last worker died while it opened {self._config.directory}")
        self._begin_opening(after_s, lenient)
        if not after_s and not self._tried.wait(_OPEN_S) and self._parts is None:
            self._change(None, f"{self._config.directory} has not opened within {_OPEN_S:g} s")
        if self._refused is not None:
            raise self._refused

    def get(self) -> Parts | None:
        """The tier, None while it is away."""
        return self._parts

    def require(self) -> Parts:
        """The tier. Raises: StoreError saying why there is none."""
        parts = self._parts
        if parts is not None:
            return parts
        if self._config is None:
            raise StoreError("this mount has no SSD cache; mount with --cache-dir to have one")
        raise StoreError(f"the SSD tier is away: {self._fault or 'it is being opened'}")

    def doubt(self) -> None:
        """Something could not be written, and the disk was not full: see whether the tier still stands."""
        self._begin_opening(0.0, lenient=True)

    def _begin_opening(self, pause_s: float, lenient: bool) -> None:
        with self._lock:
            if self._is_opening:
                return
            self._is_opening = True
        threading.Thread(target=self._keep_opening, args=(pause_s, lenient), daemon=True).start()

    def _keep_opening(self, pause_s: float, lenient: bool) -> None:
        while True:
            time.sleep(pause_s)
            try:
                parts = self._open()
            except Exception as error:  # damaged files make numpy raise anything
                if isinstance(error, ConfigError) and not lenient:
                    self._refused = error
                    self._tried.set()
                    return
                self._change(None, str(error) if isinstance(error, MfsError) else f"{type(error).__name__}: {error}")
                self._tried.set()
                pause_s = min(max(_RETRY_S, 2 * pause_s), _RETRY_MAX_S)
                continue
            self._create, self._is_opening = False, False
            self._change(parts, None)
            self._tried.set()
            return

    def _change(self, parts: Parts | None, fault: str | None) -> None:
        with self._lock:
            is_news = (fault is None) != (self._fault is None)
            self._parts, self._fault = parts, fault
        if is_news:
            self._on_changed(fault)

    def _open(self) -> Parts:
        """Raises: MfsError, and whatever damaged files make numpy raise."""
        config = self._config
        assert config is not None
        # A directory that was there and is gone is a disk that is gone: nothing is made in its place.
        open_directory(config.directory, shared=config.shared, create=self._create)
        tier = SsdTier(config)
        try:
            tables = ResidencyTables(config.directory, writable=True, shared=config.shared)
        except OSError as error:
            raise StoreError(
                f"cache directory {config.directory} cannot take its index ({error}); free disk space, or name "
                f"another --cache-dir"
            ) from error
        tier.sweep()
        return tier, tables

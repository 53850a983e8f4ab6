"""Publish and unpublish, step by step. A crash after any step leaves what the next call, or the next start, completes.

    publish                                     unpublish
      the volume is noted                         the target is unmounted
      the daemon is noted                         its directory is removed
      secrets are written, the daemon serves      the volume is forgotten
      the target is bound                         a daemon that nobody needs is ended

What is noted and not bound is no volume: `recover` forgets it, and whoever wants it publishes it again. What is bound
was noted before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mfs.cache.directory import check_directory
from mfs.config import MountConfig
from mfs.csi import binding, secrets, volume
from mfs.csi.daemons import Daemons
from mfs.csi.state import Published, Served, State
from mfs.csi.volume import Limits, Volume
from mfs.errors import ConfigError, MfsError, NotFoundError, StoreError
from mfs.shown import clean

log = logging.getLogger(__name__)

_PATIENCE_S = 110.0  # the kubelet's own is two minutes
_WATCH_S = 5.0
_WARNINGS_MAX = 3
_MENDED_AT_ONCE = 8
_CACHE_KEPT_S = 86_400.0
_DOMAIN, _GONE = re.compile(r"[0-9a-f]{32}"), ".gone"
_CALLS_AT_ONCE = 24
"""Publishes, and as many unpublishes, that may wait for a daemon; the kubelet comes again with the rest."""


class BusyError(MfsError):
    """Another call about the same volume is under way."""


class TakenError(MfsError):
    """The volume is published there already, with other arguments."""


@dataclass(frozen=True)
class Stats:
    """Of one volume."""

    files_bytes: int
    files_count: int
    fault: str
    """What is wrong with it, '' if nothing is."""
    words: str
    """For people."""


class Node:
    """The volumes of one node."""

    def __init__(
        self, state: State, secrets_dir: Path, *, cache_dir: Path | None, keeper: Path | None, limits: Limits
    ) -> None:
        """cache_dir: below which daemons have their SSD caches; None: none has one. Raises: ConfigError."""
        secrets_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        secrets.check_memory(secrets_dir)
        self._state = state
        self._cache_dir = cache_dir
        self._limits = limits
        self._daemons = Daemons(state, secrets_dir, keeper)
        self._names = _Names()
        self._caches = threading.Lock()
        """Held while it is decided that a cache is used, or is not."""
        self._publishing = threading.Semaphore(_CALLS_AT_ONCE)
        self._unpublishing = threading.Semaphore(_CALLS_AT_ONCE)
        self._is_ready = False
        self._stopped = threading.Event()

    @property
    def is_ready(self) -> bool:
        """Whether what an earlier driver left is in order, but for daemons that it takes their sources to mend."""
        return self._is_ready

    # -- calls

    def publish(
        self, volume_id: str, target: str, arguments: str, context: Mapping[str, str], given: Mapping[str, str],
        *, patience_s: float | None = None,
    ) -> None:  # fmt: skip
        """Have the volume seen at `target`.

        arguments: what else it was asked for with, as a text to compare. given: its secrets.
        Raises: TakenError, BusyError, UsageError; or the MfsError that keeps its daemon from serving.
        """
        until_s = time.monotonic() + min(_PATIENCE_S, patience_s or _PATIENCE_S)
        volume.check_target(volume_id, target)
        wanted = volume.parse(context, given, self._limits)
        secrets.check(wanted.secrets)
        with _place(self._publishing), self._names.alone(target):
            self._publish(volume_id, target, _told(arguments, context), wanted, until_s)

    def _publish(self, volume_id: str, target: str, told: str, wanted: Volume, until_s: float) -> None:
        before = self._state.volume(volume_id, target)
        is_mounted = binding.device_at(target) is not None
        if before is None or not is_mounted:
            self._publish_new(Published(volume_id, target, "", told), wanted, until_s, leaves_mount=is_mounted)
            if before is not None:  # of a publish that a crash has cut off
                with self._names.waited(before.key, until_s):
                    self._end_unused(before.key)
            return
        if before.arguments != told:
            raise TakenError(f"volume {volume_id} is published at {target} with other arguments: unpublish it first")
        # With a Secret that was rotated it stays with its daemon, which gets what is new.
        with self._names.waited(before.key, until_s):
            self._prepare(before.key, wanted, before.secrets)
            self._daemons.ensure(before.key, until_s=until_s)
            self._show(before.key, target)
            after = replace(before, secrets=wanted.secrets_digest(self._state.salt))
            if after != before:
                self._state.put(after)

    def _publish_new(self, volume: Published, wanted: Volume, until_s: float, *, leaves_mount: bool) -> None:
        """leaves_mount: what stands at the target now stood there before, and stays should this fail."""
        digest = wanted.secrets_digest(self._state.salt)
        for key in wanted.keys(self._state.salt):
            with self._names.waited(key, until_s):
                served = self._state.served(key)
                if served is not None and served.secrets != digest:  # a secret that was rotated out opens nothing
                    continue
                try:
                    self._state.put(replace(volume, key=key, secrets=digest))
                    self._prepare(key, wanted, "")
                    self._daemons.ensure(key, until_s=until_s)
                    self._show(key, volume.target)
                except BaseException:
                    self._withdraw(volume.volume_id, volume.target, key, leaves_mount=leaves_mount)
                    raise
                return

    def _prepare(self, key: str, wanted: Volume, given: str) -> None:
        """Have its secrets where its daemon looks, and the daemon known.

        given: a digest of the secrets that the volume came with last. Only who comes with others than last time has
        had them rotated; others share the daemon, and may still come with the old ones.
        """
        digest = wanted.secrets_digest(self._state.salt)
        served = self._state.served(key)
        if served is None:
            with self._caches:
                served = Served(self._config(key, wanted).to_json(), wanted.is_isolated, wanted.role, digest)
                self._state.put_served(key, served)
        elif served.secrets != digest and given != digest:
            served = replace(served, secrets=digest)
            self._state.put_served(key, served)
        if wanted.is_isolated and served.secrets == digest:
            secrets.write(self._daemons.secrets(key), wanted.source.url, wanted.secrets, wanted.token)
        elif wanted.is_isolated:
            secrets.write_token(self._daemons.secrets(key), wanted.token)

    def _config(self, key: str, wanted: Volume) -> MountConfig:
        cache_dir = None
        if self._cache_dir is not None:
            cache_dir = self._cache_dir / wanted.domain(self._state.salt)
            with suppress(StoreError):  # its disk fails: the mount does without
                check_directory(cache_dir, shared=False)
        if wanted.public_key:
            self._state.put_key(key, wanted.public_key)
        return wanted.config(
            self._state.mountpoint(key), cache_dir, self._state.log_file(key), self._state.key_file(key)
        )  # fmt: skip

    def _show(self, key: str, target: str) -> None:
        source = self._state.mountpoint(key)
        # Over a mount that is dead, not in its place: only so does it show in containers that have the dead one.
        if binding.device_at(target) != binding.device_at(str(source)):
            binding.bind(source, target)

    def _withdraw(self, volume_id: str, target: str, key: str, *, leaves_mount: bool) -> None:
        """Undo what a publish that failed has left. Never raises."""
        try:
            if not leaves_mount:
                binding.unbind(target)
            self._state.drop(volume_id, target)
            self._end_unused(key)
        except MfsError as error:
            log.warning("volume %s: %s", clean(volume_id), error)

    def unpublish(self, volume_id: str, target: str) -> None:
        """Have the volume seen there no more, should it be. Raises: UsageError, BusyError, StoreError."""
        volume.check_target(volume_id, target)
        with _place(self._unpublishing), self._names.alone(target):
            published = self._state.volume(volume_id, target)
            if published is None and not binding.is_ours(target):
                if binding.device_at(target) is None:  # what the kubelet made, or we did before a crash
                    self._remove_empty(target)
                return
            binding.unbind(target)
            binding.remove(target)
            self._state.drop(volume_id, target)
            if published is not None:
                with self._names.waited(published.key, time.monotonic() + _PATIENCE_S):
                    self._end_unused(published.key)

    def _remove_empty(self, target: str) -> None:
        try:
            binding.remove(target)
        except StoreError as error:
            log.warning("%s", error)

    def stats(self, volume_id: str, path: str) -> Stats:
        """What the volume holds, and whether it is well. Asks its daemon, never the mount. Raises: NotFoundError."""
        published = self._state.volume(volume_id, path)
        if published is None or binding.device_at(path) is None:
            raise NotFoundError(f"volume {volume_id} is not published at {path}")
        try:
            status = self._daemons.status(published.key)
        except MfsError as error:
            return Stats(0, 0, "unanswered", f"its daemon does not answer: {error}")
        if binding.device_at(path) != binding.device_at(str(self._state.mountpoint(published.key))):
            return Stats(0, 0, "stale", "it shows a mount whose daemon has ended: the pod must be started again")
        tree = status.get("tree", {"bytes": 0, "files_count": 0})  # an older daemon may have been adopted
        errors = [source["last_error"] for source in status["sources"] if source.get("last_error")]
        words = "; ".join([*errors, *status["warnings"]][:_WARNINGS_MAX])
        return Stats(tree["bytes"], tree["files_count"], "source" if errors else "", words or "serving")

    # -- between calls

    def recover(self) -> None:
        """Forget what an earlier driver noted and did not finish. Before anybody calls. Raises: StoreError."""
        for published in list(self._state.volumes()):
            if binding.device_at(published.target) is None:
                log.info("volume %s is not mounted at %s: forgotten", clean(published.volume_id), published.target)
                self._state.drop(published.volume_id, published.target)
        self._daemons.sweep_secrets()

    def watch(self) -> None:
        """Look after the daemons until `stop`: one whose holder was killed too is started again, and shown again; one
        that nobody needs is ended.
        """
        self._try(self._end_all_unused)
        self._is_ready = True
        while not self._stopped.is_set():
            self._try(self._mend)
            self._stopped.wait(_WATCH_S)
            self._daemons.reap()
            self._try(self._end_all_unused)
            self._try(self._state.cut_logs)
            self._try(self._remove_old_caches)

    def _try(self, look: Callable[[], None]) -> None:
        try:
            look()
        except Exception as error:  # the next look tries again
            log.warning("%s", error)

    def stop(self) -> None:
        """End `watch`; the daemons go on."""
        self._stopped.set()

    def _remove_old_caches(self) -> None:
        """Those of namespaces of which nobody has had a volume for a day."""
        if self._cache_dir is None:
            return
        before_s = time.time() - _CACHE_KEPT_S
        for cache in self._cache_dir.iterdir():
            if cache.suffix == _GONE:
                shutil.rmtree(cache, ignore_errors=True)
            elif _DOMAIN.fullmatch(cache.name) and cache.lstat().st_mtime < before_s:
                with self._caches:  # nobody begins to use it meanwhile
                    if self._is_used(cache):
                        os.utime(cache)
                        continue
                    gone = cache.rename(cache.with_suffix(_GONE))
                log.info("cache %s is removed: nobody used it for a day", cache)
                shutil.rmtree(gone, ignore_errors=True)

    def _is_used(self, cache: Path) -> bool:
        """Whether a daemon that is known has it; also where that cannot be said."""
        known = [self._state.served(key) for key in self._state.daemons()]
        try:  # this setting alone: another one may mean nothing to us, and is that volume's trouble
            return any(each is None or json.loads(each.config)["cache_dir"] == str(cache) for each in known)
        except (ValueError, KeyError, TypeError):
            return True

    def _mend(self) -> None:
        by_key: dict[str, list[Published]] = {}
        for published in self._state.volumes():
            if binding.device_at(published.target) is not None:
                by_key.setdefault(published.key, []).append(published)
        with ThreadPoolExecutor(_MENDED_AT_ONCE) as pool:
            for key, volumes in by_key.items():
                pool.submit(self._see_to, key, partial(self._mend_one, key, volumes))

    def _end_all_unused(self) -> None:
        """What calls left whose last step failed."""
        needed = {published.key for published in self._state.volumes()}
        with ThreadPoolExecutor(_MENDED_AT_ONCE) as pool:
            for key in self._state.daemons():
                if key not in needed:
                    pool.submit(self._see_to, key, partial(self._end_unused, key))

    def _see_to(self, key: str, what: Callable[[], None]) -> None:
        """Do something for a daemon, unless a call does just now."""
        if self._stopped.is_set():
            return
        try:
            with self._names.alone(key):
                what()
        except BusyError:
            return
        except Exception as error:  # the next look tries again
            log.warning("daemon %s: %s", key, error)

    def _mend_one(self, key: str, volumes: list[Published]) -> None:
        if self._state.served(key) is None:  # unpublished meanwhile
            return
        self._daemons.ensure(key, until_s=time.monotonic() + _PATIENCE_S)
        device = binding.device_at(str(self._state.mountpoint(key)))
        for published in volumes:
            try:
                with self._names.alone(published.target):
                    if binding.device_at(published.target) not in (None, device):
                        log.warning("volume %s is shown again: its daemon was lost", clean(published.volume_id))
                        self._show(key, published.target)
            except BusyError:
                continue

    def _end_unused(self, key: str) -> None:
        if any(published.key == key for published in self._state.volumes()):
            return
        with suppress(MfsError, OSError):
            served = self._state.served(key)
            if served and (cache_dir := MountConfig.from_json(served.config).cache_dir):
                os.utime(cache_dir)  # used until now
        self._daemons.end(key)


def _told(arguments: str, context: Mapping[str, str]) -> str:
    """A digest of what a volume was asked for with, other than what differs each time it is asked."""
    stable = {name: text for name, text in context.items() if name != volume.TOKENS}
    return hashlib.sha256(json.dumps([arguments, stable], sort_keys=True).encode()).hexdigest()


@contextmanager
def _place(places: threading.Semaphore) -> Iterator[None]:
    """Raises: BusyError if there is none left."""
    if not places.acquire(blocking=False):
        raise BusyError("as many other calls as may be are under way: try again")
    try:
        yield
    finally:
        places.release()


class _Names:
    """Locks by name, kept only while somebody has or wants one."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def waited(self, name: str, until_s: float) -> Iterator[None]:
        """Have the name alone, once nobody else has it. until_s: a time.monotonic() value.

        Raises: BusyError if that takes longer.
        """
        with self._wanted(name) as lock:
            if not lock.acquire(timeout=max(0.0, until_s - time.monotonic())):
                raise BusyError(f"another call about {name} is under way: try again")
            try:
                yield
            finally:
                lock.release()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Have the name alone. Raises: BusyError if somebody else has it."""
        with self._wanted(name) as lock:
            if not lock.acquire(blocking=False):
                raise BusyError(f"another call about {name} is under way: try again")
            try:
                yield
            finally:
                lock.release()

    @contextmanager
    def _wanted(self, name: str) -> Iterator[threading.Lock]:
        with self._guard:
            lock, count = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = lock, count + 1
        try:
            yield lock
        finally:
            with self._guard:
                lock, count = self._locks.pop(name)
                if count > 1:
                    self._locks[name] = lock, count - 1


def check_cache(cache_dir: Path) -> None:
    """Raises: ConfigError if caches cannot be made below this directory."""
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache directory {cache_dir} cannot be made: {error.strerror}") from error

"""One daemon for each key: found again after a crash of the driver, taken up from the keeper, started, ended. Blocks.

A daemon stands in a session of its own and outlives the driver; its holder starts the next one if it is killed. Where
both are gone, as when the driver's pod is replaced, the keeper (`mfs.keeper`) has the mount's descriptors, and a new
holder goes on with them. Only where that fails too, again and again, a new mount is made in place of the dead one.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from mfs import launch, manager
from mfs.config import MountConfig
from mfs.control import detach, fdstore, runtime
from mfs.control.client import Client
from mfs.csi import binding, secrets
from mfs.csi.state import State
from mfs.errors import MfsError, StoreError, TransientStoreError

log = logging.getLogger(__name__)

_ANSWER_S = 5.0
_PAUSE_S = 0.05
_END_S = 20.0
_TAKE_UPS_MAX = 5  # of one mount, that a daemon failed at which might have served


class Daemons:
    """The daemons of one node. Thread-safe for different keys."""

    def __init__(self, state: State, secrets_dir: Path, keeper: Path | None) -> None:
        """keeper: the socket of `mfs keep`; None without one."""
        self._state = state
        self._secrets_dir = secrets_dir
        self._keeper = keeper
        self._holders: dict[str, int] = {}
        """Pids of those that are our children, by key."""
        self._failures: dict[str, int] = {}
        """Take-ups that failed, by key."""

    def secrets(self, key: str) -> Path:
        """Where the secrets of a daemon stand."""
        return self._secrets_dir / key

    def status(self, key: str) -> dict[str, Any]:
        """What a daemon says of itself. Raises: MfsError if it does not answer."""
        return self._client(key).status()

    def is_serving(self, key: str) -> bool:
        """Whether the mount of a key stands and its daemon answers."""
        if not binding.is_ours(str(self._state.mountpoint(key))):
            return False
        try:
            self.status(key)
        except MfsError:
            return False
        return True

    def ensure(self, key: str, *, until_s: float) -> None:
        """Have the daemon of a key, which the state knows, serve. until_s: time.monotonic() value to be done by.

        Raises: MfsError saying what keeps it from serving.
        """
        place = str(self._state.mountpoint(key))
        while binding.is_ours(place):
            if self.is_serving(key):
                return
            record = runtime.read_record(place)
            if record is None or not (record.is_alive or record.is_held):
                break
            if time.monotonic() >= until_s:
                raise TransientStoreError(f"the daemon (pid {record.pid}) of {place} does not answer yet: try again")
            time.sleep(_PAUSE_S)
        self._start(key, until_s)

    def _start(self, key: str, until_s: float) -> None:
        served = self._state.served(key)
        if served is None:
            raise StoreError(f"nothing is known of daemon {key}: publish the volume again")
        config = MountConfig.from_json(served.config)
        held: list[int] = []
        if not binding.is_ours(str(config.mountpoint)):
            config.mountpoint.mkdir(mode=0o755, exist_ok=True)
        elif self._keeper is not None:
            held = self._take_up(self._keeper, key, launch.store_name(config))
        environment = secrets.environment(self.secrets(key), is_isolated=served.is_isolated, role=served.role)
        if self._keeper is not None:
            environment["NOTIFY_SOCKET"] = str(self._keeper)
        how = "taken up from what the keeper holds" if held else "started"
        try:
            deadline_s = until_s - time.monotonic()
            if deadline_s <= 0:
                raise TransientStoreError(f"no time is left to start the daemon of {config.mountpoint}: try again")
            warnings = launch.start_daemon(config, deadline_s=deadline_s, environment=environment, held=held)
        except StoreError as error:
            if held and not isinstance(error, TransientStoreError):
                self._failures[key] = self._failures.get(key, 0) + 1
            raise
        finally:
            for fd in held:
                os.close(fd)
        self._failures.pop(key, None)
        record = runtime.read_record(str(config.mountpoint))
        if record is not None:
            self._holders[key] = record.holder_pid
        log.info("daemon %s was %s", key, how)
        for warning in warnings:
            log.warning("daemon %s: %s", key, warning)

    def _take_up(self, keeper: Path, key: str, name: str) -> list[int]:
        """What the keeper holds of a mount; nothing of one that could not be taken up again and again."""
        held = fdstore.ask_keeper(keeper, name)
        if held and self._failures.get(key, 0) >= _TAKE_UPS_MAX:
            log.warning("daemon %s could not be taken up %d times: its mount is given up", key, _TAKE_UPS_MAX)
            manager.unstore(name, address=str(keeper))
            for fd in [*held, *fdstore.ask_keeper(keeper, name)]:  # it answers when it has dropped its own
                os.close(fd)
            return []
        return held

    def end(self, key: str) -> None:
        """End a daemon that no volume needs, and forget all but its cache. Raises: MfsError if it does not end."""
        place = str(self._state.mountpoint(key))
        record = runtime.read_record(place)
        if record is not None and runtime.serves(record, runtime.directory(), os.geteuid()):
            try:
                self._client(key).shutdown()
            except MfsError:  # hung, or just ending
                pass
            if not detach.wait_until_ended(record, _END_S):
                detach.end_daemon(record, _END_S)
        binding.unbind(place)
        binding.remove(place)
        secrets.drop(self.secrets(key))
        self._state.drop_served(key)
        self._failures.pop(key, None)
        log.info("daemon %s was ended: no volume needs it", key)

    def sweep_secrets(self) -> None:
        """Forget secrets of daemons that are no more."""
        known = set(self._state.daemons())
        for directory in self._secrets_dir.iterdir():
            if directory.name not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def reap(self) -> None:
        """Collect holders that have ended: they are our children."""
        for key, pid in list(self._holders.items()):
            try:
                is_over = os.waitpid(pid, os.WNOHANG)[0] != 0
            except ChildProcessError:
                is_over = True
            if is_over and self._holders.get(key) == pid:
                del self._holders[key]

    def _client(self, key: str) -> Client:
        return Client(runtime.socket_path(str(self._state.mountpoint(key))), timeout_s=_ANSWER_S)

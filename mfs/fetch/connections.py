"""Keep-alive connections per origin: bounded, shared by threads, never handed out dead."""

from __future__ import annotations

import ssl
import threading
import time
from typing import NamedTuple

from mfs.errors import StoreError, TransientStoreError
from mfs.fetch.environment import CaBundle, Proxy, proxy_for, trust_store
from mfs.fetch.wire import Wire, connect

IDLE_S = 50.0
"""Oldest idle connection used again: below the 60 s after which common servers and NAT gateways forget one."""


class Origin(NamedTuple):
    """Where connections lead."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_default = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{host}" if is_default else f"{self.scheme}://{host}:{self.port}"


class Connection:
    """One wire and what the pool must know about it."""

    __slots__ = ("idle_since_s", "is_reused", "origin", "proxy", "wire")

    def __init__(self, origin: Origin, proxy: Proxy | None, wire: Wire) -> None:
        self.origin = origin
        self.proxy = proxy
        self.wire = wire
        self.is_reused = False
        self.idle_since_s = 0.0


class ConnectionPool:
    """All connections of one transport. Thread-safe."""

    def __init__(self, connections_max: int, ca_bundle: CaBundle | None = None, *, uses_proxy: bool = True) -> None:
        """connections_max: open connections per origin; whoever needs one more waits within its deadline.
        ca_bundle: as of `trust_store`. uses_proxy: that the environment names.
        """
        self._connections_max = connections_max
        self._uses_proxy = uses_proxy
        self._ca_bundle = ca_bundle
        self._changed = threading.Condition()
        self._idle: dict[Origin, list[Connection]] = {}  # last returned is first taken: the tail grows old and is cut
        self._open_count: dict[Origin, int] = {}
        self._busy: set[Connection] = set()
        self._is_closed = False
        self._trust: ssl.SSLContext | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def take(self, origin: Origin, deadline_s: float, *, fresh: bool = False) -> Connection:
        """An open connection, armed with the deadline; give it back with `give` or `drop`.

        fresh: insist on a new one, because an idle one was just found dead.
        Raises: TransientStoreError if none came free in time, StoreError if closed, and whatever `wire.connect` does.
        """
        while True:
            connection = self._take_idle_or_reserve(origin, deadline_s, fresh)
            if connection is None:
                return self._open(origin, deadline_s)
            try:
                if connection.wire.is_quiet():
                    connection.wire.arm(deadline_s)
                    connection.is_reused = True
                    return connection
            except BaseException:
                self.drop(connection)
                raise
            self.drop(connection)

    def add_idle(self, origin: Origin, deadline_s: float) -> None:
        """Open one more connection and leave it idle; nothing where the bound is reached. Raises: as `take`."""
        with self._changed:
            self._refuse_if_closed(origin)
            if self._open_count.get(origin, 0) >= self._connections_max:
                return
            self._open_count[origin] = self._open_count.get(origin, 0) + 1
        self.give(self._open(origin, deadline_s))

    def _take_idle_or_reserve(self, origin: Origin, deadline_s: float, fresh: bool) -> Connection | None:
        """An idle connection, or None: then the caller holds the right to open one."""
        with self._changed:
            while True:
                self._refuse_if_closed(origin)
                self._drop_old_nowait()
                idle = self._idle.get(origin)
                if idle and fresh:
                    self._forget_nowait(idle.pop(0))  # very likely as dead as the one just met; makes room as well
                elif idle:
                    connection = idle.pop()
                    self._busy.add(connection)
                    return connection
                if self._open_count.get(origin, 0) < self._connections_max:
                    self._open_count[origin] = self._open_count.get(origin, 0) + 1
                    return None
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TransientStoreError(f"{origin}: all {self._connections_max} connections stayed busy")
                self._changed.wait(left_s)

    def _open(self, origin: Origin, deadline_s: float) -> Connection:
        try:
            if origin.scheme == "https" and self._trust is None:
                self._trust = trust_store(self._ca_bundle)  # two threads may both do this once; harmless
            proxy = proxy_for(*origin) if self._uses_proxy else None
            wire = connect(*origin, proxy=proxy, trust=self._trust, deadline_s=deadline_s)
        except BaseException:
            with self._changed:
                self._uncount_nowait(origin)
            raise
        connection = Connection(origin, proxy, wire)
        with self._changed:
            self._busy.add(connection)
            if not self._is_closed:
                return connection
        self.drop(connection)
        raise StoreError(f"{origin}: closed while connecting")

    def give(self, connection: Connection) -> None:
        """Hand back a connection whose answer has been read to its end."""
        connection.idle_since_s = time.monotonic()
        with self._changed:
            self._busy.discard(connection)
            if self._is_closed:
                self._forget_nowait(connection)
            else:
                self._idle.setdefault(connection.origin, []).append(connection)
            self._changed.notify()

    def drop(self, connection: Connection) -> None:
        """Close a connection in an unknown state."""
        with self._changed:
            self._busy.discard(connection)
            self._forget_nowait(connection)

    def close(self) -> None:
        """Close all; waits under way in other threads end at once."""
        with self._changed:
            self._is_closed = True
            for idle in list(self._idle.values()):
                while idle:
                    self._forget_nowait(idle.pop())
            for connection in self._busy:
                connection.wire.abort()
            self._changed.notify_all()

    def counts(self, origin: Origin) -> tuple[int, int]:
        """(open, idle) connections to an origin."""
        with self._changed:
            return self._open_count.get(origin, 0), len(self._idle.get(origin, ()))

    def _refuse_if_closed(self, origin: Origin) -> None:
        if self._is_closed:
            raise StoreError(f"{origin}: the source has been closed")

    def _drop_old_nowait(self) -> None:
        oldest_s = time.monotonic() - IDLE_S
        for idle in list(self._idle.values()):
            while idle and idle[0].idle_since_s < oldest_s:
                self._forget_nowait(idle.pop(0))

    def _forget_nowait(self, connection: Connection) -> None:
        connection.wire.close()
        self._uncount_nowait(connection.origin)

    def _uncount_nowait(self, origin: Origin) -> None:
        self._open_count[origin] -= 1
        if not self._open_count[origin]:
            del self._open_count[origin]  # origins come and go with redirects; keep no trace of them
            self._idle.pop(origin, None)
        self._changed.notify()

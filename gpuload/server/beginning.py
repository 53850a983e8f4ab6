"""How a server comes to its door, arenas and clients: anew, from what a dead one left, or from one that lives."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from gpuload.device.base import Device
from gpuload.errors import DeviceError, DeviceLostError, FitError
from gpuload.moving.staging import Ring
from gpuload.server.catalog import Catalog, Lease
from gpuload.server.config import ServerConfig
from gpuload.server.door import Door, leads_to, opened
from gpuload.server.estate import Estate, Index, Store
from gpuload.server.handover import Heir
from gpuload.server.layout import PIECE_BYTES
from gpuload.server.ram_tier import RamTier
from gpuload.server.site import Site
from gpuload.server.succession import Left, check_devices, restore
from mfs import manager
from mfs.errors import ConfigError, IntegrityError, MfsError
from mfs.units import format_size

log = logging.getLogger("gpuload.server")

FLOOR_S = 60.0
"""Longest wait for the memory that the floor keeps: a server before gives back its own when it ends."""


@dataclass
class Begun:
    """What a server begins with."""

    door: Door
    sites: Mapping[str, Site]
    estate: Estate
    clients: list[tuple[trio.socket.SocketType, Lease | None, int]] = field(default_factory=list)
    """(connection, what it leases, that lease's number)"""
    is_heir: bool = False

    async def settle(self, site: Site) -> None:
        """Once all is ours: give back memory of an arena that no model stands in, and fill its floor instead."""
        if not self.is_heir:
            return
        try:
            await site.drop_absent()
            await site.fill_floor(FLOOR_S)
        except DeviceLostError:
            raise
        except (DeviceError, FitError) as error:
            log.warning("%s", error)


@dataclass
class Beginning:
    """All three ways. What they take, the stack gives back."""

    stack: contextlib.AsyncExitStack
    config: ServerConfig
    devices: Mapping[str, Device]
    store: Store
    version: str
    _tiers: dict[int | None, RamTier] = field(default_factory=dict)
    _door: Door | None = None

    def open_door(self, left: Left | None = None) -> Door:
        """Once; with no device yet, too: they may take seconds, which who connects waits for. Raises: ConfigError,
        BusyError."""
        if self._door is None:
            given = None
            if left is not None and self._has_door(left):
                given = (left.take("socket"), left.take("lock"))
            config = self.config
            self._door = self.stack.enter_context(opened(config.socket_path, config.socket_mode, config.backlog, given))
        return self._door

    async def anew(self, left: Left | None = None) -> Begun:
        """With arenas that nobody has; of `left` the door alone. Raises: ConfigError, BusyError, FitError,
        DeviceError."""
        door = self.open_door(left)
        if left is not None:  # before memory is asked for that it still has
            for name in left.close():
                self.store.remove(name)
            await self.store.settle()
            await trio.to_thread.run_sync(manager.barrier)
        self._check_fit()
        sites = {name: await self._site(self.stack, name) for name in self.devices}
        return Begun(door, sites, Estate(self.store, self.version))

    async def go_on(self, left: Left) -> Begun | None:
        """With what a server that is dead left; None, and one line in the log, where that cannot be."""
        stack = contextlib.AsyncExitStack()
        try:
            if not self._has_door(left):
                raise IntegrityError(f"what a server left is not of {self.config.socket_path}")
            index = left.read_index()
            stack.callback(index.close)
            sites, estate, clients = await self._heritage(stack, left, index)
        except (MfsError, OSError) as error:
            log.warning("the weights that were resident are given up: %s", error)
            await stack.aclose()
            return None
        door = self.open_door(left)
        self.stack.push_async_exit(stack.pop_all())
        for name in left.close():  # of clients and models that were gone, or nearly there
            self.store.remove(name)
        return Begun(door, sites, estate, clients, is_heir=True)

    async def take_over(self, heir: Heir) -> Begun:
        """With all that a living one has, which from `heir.hold` on is ours. Raises: MfsError as it or we find."""
        left, theirs = await heir.begin()
        self.stack.callback(left.close)
        check_devices(theirs, self._wanted())
        door = self.open_door(left)
        door.is_left = True  # until it is ours
        left.index = {"devices": theirs}
        sites = await self._sites(self.stack, left)
        await heir.receive_rest(left)
        index = left.read_index()
        self.stack.callback(index.close)
        estate, clients = await self._restored(left, index, sites)
        clients += [(_trio(left.take(name)), None, 0) for name in list(left.fds) if name.startswith("client.")]
        return Begun(door, sites, estate, clients, is_heir=True)

    async def _heritage(
        self, stack: contextlib.AsyncExitStack, left: Left, index: Index
    ) -> tuple[Mapping[str, Site], Estate, list[tuple[trio.socket.SocketType, Lease | None, int]]]:
        check_devices(left.index["devices"], self._wanted())
        sites = await self._sites(stack, left)
        return sites, *await self._restored(left, index, sites)

    async def _restored(
        self, left: Left, index: Index, sites: Mapping[str, Site]
    ) -> tuple[Estate, list[tuple[trio.socket.SocketType, Lease | None, int]]]:
        estate, leases = await restore(left, index, sites, self.store, self.version)
        return estate, [(_trio(fd), lease, number) for number, lease, fd in leases]

    def _has_door(self, left: Left) -> bool:
        return "lock" in left.fds and "socket" in left.fds and leads_to(left.fds["socket"], self.config.socket_path)

    def _wanted(self) -> list[tuple[str, str, int, int]]:
        return [
            (name, d.identity, d.granule_bytes, self.config.arena_bytes[name] // d.granule_bytes)
            for name, d in self.devices.items()
        ]

    async def _sites(self, stack: contextlib.AsyncExitStack, left: Left) -> dict[str, Site]:
        self._check_fit(is_heir=True)
        return {
            name: await self._site(stack, name, left.take_shared(at), is_heir=True)
            for at, name in enumerate(self.devices)
        }

    async def _site(
        self, stack: contextlib.AsyncExitStack, name: str, shared: int | None = None, *, is_heir: bool = False
    ) -> Site:
        """One device's arena with its floor, and its ring; the stack gives them back.

        is_heir: its memory is another server's still, by `shared` or by the granule; the floor is to be filled later.
        """
        device, nbytes = self.devices[name], self.config.arena_bytes[name]
        floor = self.config.floor_bytes.get(name, 0)
        if floor > nbytes:
            raise ConfigError(f"a floor of {format_size(floor)} on {name}: its arena has {format_size(nbytes)} at most")
        if nbytes < device.granule_bytes:
            unit = format_size(device.granule_bytes)
            raise ConfigError(f"an arena of {format_size(nbytes)} on {name} is less than one granule of {unit}")
        arena = device.reserve_arena(nbytes, shared)
        stack.callback(arena.close)
        floor_count = min(-(-floor // arena.granule_bytes), arena.granules_count)
        places = arena.places_count if arena.has_pieces else None
        catalog = Catalog(name, arena.granules_count, arena.granule_bytes, present_count=0, places_count=places)
        if not is_heir and floor_count:
            runs = catalog.granules.coming(floor_count)
            await trio.to_thread.run_sync(arena.commit, runs)
            catalog.granules.came(runs)
        limits = self.config.limits
        ring = Ring(device, buffer_bytes=max(limits.buffer_bytes, PIECE_BYTES), count=limits.buffers_count)
        tier = None if device.is_direct else self.tiers().get(device.node)
        site = Site(name, device, arena, catalog, ring, tier, floor_count)
        stack.callback(lambda: site.ring.close())  # it may be another one by then
        await trio.to_thread.run_sync(ring.grow)
        return site

    def tiers(self) -> dict[int | None, RamTier]:
        """One for the cards of each NUMA node; the stack gives their memory back. Raises: ConfigError."""
        if self.config.ram_tier_bytes and not self._tiers:
            cards = self._nodes()
            if not cards:
                raise ConfigError("a RAM tier stands behind cards: there is none among the arenas")
            self._tiers = {node: RamTier(self.config.ram_tier_bytes, card) for node, card in cards.items()}
            for tier in self._tiers.values():
                self.stack.callback(tier.close)
        return self._tiers

    def _nodes(self) -> dict[int | None, Device]:
        """One card of each NUMA node that has some."""
        return {device.node: device for device in self.devices.values() if not device.is_direct}

    def _check_fit(self, *, is_heir: bool = False) -> None:
        """See that all floors and rings together fit beside what others hold, before any is taken, and that no arena is
        larger than its device. is_heir: floors are there, or are filled later. Raises: FitError.
        """
        limits = self.config.limits
        staging = max(limits.buffer_bytes, PIECE_BYTES) * limits.buffers_count * len(self.devices)
        staging += self.config.ram_tier_bytes * len(self._nodes())
        sums: dict[str, tuple[Device, int, int, int]] = {}  # all devices in host memory are one sum
        for name, device in self.devices.items():
            place = "host memory" if name.startswith("cpu") else name
            _, floors, _, most = sums.get(place, (device, 0, 0, 0))
            floors += 0 if is_heir else self.config.floor_bytes.get(name, 0)
            most = max(most, self.config.arena_bytes[name])
            sums[place] = (device, floors, staging if place == "host memory" else 0, most)
        for place, (device, floors, rings, most) in sums.items():
            memory = device.memory()
            if most > memory.total_bytes:
                raise FitError(
                    f"an arena of {format_size(most)} does not fit {place}, which has"
                    f" {format_size(memory.total_bytes)}; nothing was taken",
                    shortfall_bytes=most - memory.total_bytes,
                )
            others, short = memory.total_bytes - memory.free_bytes, floors + rings - memory.free_bytes
            if short > 0:
                raise FitError(
                    f"this does not fit {place}: floors {format_size(floors)}, staging and RAM tier"
                    f" {format_size(rings)}; of its {format_size(memory.total_bytes)} others hold"
                    f" {format_size(others)}, free are {format_size(memory.free_bytes)}; short by"
                    f" {format_size(short)}; nothing was taken",
                    shortfall_bytes=short,
                )


def _trio(fd: int) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(socket.socket(fileno=fd))

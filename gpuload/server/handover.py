"""One server gives everything to another while both live: weights, leases, the socket, who is connected.

    heir                         giver
    take-over {format}        -> is the format one it knows? else it refuses, and goes on
                              <- {devices, names}, with the door's and the arenas' descriptors
    maps arenas, makes rings         serves on
    yield                     -> brings all clients to rest: what is asked ends, or is refused with one line
                              <- {names}, with index, records, leases and all who are connected, asking nothing
    restores, checks, has it kept
    held                      -> from here on it serves again only if the heir goes away
                              <- {yours}
    serves                    -> leaves the socket's name
    closes                    -> ends

Whatever fails before `yours` is sent, a deadline too, is the heir's failure: the giver takes all clients up again,
which have waited. So it does if the heir closes, or dies, before it says `serves`: until then that has changed nothing.
Connections that are made meanwhile wait in the listening socket. Should the giver be killed before `yours`, the heir
never serves and the giver's own successor does, from what its service manager keeps. Should it be killed after it, its
holder says that once more, and follows it unless the heir answers. The heir's own manager hears that it is ready only
after that, so that a dead heir is not followed by two.

Frames are `wire`'s, with "names" in the order of the descriptors behind them (`estate` has the names; besides:
client.N, who is connected and has no lease).
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from gpuload.errors import AwayError, BusyError, ServerError, from_wire, to_wire
from gpuload.server.channel import Channel
from gpuload.server.connections import HEIR_OP, Connections, peer_of
from gpuload.server.door import Door
from gpuload.server.estate import FORMAT, Estate
from gpuload.server.succession import Left
from gpuload.wire import FDS_MAX, close_all, encode
from mfs import manager
from mfs.errors import MfsError

log = logging.getLogger("gpuload.server")

PREPARE_S = 120.0
"""Longest wait for the heir to have mapped the arenas; clients are served meanwhile."""

DRAIN_S = 3.0
"""How long what is asked may go on once the heir is ready. Longer loads are refused: clients wait all that time."""

HELD_S = 20.0
"""Longest wait for the heir's word that it has everything; nobody is served meanwhile."""

END_S = 10.0
"""Longest wait for the heir to serve, and then for it to have no need of us, before we end."""

WHY = "the gpuload server gives its place to another one just now; nothing was changed, ask again"


class Giver:
    """The side that has everything. One heir at a time."""

    def __init__(
        self,
        estate: Estate,
        connections: Connections,
        door: Door,
        ending: trio.Event,
        version: str,
        *,
        is_kept_on: bool,
    ) -> None:
        """ending: set once all is another server's, and that one serves. is_kept_on: see `ServerConfig`."""
        self._is_kept_on = is_kept_on
        self._estate, self._connections, self._version = estate, connections, version
        self._door, self._ending = door, ending
        self.has_given = False

    async def run(self) -> None:
        """Answer who wants to take over, until one has."""
        while not self.has_given:
            sock, asked = await self._connections.wait_heir.receive()
            channel, pid = Channel(sock), peer_of(sock).pid
            with sock:
                try:
                    await self._prepare(channel, asked)
                    await self._yield(channel)
                except (MfsError, OSError, trio.TooSlowError) as error:
                    why = "it was too slow" if isinstance(error, trio.TooSlowError) else error
                    log.warning("pid %d did not take over, this server goes on: %s", pid, why)
                    if isinstance(error, MfsError) and not isinstance(error, AwayError):
                        await _refuse(channel, error)
                    continue
                self.has_given = self._door.is_left = True
                if not await self._serves(channel):
                    log.warning("pid %d went away before it served, this server goes on", pid)
                    self.has_given = self._door.is_left = False
                    self._take_back()
                    continue
                log.warning("everything is pid %d's now", pid)
        self._ending.set()

    async def _prepare(self, channel: Channel, asked: Mapping[str, Any]) -> None:
        if asked.get("format") != FORMAT:
            raise ServerError(
                f"a server (gpuload {str(asked.get('version'))[:40]}) that knows format"
                f" {str(asked.get('format'))[:40]} wants to take over from one of format {FORMAT} (gpuload"
                f" {self._version}): it cannot; stop this one and start the other"
            )
        names, fds = await self._part(is_first=True)
        message = {"format": FORMAT, "version": self._version, "devices": self._estate.devices(), "names": names}
        await channel.send(message, fds, message_s=PREPARE_S)
        await _expect(channel, "yield", PREPARE_S)

    async def _yield(self, channel: Channel) -> None:
        connections = self._connections
        try:
            if not await connections.pause(DRAIN_S, WHY):
                raise BusyError("what clients have asked does not end")
            for site in self._estate.sites.values():
                await site.freeze()
            self._estate.stop(is_clean=True)
            names, fds = await self._part(is_first=False)
            resting = [client for client in connections.resting if client.lease is None]
            names += [f"client.{i}" for i in range(len(resting))]
            fds += [client.sock.fileno() for client in resting]
            await channel.send({"names": names}, fds, message_s=HELD_S)
            await _expect(channel, "held", HELD_S)
            yours = {"yours": True}
            # Should we be killed from here on, nobody is to follow us but the heir, if it lives.
            self._tell_holder(f"STOPPING=1\nGIVING={encode(yours).hex()}", [channel.sock.fileno()])
            await channel.send(yours, message_s=1.0)
        except BaseException:
            self._take_back()
            raise

    async def _serves(self, channel: Channel) -> bool:
        """Whether the heir serves, and has no need of us any more; it cannot begin to once this is false."""
        with trio.CancelScope(shield=True):  # told to stop meanwhile, we are to know whose all this is
            with trio.move_on_after(END_S) as waiting:
                await channel.wait_closed()
            if waiting.cancelled_caught:
                channel.sock.shutdown(socket.SHUT_RD)
            if await channel.is_closed():
                return False
        # Should we be killed before, our holder asks for what it says: it is there to be read until then.
        self._tell_holder("STOPPING=1")
        with trio.move_on_after(END_S), contextlib.suppress(MfsError):
            await channel.receive(message_s=END_S, fds_max=0)
            if waiting.cancelled_caught:  # its end cannot be seen any more
                await trio.sleep_forever()
            await channel.wait_closed()
        return True

    def _take_back(self) -> None:
        """Serve again what an heir did not take."""
        self._tell_holder("READY=1")
        for site in self._estate.sites.values():
            site.is_frozen = False
        self._estate.resume()
        self._connections.resume()

    def _tell_holder(self, message: str, fds: Sequence[int] = ()) -> None:
        """Systemd follows the heir by itself, once that has said MAINPID."""
        if not self._is_kept_on:
            manager.notify(message, fds, address=self._estate.store.address)

    async def _part(self, *, is_first: bool) -> tuple[list[str], list[int]]:
        """The door and what arenas live by come first, all that changes comes later."""
        first = ("socket", "lock", "shared.")
        everything = await trio.to_thread.run_sync(lambda: list(self._estate.everything()))
        found = [(n, fd) for n, fd in everything if n.startswith(first) == is_first]
        return [name for name, _ in found], [fd for _, fd in found]


class Heir:
    """The side that takes over."""

    def __init__(self, path: str, version: str) -> None:
        self._path, self._version = path, version
        self._channel: Channel | None = None

    async def begin(self) -> tuple[Left, Sequence[Sequence[Any]]]:
        """What the giver has that does not change, and what its arenas are. Raises: AwayError, MfsError as it says."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._channel = Channel(sock)
        try:
            with trio.fail_after(PREPARE_S):
                await sock.connect(self._path)
        except OSError as error:
            raise AwayError(
                f"no gpuload server at {self._path} to take over from ({error.strerror or error}); start one without"
                " --take-over"
            ) from None
        await self._say({"op": HEIR_OP, "format": FORMAT, "version": self._version})
        said, left = await self._hear()
        return left, said["devices"]

    async def receive_rest(self, left: Left) -> None:
        """The giver comes to rest; all else it has is in `left` then."""
        await self._say({"op": "yield"})
        _, rest = await self._hear()
        left.fds |= rest.fds

    async def hold(self) -> None:
        """From here on everything is ours, or this raises."""
        await self._say({"op": "held"})
        said, left = await self._hear()
        left.close()
        if said.get("yours") is not True:
            raise ServerError("the server that is there did not give its place")

    async def serves(self) -> None:
        """From here on nobody else goes on with it, and clients may be served; nothing of it may be touched before.
        The giver may be dead. Raises: AwayError if whoever waited for this has gone on by itself."""
        try:
            await self._say({"op": "serves"})
        except AwayError:
            raise AwayError(
                f"the server at {self._path} was not told in time that this one serves: it keeps its place"
            ) from None

    def close(self) -> None:
        """The giver ends, if we serve; else it goes on."""
        if self._channel is not None:
            self._channel.sock.close()

    async def _say(self, message: dict[str, Any]) -> None:
        assert self._channel is not None
        await self._channel.send(message, message_s=HELD_S)

    async def _hear(self) -> tuple[dict[str, Any], Left]:
        assert self._channel is not None
        fds: list[int] = []
        try:
            with trio.fail_after(PREPARE_S):
                await self._channel.wait_request(idle_s=PREPARE_S)
                found = await self._channel.receive(message_s=PREPARE_S, fds_max=FDS_MAX)
                if found is None:
                    raise AwayError("the server that is there went away, or did not wait")
                message, count = found
                await self._channel.receive_fds(count, fds, message_s=PREPARE_S)
            if "error" in message:
                raise from_wire(message)
            names = message.get("names", [])
            if len(names) != len(fds) or len(set(names)) != len(names):
                raise ServerError(f"{len(fds)} descriptors came, with {len(names)} names")
        except trio.TooSlowError:
            close_all(fds)
            raise BusyError(f"the server at {self._path} did not answer within {PREPARE_S:.0f} s") from None
        except BaseException:
            close_all(fds)
            raise
        return message, Left(dict(zip(names, fds, strict=True)))


async def _expect(channel: Channel, op: str, within_s: float) -> None:
    """Raises: TooSlowError, AwayError, ServerError."""
    with trio.fail_after(within_s):
        await channel.wait_request(idle_s=within_s)
        found = await channel.receive(message_s=within_s, fds_max=0)
    if found is None:
        raise AwayError("it went away")
    if found[0].get("op") != op:
        raise ServerError(f"it said {str(found[0].get('op'))[:50]!r}, expected {op!r}")


async def _refuse(channel: Channel, error: MfsError) -> None:
    with contextlib.suppress(AwayError):
        await channel.send(to_wire(error), message_s=1.0)

"""All clients, from accept to the end of each; and how they are given to another server, or taken back.

A connection holds at most one lease. The kernel closes it when the client dies, however it dies, and a fork shares it,
so a lease ends exactly when the last process that could use the memory has let go.

`pause` brings all of them to rest: nobody is accepted, what was asked is answered or refused, and of no request a byte
has been read. At rest a connection is a descriptor and perhaps a lease, which another process can go on with.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from gpuload.descriptors import is_scarce
from gpuload.errors import AwayError, BusyError, DeviceLostError, ServerError, first_error, to_wire
from gpuload.server.catalog import Lease
from gpuload.server.channel import Channel
from gpuload.server.client_files import REQUESTS_MAX, ClientFiles, Shares
from gpuload.server.config import ServerConfig
from gpuload.server.estate import Estate
from gpuload.server.operations import Answer, Operations, Peer
from gpuload.wire import close_all, encode
from mfs.errors import MfsError

log = logging.getLogger("gpuload.server")

ACCEPT_PAUSE_S = 0.2
"""After a failed accept, before the next: long enough not to spin, short enough not to be noticed."""

PAUSE_S = 10.0
"""Longest way to rest once what is still asked was cancelled."""

HEIR_OP = "take-over"
"""What a successor asks; such a connection is `wait_heir`'s."""


@dataclass(eq=False)
class Client:
    """One connection."""

    sock: trio.socket.SocketType
    lease: Lease | None = None
    number: int = 0
    """Of its lease, in the estate."""
    places: list[trio.Semaphore] = field(default_factory=list)
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)
    """While it asks nothing."""
    talking: trio.CancelScope = field(default_factory=trio.CancelScope)
    """From the first byte of a request to the last of its answer."""
    asking: trio.CancelScope | None = None
    """Of that, while something is done that may be refused still."""


class Connections:
    """The clients of one server."""

    def __init__(
        self,
        config: ServerConfig,
        operations: Operations,
        estate: Estate,
        on_lost: Callable[[DeviceLostError], object],
    ) -> None:
        """on_lost: told at once of a card that is lost; `run` ends by that."""
        self._on_lost = on_lost
        self._config, self._operations, self._estate = config, operations, estate
        self.heirs, self.wait_heir = trio.open_memory_channel[tuple[trio.socket.SocketType, dict[str, object]]](1)
        """Connections of servers that want to take over, each with what it asked first."""
        self._places = trio.Semaphore(config.connections_max)
        self._strangers = trio.Semaphore(config.connections_max // 2)
        self._shares = Shares(REQUESTS_MAX)
        self._clients: set[Client] = set()
        self._at_work = set[object]()
        """Clients, and the one who accepts, as long as there is a task of theirs."""
        self._accepting = trio.CancelScope()
        self._why = ""
        """For `pause`: what is asked is refused. Empty: it is not."""
        self._is_pausing = False
        self._at_rest = trio.Event()
        self._start: Callable[..., None] = lambda *_: None

    def add(self, sock: trio.socket.SocketType, lease: Lease | None = None, number: int = 0) -> None:
        """A client at rest, of a server before; before `run`."""
        self._places.acquire_nowait()
        self._clients.add(Client(sock, lease, number, [self._places]))

    @property
    def resting(self) -> list[Client]:
        """After `pause`: everybody."""
        return list(self._clients)

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Serve until cancelled. Raises: DeviceLostError."""
        async with trio.open_nursery() as nursery:
            self._start = lambda: self._start_all(nursery, listener)
            self._start()
            await trio.sleep_forever()

    def _start_all(self, nursery: trio.Nursery, listener: trio.socket.SocketType) -> None:
        for client in self._clients - self._at_work:
            self._at_work.add(client)
            nursery.start_soon(self._serve, client)
        if listener not in self._at_work:
            self._at_work.add(listener)
            nursery.start_soon(self._accept, listener, nursery)

    async def pause(self, drain_s: float, why: str) -> bool:
        """Bring everybody to rest; what is asked may end within `drain_s`, then it is refused with `why`.

        Returns whether they came to rest in time; if not, `resume` all the same.
        """
        self._is_pausing, self._at_rest = True, trio.Event()
        self._accepting.cancel()
        self._operations.hush(True)
        for client in self._clients:
            client.waiting.cancel()
        with trio.move_on_after(drain_s):
            await self._at_rest.wait()
        self._why = why
        for client in self._clients:
            if client.asking is not None:
                client.asking.cancel()
        with trio.move_on_after(PAUSE_S / 2):
            await self._at_rest.wait()
        for client in self._clients:
            client.talking.cancel()  # it does not end its question, or take its answer
        with trio.move_on_after(PAUSE_S / 2):
            await self._at_rest.wait()
        return self._at_rest.is_set()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_pausing, self._why = False, ""
        self._operations.hush(False)
        self._start()

    def close(self) -> None:
        """Give up our copies of all connections; after `run`."""
        for client in self._clients:
            client.sock.close()

    def _ended(self, who: object) -> None:
        self._at_work.discard(who)
        if self._is_pausing and not self._at_work:
            self._at_rest.set()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        try:
            with trio.CancelScope() as self._accepting:
                while not self._is_pausing:
                    try:
                        sock, _ = await listener.accept()
                    except OSError as error:  # out of descriptors, say: those who are connected go on
                        log.warning("cannot accept a connection: %s", error)
                        await trio.sleep(ACCEPT_PAUSE_S)
                        continue
                    client = Client(sock)
                    try:
                        if is_scarce(sock.fileno()):
                            raise BusyError(
                                "the gpuload server has nearly all connections that it may have (ulimit -n)"
                            )
                        self._take_places(client, peer_of(sock))
                    except BusyError as error:
                        _refuse(sock, error)
                        continue
                    self._clients.add(client)
                    self._at_work.add(client)
                    nursery.start_soon(self._serve, client)
        finally:
            self._ended(listener)

    def _take_places(self, client: Client, peer: Peer) -> None:
        """All that it needs and has not yet, or none: who may not stay keeps nobody out. Raises: BusyError."""
        needed = [self._places] if peer.may_change else [self._strangers, self._places]
        taken: list[trio.Semaphore] = []
        for place in needed:
            if place in client.places:
                continue
            try:
                place.acquire_nowait()
            except trio.WouldBlock:
                for other in taken:
                    other.release()
                if place is self._strangers:
                    raise BusyError("too many connections of other users; try later") from None
                count = self._config.connections_max
                raise BusyError(f"the gpuload server has {count} connections, and leases are some; try later") from None
            taken.append(place)
        client.places += taken

    async def _serve(self, client: Client) -> None:
        """One client until it ends or rests. No error of a client leaves this function."""
        channel, stays = Channel(client.sock), False
        try:
            peer = peer_of(client.sock)
            self._take_places(client, peer)  # of one that came from another server
            while True:
                with trio.CancelScope() as client.waiting:
                    if self._is_pausing:
                        client.waiting.cancel()
                    await channel.wait_request(idle_s=float("inf") if client.lease else self._config.idle_s)
                if client.waiting.cancelled_caught:
                    stays = True
                    return
                goes_on = False
                with trio.CancelScope() as client.talking:
                    goes_on = await self._one_request(client, channel, peer)
                if not goes_on:
                    stays = client not in self._clients  # it is the heir's by now
                    return
        except DeviceLostError as error:
            self._on_lost(error)
            raise
        except trio.Cancelled:
            self._estate.stop()  # before what ends here is taken for a client's leaving
            raise
        except (ServerError, BusyError) as error:  # AwayError too
            log.info("connection ended: %s", error)
            with contextlib.suppress(AwayError):
                await channel.send(to_wire(error), message_s=1.0)
        except Exception as error:  # what one client brings about must not end the others' weights
            log.error("connection ended, unexpectedly: %s", error, exc_info=error)
        finally:
            if not stays:
                self._end(client)
            self._ended(client)

    def _end(self, client: Client) -> None:
        self._clients.discard(client)
        for place in client.places:
            place.release()
        if client.lease is not None:
            self._estate.end_lease(client.number)
            client.sock.close()
            client.lease.end()
            self._estate.sync()
        else:
            client.sock.close()

    async def _one_request(self, client: Client, channel: Channel, peer: Peer) -> bool:
        """Whether the client may ask more."""
        message_s = self._config.message_s
        fds_max = self._config.fds_max if peer.may_change else 0  # the others have no use for any
        request = await channel.receive(message_s=message_s, fds_max=fds_max)
        if request is None:
            return False
        message, count = request
        if client.lease:
            raise ServerError("this connection holds a lease; ask on another one")
        if message.get("op") == HEIR_OP and peer.may_change and not count:
            self._clients.discard(client)
            for place in client.places:
                place.release()
            try:
                self.heirs.send_nowait((client.sock, message))
            except trio.WouldBlock:  # one waits already; this one is told so by the end of its connection
                client.sock.close()
            return False
        async with contextlib.AsyncExitStack() as brought:
            files = None
            if count:
                files = ClientFiles(self._shares, peer.pid)
                brought.push_async_callback(files.close)
                await channel.receive_fds(count, files.fds, message_s=message_s)
            answer = await self._answered(client, channel, message, files, peer)
            if answer is not None and answer.lease is not None:
                client.lease = answer.lease
                client.number = self._estate.begin_lease(answer.lease, client.sock.fileno())
        if answer is None:
            return False
        try:
            self._estate.sync()
            if answer.lease is not None:
                await self._estate.keep_lease(client.number)
            await channel.send(answer.message, answer.fds, message_s=message_s)
        finally:
            close_all(answer.fds)
            if answer.lost is not None:
                raise answer.lost
        return True

    async def _answered(
        self, client: Client, channel: Channel, message: dict[str, object], files: ClientFiles | None, peer: Peer
    ) -> Answer | None:
        """The answer, or the refusal as an answer; None if the client left meanwhile, which cancels what it asked."""
        answers: list[Answer] = []

        async def work() -> None:
            answers.append(await self._operations.answer(message, files, peer))
            nursery.cancel_scope.cancel()

        async def watch() -> None:
            await channel.wait_closed()
            if not answers and await channel.is_closed():
                nursery.cancel_scope.cancel()

        try:
            with trio.CancelScope() as client.asking:
                if self._why:
                    client.asking.cancel()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(work)
                    nursery.start_soon(watch)
        except BaseExceptionGroup as group:
            error = first_error(group)
            if not isinstance(error, Exception):
                raise
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                error = BusyError(f"the gpuload server cannot open another descriptor: {error.strerror}; try later")
            if not isinstance(error, MfsError):
                log.error("unexpected: %s", error, exc_info=error)
            return Answer(to_wire(error), lost=error if isinstance(error, DeviceLostError) else None)
        finally:
            client.asking = None
        if not answers and self._why:
            return Answer(to_wire(BusyError(self._why)))
        return answers[0] if answers else None


def peer_of(sock: trio.socket.SocketType) -> Peer:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Peer(pid, uid)


def _refuse(client: trio.socket.SocketType, error: BusyError) -> None:
    """Say why, and close; never waits: an empty socket has room for this."""
    with client, contextlib.suppress(OSError), socket.socket(fileno=os.dup(client.fileno())) as same:
        same.send(encode(to_wire(error)), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

"""GET /metrics on a TCP address, for Prometheus. Nobody is asked who he is: what is said there holds no secrets.

A scraper cannot be in readers' way: few connections, small requests, deadlines, one scrape computed at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from mfs.control.http import ClientGone, HttpConnection, Limits, Request
from mfs.errors import ConfigError, MfsError, NotFoundError, StoreError, TransientStoreError, UsageError
from mfs.metrics.families import Text
from mfs.units import parse_address

logger = logging.getLogger(__name__)

Scrape = Callable[[str], Awaitable[Text]]
"""(Accept header) -> the text. Raises: MfsError."""

CONNECTIONS_MAX = 16
SCRAPE_S = 20.0
_LIMITS = Limits(header_bytes=16 << 10, body_bytes=1 << 10, idle_s=120.0, send_s=20.0)
_AGAIN_S = 0.5  # between attempts to have an address that another daemon of this mount still has


async def listen(address: str, *, waits: bool = False) -> list[trio.SocketListener]:
    """Listeners on HOST:PORT; a host may stand for several addresses.

    waits: that another daemon gives the address up, instead of failing.
    Raises: ConfigError if it cannot be had.
    """
    host, port = parse_address(address)
    is_said = False
    while True:
        try:
            return await trio.open_tcp_listeners(port, host=host or None)
        except OSError as error:
            if not waits:
                raise ConfigError(
                    f"metrics address {address} cannot be listened on: {error.strerror or error}; choose another one"
                ) from error
            if not is_said:
                logger.warning("metrics address %s is not to be had yet: %s", address, error.strerror or error)
                is_said = True
        await trio.sleep(_AGAIN_S)


async def serve(listeners: list[trio.SocketListener], scrape: Scrape) -> None:
    """Answer until cancelled. A failing scrape or client never ends this."""
    await trio.serve_listeners(_Door(scrape).handle, listeners)


def port_of(listeners: list[trio.SocketListener]) -> int:
    """The port that was had, where 0 was asked for."""
    return int(listeners[0].socket.getsockname()[1])


class _Door:
    def __init__(self, scrape: Scrape) -> None:
        self._scrape = scrape
        self._turn = trio.Lock()
        self._count = 0
        self._is_failing = False

    async def handle(self, stream: trio.SocketStream) -> None:
        connection = HttpConnection(stream, _LIMITS)
        self._count += 1
        try:
            async with stream:
                if self._count > CONNECTIONS_MAX:
                    await connection.refuse(TransientStoreError(f"{CONNECTIONS_MAX} connections are open: try later"))
                    return
                while await self._answer(connection):
                    pass
        except (ClientGone, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Exception:
            logger.exception("a connection for metrics failed")
        finally:
            self._count -= 1

    async def _answer(self, connection: HttpConnection) -> bool:
        """One request and its answer. Returns whether another may follow. Raises: what a client does that goes."""
        try:
            request = await connection.receive_request()
            if request is None:
                return False
            _check(request)
            text = await self._scraped(request.accept)
        except MfsError as error:
            await connection.refuse(error)
            return connection.can_continue()
        await connection.send_whole(200, *text)
        return connection.can_continue()

    async def _scraped(self, accept: str) -> Text:
        """The metrics. Raises: MfsError, whatever went wrong; a defect is logged once, however often it is met."""
        with trio.move_on_after(SCRAPE_S):
            async with self._turn:
                try:
                    text = await self._scrape(accept)
                except MfsError:
                    raise
                except Exception as error:
                    if not self._is_failing:
                        logger.exception("a scrape failed")
                    self._is_failing = True
                    raise StoreError(f"internal error, see the log: {type(error).__name__}") from error
                self._is_failing = False
                return text
        raise TransientStoreError(f"no metrics within {SCRAPE_S:g} s")


def _check(request: Request) -> None:
    if request.target.partition("?")[0] != "/metrics":
        raise NotFoundError("metrics are at /metrics")
    if request.method not in ("GET", "HEAD"):
        raise UsageError(f"/metrics is asked for with GET, not {request.method}")

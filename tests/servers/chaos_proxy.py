"""The chaos proxy's own process: copies TCP between client and upstream, as slow and as badly as it is told.

Run by `tests.servers.chaos`, whose `Weather` explains the settings.
"""

from __future__ import annotations

import asyncio
import collections
import socket
import struct
import threading
from collections.abc import Callable

from tests.servers import remote
from tests.servers.chaos import Weather

CHUNK_BYTES = 256 << 10

BUFFERED_BYTES = 64 << 20
"""Bytes in flight per direction where no window is set."""


class Ending(Exception):
    """This connection ends now; whatever had to reach the client has."""


class Pace:
    """Virtual-time pacing: says when bytes may leave so that a rate is kept."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def due_s(self, size: int, rate_mb_s: float, now_s: float) -> float:
        if not rate_mb_s:
            return now_s
        # 2 ms of credit: a sleep that overshot must not lower the rate.
        self._free_s = max(self._free_s, now_s - 0.002) + size / (rate_mb_s * 1e6)
        return self._free_s


class Delay:
    """A line of data and endings, each leaving to `writer` when it is due, with bounded bytes in flight."""

    def __init__(
        self, writer: asyncio.StreamWriter, one_way_s: Callable[[], float], window_bytes: Callable[[], int]
    ) -> None:
        """one_way_s: the delay now. window_bytes: bytes in flight at most, 0 where acknowledgements do not matter."""
        self._writer = writer
        self._one_way_s = one_way_s
        self._window_bytes = window_bytes
        self._line: collections.deque[tuple[float, bytes | Callable[[], None]]] = collections.deque()
        self._in_flight_bytes = 0
        self._changed = asyncio.Event()

    async def put(self, item: bytes | Callable[[], None], *, not_before_s: float = 0.0) -> None:
        """Add data, or a function that acts on the connection, in order."""
        size = len(item) if isinstance(item, bytes) else 0
        while self._in_flight_bytes and self._in_flight_bytes + size > (self._window_bytes() or BUFFERED_BYTES):
            await self._change()
        self._in_flight_bytes += size
        # Only now does it set out: time spent waiting for the window must not shorten the way.
        sets_out_s = max(not_before_s, asyncio.get_running_loop().time())
        self._line.append((sets_out_s + self._one_way_s(), item))
        self._changed.set()

    async def run(self) -> None:
        """Deliver until cancelled, or until a function in the line raises."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._line:
                await self._change()
            due_s, item = self._line.popleft()
            if due_s - loop.time() > 0.0005:  # below that a sleep costs more than it delays
                await asyncio.sleep(due_s - loop.time())
            if not isinstance(item, bytes):
                item()
                continue
            self._writer.write(item)
            await self._writer.drain()
            if self._window_bytes():
                loop.call_later(self._one_way_s(), self._credit, len(item))  # the acknowledgement's way back
            else:
                self._credit(len(item))

    def _credit(self, size: int) -> None:
        self._in_flight_bytes -= size
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Proxy:
    """The weather, the counts, and one task per connection."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.weather = Weather()
        self.pace = Pace()
        self.counts = dict.fromkeys(("connections", "open", "faults", "up_bytes", "down_bytes"), 0)
        self.changed = asyncio.Event()
        """Set, and replaced, whenever the weather changes: stalled connections then go on."""

    def change(self, weather: Weather) -> None:
        self.weather = weather
        self.changed.set()
        self.changed = asyncio.Event()

    def take_fault(self) -> bool:
        """Count one fault, unless all that were asked for have happened."""
        left = self.weather.faults_count
        if left == 0:
            return False
        if left is not None:
            self.weather.faults_count = left - 1
        self.counts["faults"] += 1
        return True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, from accept to the end of both directions."""
        self.counts["connections"] += 1
        if self.weather.refuse and self.take_fault():
            reset(writer)
            return
        self.counts["open"] += 1
        try:
            await asyncio.sleep(self.weather.rtt_ms / 1000)  # the handshake's round trip
            up_reader, up_writer = await asyncio.open_connection(*self.upstream, limit=4 << 20)
            await Connection(self, reader, writer, up_reader, up_writer).run()
        except* (OSError, Ending):
            reset(writer)  # after an orderly ending there is nothing left to reset
        finally:
            self.counts["open"] -= 1


class Connection:
    """Two directions between one client and upstream."""

    def __init__(
        self,
        proxy: Proxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        self._proxy = proxy
        self._reader, self._writer, self._up_reader, self._up_writer = reader, writer, up_reader, up_writer
        self._up = Delay(up_writer, self._one_way_s, lambda: 0)
        self._down = Delay(writer, self._one_way_s, self._window_bytes)
        self._pace = Pace()
        self._answer_bytes = 0
        self._ended = 0
        for stream in (writer, up_writer):
            stream.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.transport.set_write_buffer_limits(2 << 20)

    async def run(self) -> None:
        """Copy until both directions have ended, or one failed. Raises: Ending, ConnectionError, in a group."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self._copy_up(), self._copy_down(), self._up.run(), self._down.run()):
                    tasks.create_task(work)
        finally:
            self._up_writer.close()

    async def _copy_up(self) -> None:
        while data := await self._reader.read(CHUNK_BYTES):
            self._answer_bytes = 0
            self._proxy.counts["up_bytes"] += len(data)
            await self._up.put(data)
        await self._up.put(lambda: self._finish(self._up_writer))

    async def _copy_down(self) -> None:
        # Never more than a window at once, or the window could not cap anything.
        while data := await self._up_reader.read(min(CHUNK_BYTES, self._window_bytes() or CHUNK_BYTES)):
            await self._send_down(data)
        await self._down.put(lambda: self._finish(self._writer))

    async def _send_down(self, data: bytes) -> None:
        """Put data into the line to the client, with the faults that fall into it."""
        first = self._answer_bytes
        self._answer_bytes += len(data)
        weather = self._proxy.weather

        def falls(at: int | None) -> bool:
            return at is not None and first <= at < first + len(data) and self._proxy.take_fault()

        if falls(at := weather.corrupt_after_bytes):
            assert at is not None
            data = data[: at - first] + bytes([data[at - first] ^ 0xFF]) + data[at - first + 1 :]
        for at, end in (
            (weather.truncate_after_bytes, self._close),
            (weather.reset_after_bytes, self._reset),
            (weather.stall_after_bytes, None),
        ):
            if not falls(at):
                continue
            assert at is not None
            await self._put_down(data[: at - first])
            if end is not None:
                await self._down.put(end)
            else:
                await self._proxy.changed.wait()
            data = data[at - first :] if end is None else b""
            break
        await self._put_down(data)

    async def _put_down(self, data: bytes) -> None:
        if not data:
            return
        weather, now_s = self._proxy.weather, asyncio.get_running_loop().time()
        shared_s = self._proxy.pace.due_s(len(data), weather.rate_mb_s, now_s)
        own_s = self._pace.due_s(len(data), weather.connection_rate_mb_s, now_s)
        self._proxy.counts["down_bytes"] += len(data)
        await self._down.put(data, not_before_s=max(shared_s, own_s))

    def _window_bytes(self) -> int:
        return self._proxy.weather.window_kib << 10

    def _one_way_s(self) -> float:
        return self._proxy.weather.rtt_ms / 2000

    def _finish(self, writer: asyncio.StreamWriter) -> None:
        """Pass an end of stream on; the second one ends the connection."""
        writer.write_eof()
        self._ended += 1
        if self._ended == 2:
            self._close()

    def _close(self) -> None:
        self._writer.close()
        raise Ending

    def _reset(self) -> None:
        reset(self._writer)
        raise Ending


def reset(writer: asyncio.StreamWriter) -> None:
    """End with RST, unless already closing."""
    if writer.is_closing():
        return
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def run(port: int, host: str, upstream_port: int) -> None:
    """Listen, and let a thread take commands until the parent is gone."""
    proxy = Proxy((host, upstream_port))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", port, limit=4 << 20, backlog=512)
    loop, gone = asyncio.get_running_loop(), asyncio.Event()

    def on_loop(action: Callable[[], object]) -> object:
        """Run `action` between two steps of the loop, and wait: what it changed holds when this returns."""

        async def act() -> object:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), loop).result(10)

    def commands() -> None:
        remote.obey(
            {
                "change": lambda **weather: on_loop(lambda: proxy.change(Weather(**weather))),
                "stats": lambda: on_loop(lambda: dict(proxy.counts)),
            }
        )
        loop.call_soon_threadsafe(gone.set)

    threading.Thread(target=commands, daemon=True).start()
    async with server:
        await gone.wait()


if __name__ == "__main__":
    settings = remote.read_settings()
    asyncio.run(run(settings["port"], settings["upstream_host"], settings["upstream_port"]))

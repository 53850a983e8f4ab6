"""A worker process: reads operations from its socket, runs them in threads, answers. `python -m mfs.workers.process`.

argv: socket fd. The first frame is the worker's configuration; the worker answers {hello: pid} or an
error. It lives exactly as long as its socket: the daemon's death, however it comes, ends it. (PR_SET_PDEATHSIG would
not do: it fires when the thread that started the process ends, and trio's threads come and go.)
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from mfs import logs
from mfs.cache.chunk_places import ChunkPlaces
from mfs.cache.pieces import Common, Piece, mapped
from mfs.cache.ssd import SsdConfig
from mfs.errors import MfsError, to_wire
from mfs.fetch.told import taken_retries, taken_ways
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Moved, Page, Source
from mfs.tracing.requests import current, recording
from mfs.types import ByteRange, ObjectId
from mfs.workers.frames import Decoder, Frame, encode
from mfs.workers.jobs import Jobs
from mfs.workers.replies import Device, Replies
from mfs.workers.resident import NodeChunks
from mfs.workers.tier import Tier

logger = logging.getLogger(__name__)


@runtime_checkable
class TakesChunks(Protocol):
    """A source that can take what it needs from other files on the node, where they have it."""

    def take_from(self, chunks: NodeChunks) -> None:
        """Do so from now on."""
        ...


_FILLS = ("fill", "load", "warm")  # operations that write into a piece


def main() -> None:
    """Run until the socket closes."""
    socket_fd = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # They reach the whole group or unit (Ctrl-C, systemd): what they mean, and when we end, the daemon decides.
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=socket_fd) as channel:
        replies = Replies()
        frames = _receive(channel, replies)
        setup = next(frames, None)
        if setup is None:
            return
        logs.set_up_logging(setup["log_level"], "worker", setup.get("log_format", "text"))
        logs.current_trace = _trace
        logging.getLogger("botocore").setLevel(logging.WARNING)  # it names where each credential came from, at INFO
        send = _Sender(channel)
        try:
            jobs = _open_jobs(setup, send, replies)
        except Exception as error:
            send({"id": 0, "error": to_wire(error)})
            return
        gc.freeze()  # what was imported stays: no need to look through it again and again
        send({"id": 0, "result": {"hello": os.getpid(), "identities": jobs.identities}})
        _Crew(frames, jobs, send, setup["saves_max"]).work()
    os._exit(0)  # threads may sit in a recv whose answer nobody wants any more


def _open_jobs(setup: Frame, send: _Sender, replies: Replies) -> Jobs:
    connections_max = setup["connections_max"]
    sources: list[Source] = []
    for number, item in enumerate(setup["sources"]):
        opener = partial(open_source, item["url"], SourceOptions(**item["options"], connections_max=connections_max))
        try:
            sources.append(opener())
        except MfsError as error:
            if not setup.get("restarted"):
                raise
            logger.warning("%s; its other sources are served", error)
            sources.append(_LaterSource(opener, setup["identities"][number]))
    directory = Path(setup["cache_dir"]) if setup["cache_dir"] else None
    ssd = SsdConfig(directory, setup["cache_fsync"], setup.get("cache_shared", False)) if directory else None
    tier = Tier(ssd, on_changed=lambda fault: send({"id": 0, "tier": fault}))
    tier.start(lenient=setup.get("restarted", False), after_s=setup.get("tier_after_s", 0.0))
    if ssd is not None:
        chunks = NodeChunks(tier, ChunkPlaces(ssd.directory, shared=ssd.shared))
        for source in sources:
            if isinstance(source, TakesChunks):
                source.take_from(chunks)
    return Jobs(sources, tier, replies)


class _Crew:
    """Threads that take orders from the socket, one at a time, and do what they have taken themselves: an order is not
    handed from one thread to another, which would cost it a wake-up.

    One of them always waits for the next order: who takes one while all others are at work begins another thread first.
    So there are as many as there were operations under way here at once, which the daemon bounds, and one.
    """

    def __init__(self, frames: Iterator[Frame], jobs: Jobs, send: _Sender, saves_max: int) -> None:
        self._frames = frames
        self._jobs = jobs
        self._send = send
        self._taking = threading.Lock()
        self._counting = threading.Lock()
        self._saves_left = threading.Semaphore(saves_max)
        self._idle_count = 1
        """Threads that wait for an order, or are about to."""

    def work(self) -> None:
        """Take orders and do them until the socket closes; for as many threads as like. The others may still be at
        work then.
        """
        while True:
            with self._taking:
                frame = next(self._frames, None)
            if frame is None:
                return
            with self._counting:
                self._idle_count -= 1
                is_last = not self._idle_count
                self._idle_count += is_last
            if is_last:
                threading.Thread(target=self._work_beside, daemon=True).start()
            self._do(frame)
            with self._counting:
                self._idle_count += 1

    def _work_beside(self) -> None:
        status = 1
        try:
            self.work()
            status = 0
        except BaseException:
            logger.exception("this worker cannot go on")
        finally:  # the socket is closed, or what came from it is no order: nobody else would hear of either
            os._exit(status)

    def _do(self, frame: Frame) -> None:
        if frame["op"] == "ping":
            self._send({"id": 0, "pong": True})
            return
        serial, operation, trace = frame.pop("id"), frame.pop("op"), frame.pop("trace", None)
        then = frame.pop("then", None)

        def emit(part: Frame) -> None:
            self._send({"id": serial, "part": part})

        with recording(trace) as spans:
            try:
                result = _do(self._jobs, operation, frame, emit)
                answer: Frame = {"id": serial, "result": result}
            except Exception as error:
                answer = {"id": serial, "error": to_wire(error)}
                logger.debug("%s failed", operation, exc_info=True)
        if spans:
            answer["spans"] = spans
        self._send(answer)
        if then is not None and "result" in answer:
            sums = [pair for pair in result["sums"] if not result["resident"] >> pair[0] & 1]
            self._save(then, {name: frame[name] for name in ("obj", "index", "piece")} | {"sums": sums})

    def _save(self, serial: int, arguments: Frame) -> None:
        """Write to the SSD tier what has just been filled and did not come from there, unless enough threads do that;
        the daemon counts on it already.
        """
        if not arguments["sums"]:
            self._send({"id": serial, "result": {"bytes": 0, "full": False, "away": False}})
            return
        if not self._saves_left.acquire(blocking=False):
            self._send({"id": serial, "result": {"later": True}})
            return
        try:
            self._do({"id": serial, "op": "persist", **arguments})
        finally:
            self._saves_left.release()


def _trace() -> logs.TraceIds | None:
    """What this thread works for, as logs name it."""
    context = current()
    return None if context is None else logs.TraceIds(context.trace_id, context.span_id)


def _do(jobs: Jobs, operation: str, arguments: Frame, emit: Callable[[Frame], None]) -> Frame:
    result: Frame
    if "piece" not in arguments:
        result = getattr(jobs, operation)(**arguments, emit=emit)
        return result
    to_fill = arguments["mask"] if operation in _FILLS else 0
    piece, common = arguments["piece"]
    with mapped(piece, to_fill=to_fill, common=common) as view:
        result = getattr(jobs, operation)(**{**arguments, "piece": view}, emit=emit)
    return result


class _LaterSource:
    """A source of a mount that serves, and that cannot be opened now (a certificate file is away, say): its operations
    fail until it can.
    """

    def __init__(self, opener: Callable[[], Source], identity: str) -> None:
        self._opener = opener
        self._source: Source | None = None
        self._chunks: NodeChunks | None = None
        self.identity = identity

    def _opened(self) -> Source:
        if self._source is None:
            source = self._opener()
            if self._chunks is not None and isinstance(source, TakesChunks):
                source.take_from(self._chunks)
            self._source = source
        return self._source

    def take_from(self, chunks: NodeChunks) -> None:
        self._chunks = chunks

    @property
    def address(self) -> str:
        return self._opened().address

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        return self._opened().list(path, deadline_s=deadline_s)

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> Moved | None:
        return self._opened().get_range(obj, span, out=out, deadline_s=deadline_s)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()


class _Sender:
    """Sends whole frames from several threads."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def __call__(self, frame: Frame) -> None:
        if retries := taken_retries():
            frame = {**frame, "retries": retries}
        if ways := taken_ways():
            frame = {**frame, "ways": ways}
        data = encode(frame)
        with self._lock:
            try:
                self._channel.sendall(data)
            except OSError:  # the daemon is gone, and so are we
                os._exit(0)


def _receive(channel: socket.socket, replies: Replies) -> Iterator[Frame]:
    """Orders. Each `piece` has, in place of the daemon's own descriptor, the one that came with it, to be closed; and
    beside it the common file, if it is there. What replies are written to goes to `replies`.
    """
    decoder, came = Decoder(), deque[int]()
    common: Common | None = None
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(channel, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # the daemon died before it had read all our answers
            return
        if not data:
            return
        came.extend(fds)  # with the first byte of its order, and never two in one message
        for frame in decoder.feed(data):
            if frame.get("op") == "device":
                replies.device = Device(came.popleft()) if frame["is_there"] else None
                continue
            if "piece" in frame:
                piece = Piece(*frame["piece"])
                if piece.fd >= 0:
                    piece = piece._replace(fd=came.popleft())
                if piece.stays and piece.fd >= 0:
                    common, piece = Common(piece.fd), piece._replace(fd=-1)
                frame["piece"] = piece, common if piece.stays else None
            yield frame


if __name__ == "__main__":
    main()

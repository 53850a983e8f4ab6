"""A worker process: reads operations from its socket, runs them in threads, answers. `python -m mfs.workers.process`.

argv: socket fd, slots memfd. The first frame is the worker's configuration; the worker answers {hello: pid} or an
error. It lives exactly as long as its socket: the daemon's death, however it comes, ends it. (PR_SET_PDEATHSIG would
not do: it fires when the thread that started the process ends, and trio's threads come and go.)
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from mfs.cache.ssd import SsdConfig
from mfs.errors import to_wire
from mfs.sources import SourceOptions, open_source
from mfs.workers.frames import Decoder, Frame, encode
from mfs.workers.jobs import Jobs

logger = logging.getLogger(__name__)

_MADV_HUGEPAGE = 14


def main() -> None:
    """Run until the socket closes."""
    socket_fd, slots_fd = int(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # They reach the whole group or unit (Ctrl-C, systemd): what they mean, and when we end, the daemon decides.
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=socket_fd) as channel:
        frames = _receive(channel)
        setup = next(frames, None)
        if setup is None:
            return
        logging.basicConfig(
            level=setup["log_level"], stream=sys.stderr,
            format="%(asctime)s %(levelname)s worker[%(process)d] %(name)s: %(message)s",
        )  # fmt: skip
        logging.getLogger("botocore").setLevel(logging.WARNING)  # it names where each credential came from, at INFO
        send = _Sender(channel)
        try:
            jobs = _open_jobs(setup, slots_fd)
        except Exception as error:
            send({"id": 0, "error": to_wire(error)})
            return
        send({"id": 0, "result": {"hello": os.getpid(), "identities": jobs.identities}})
        _serve(frames, jobs, send)
    os._exit(0)  # threads may sit in a recv whose answer nobody wants any more


def _open_jobs(setup: Frame, slots_fd: int) -> Jobs:
    slots = mmap.mmap(slots_fd, os.fstat(slots_fd).st_size)
    slots.madvise(_MADV_HUGEPAGE)
    connections_max = setup["connections_max"]
    sources = [
        open_source(item["url"], SourceOptions(**item["options"], connections_max=connections_max))
        for item in setup["sources"]
    ]
    ssd = SsdConfig(Path(setup["cache_dir"]), setup["cache_fsync"]) if setup["cache_dir"] else None
    return Jobs(sources, memoryview(slots), ssd)


def _serve(frames: Iterator[Frame], jobs: Jobs, send: _Sender) -> None:
    # A thread is begun when none is idle: as many as operations were under way here at once, which the daemon bounds.
    work: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    idle = threading.Semaphore(0)
    for frame in frames:
        work.put(frame)
        if not idle.acquire(blocking=False):
            threading.Thread(target=_run, args=(work, idle, jobs, send), daemon=True).start()


def _run(work: queue.SimpleQueue[Frame], idle: threading.Semaphore, jobs: Jobs, send: _Sender) -> None:
    while True:
        frame = work.get()
        serial, operation = frame.pop("id"), frame.pop("op")

        def emit(part: Frame, serial: int = serial) -> None:
            send({"id": serial, "part": part})

        try:
            answer: Frame = {"id": serial, "result": getattr(jobs, operation)(**frame, emit=emit)}
        except Exception as error:
            answer = {"id": serial, "error": to_wire(error)}
            logger.debug("%s failed", operation, exc_info=True)
        idle.release()
        send(answer)


class _Sender:
    """Sends whole frames from several threads."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def __call__(self, frame: Frame) -> None:
        data = encode(frame)
        with self._lock:
            try:
                self._channel.sendall(data)
            except OSError:  # the daemon is gone, and so are we
                os._exit(0)


def _receive(channel: socket.socket) -> Iterator[Frame]:
    decoder = Decoder()
    while data := _receive_some(channel):
        yield from decoder.feed(data)


def _receive_some(channel: socket.socket) -> bytes:
    try:
        return channel.recv(1 << 16)
    except ConnectionResetError:  # the daemon died before it had read all our answers
        return b""


if __name__ == "__main__":
    main()

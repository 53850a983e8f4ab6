"""The process that exports a daemon's traces: `python -m mfs.tracing.process FD SECONDS`, started by `beside`.

Batches come over the socket as MessagePack, [row, …] each; each is answered in turn by '' or what went wrong. It ends
with the socket, and by SIGALRM where a batch takes SECONDS: the daemon that would kill it then may be gone. Beside
readers and fetches it steps back: what it does is late then, and bounded there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import msgpack

from mfs.errors import MfsError
from mfs.tracing.export import Exporter

_NICE = 19
_RECEIVE_BYTES = 1 << 18
FRAME_BYTES_MAX = 64 << 20
"""Of a batch, which has 600 KB."""


def main() -> None:
    """Export what comes until the socket closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group: what they mean the daemon decides
    exporter: Exporter | None = None
    batches = msgpack.Unpacker(max_buffer_size=FRAME_BYTES_MAX)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        while data := channel.recv(_RECEIVE_BYTES):
            batches.feed(data)
            for rows in batches:
                said = ""
                signal.alarm(int(sys.argv[2]))
                try:
                    if exporter is None:
                        exporter = Exporter("mfs")
                        os.nice(_NICE)  # only now: the imports would take seconds, and the first batch waits for them
                    exporter.export(rows)
                except MfsError as error:
                    said = str(error) or type(error).__name__
                signal.alarm(0)
                channel.sendall(msgpack.packb(said))


if __name__ == "__main__":
    try:
        main()
    except ConnectionError:  # the daemon is gone
        sys.exit(0)

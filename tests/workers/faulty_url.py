"""faulty:///folder: a folder whose reads are written down and fail or wait as files beside it say. In workers only.

Beside /folder, in /folder.faults: `log` gets a line "path start stop" per read; while `gate` exists reads wait for it
to go, or while `gate-MODEL` does those below that top-level directory; each file `fail-*` befalls one read: it holds
the name of an error class. `kill-after-reply` holds "worker" or "daemon": who is killed as soon as a worker has
answered a reader by itself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from mfs.errors import StoreError, TransientStoreError, from_wire
from mfs.sources.folder import FolderSource
from mfs.sources.options import SourceOptions
from mfs.types import ByteRange, ObjectId
from mfs.workers.replies import Replies


class FaultyFolder(FolderSource):
    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._faults = Path(f"{root}.faults")

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        line = f"{obj.path} {span.start} {span.stop}\n".encode()
        fd = os.open(self._faults / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)
        gates = self._faults / "gate", self._faults / f"gate-{obj.path.partition('/')[0]}"
        while any(gate.exists() for gate in gates):
            if time.monotonic() > deadline_s:
                raise TransientStoreError(f"{obj}: stalled until the deadline")
            time.sleep(0.005)
        for path in sorted(self._faults.glob("fail-*")):
            try:
                name = path.read_text()
                path.unlink()
            except FileNotFoundError:  # another read took it
                continue
            raise from_wire(name, f"{obj}: asked to fail")
        super().get_range(obj, span, out=out, deadline_s=deadline_s)


def open_url(url: str, options: SourceOptions) -> FaultyFolder:
    if not url.startswith("faulty:///"):
        raise StoreError(url)
    _kill_after_replies(Path(f"{url.removeprefix('faulty://')}.faults", "kill-after-reply"))
    return FaultyFolder(url.removeprefix("faulty://"))


def _kill_after_replies(order: Path) -> None:
    write = Replies.write

    def write_and_kill(self: Replies, replies: Mapping[bytes, tuple[int, int]], piece: memoryview) -> None:
        write(self, replies, piece)
        if replies and order.exists():
            victim = os.getpid() if order.read_text() == "worker" else os.getppid()
            order.unlink()
            os.kill(victim, signal.SIGKILL)
            time.sleep(5)  # nothing more of it: its worker ends with the daemon

    Replies.write = write_and_kill  # type: ignore[method-assign]

"""faulty:///folder: a folder whose reads are written down and fail or wait as files beside it say. In workers only.

Beside /folder, in /folder.faults: `log` gets a line "path start stop" per read; while `gate` exists reads wait for it
to go, or while `gate-MODEL` does those below that top-level directory; each file `fail-*` befalls one read: it holds
the name of an error class.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from mfs.errors import StoreError, TransientStoreError, from_wire
from mfs.sources.folder import FolderSource
from mfs.sources.options import SourceOptions
from mfs.types import ByteRange, ObjectId


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
    return FaultyFolder(url.removeprefix("faulty://"))

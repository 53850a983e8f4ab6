"""What a watched program did, added up per file from the records of `mfs.oplog`. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from mfs.control.api import Json


@dataclass
class FileUse:
    """One file's records added up."""

    file: str
    size: int = 0
    """Bytes, as far as an open was seen."""
    opens_count: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)
    """[start, stop) in the order in which they were answered."""
    errors_count: int = 0
    waited_s: float = 0.0
    """All reads' waiting added up; readers in parallel wait at the same time."""
    origin_bytes: int = 0
    ssd_bytes: int = 0
    ahead_bytes: int = 0
    """Of those two, what was brought before a reader waited for it."""

    def add(self, record: Json) -> None:
        match record["op"]:
            case "open":
                self.opens_count += 1
                self.size = record["size"]
            case "read":
                self.reads.append((record["start"], record["stop"]))
                self.waited_s += record["waited_s"]
                self.errors_count += "error" in record
            case "fetch":
                self.origin_bytes += record["origin_bytes"]
                self.ssd_bytes += record["ssd_bytes"]
                self.ahead_bytes += (record["origin_bytes"] + record["ssd_bytes"]) if record["ahead"] else 0

    @property
    def read_bytes(self) -> int:
        return sum(stop - start for start, stop in self.reads)

    @property
    def touched_bytes(self) -> int:
        """Bytes that were asked for at least once."""
        touched, reached = 0, 0
        for start, stop in sorted(self.reads):
            touched += max(0, stop - max(start, reached))
            reached = max(reached, stop)
        return touched

    @property
    def in_order_share(self) -> float:
        """Of the bytes asked for, those that began where some earlier read had ended, or at the file's start."""
        ends, in_order = {0}, 0
        for start, stop in self.reads:
            in_order += (stop - start) if start in ends else 0
            ends.add(stop)
        return in_order / self.read_bytes if self.read_bytes else 0.0

    def summary(self) -> Json:
        """For programs; sizes in bytes."""
        sizes = [stop - start for start, stop in self.reads]
        return {
            "file": self.file, "size": self.size, "opens_count": self.opens_count, "reads_count": len(sizes),
            "read_bytes": self.read_bytes, "touched_bytes": self.touched_bytes,
            "read_median_bytes": int(statistics.median(sizes)) if sizes else 0,
            "in_order_share": round(self.in_order_share, 3), "waited_s": round(self.waited_s, 3),
            "errors_count": self.errors_count, "origin_bytes": self.origin_bytes, "ssd_bytes": self.ssd_bytes,
            "ahead_bytes": self.ahead_bytes,
        }  # fmt: skip


class Uses:
    """All files' uses, in the order in which they were first touched."""

    def __init__(self) -> None:
        self._files: dict[str, FileUse] = {}

    def add(self, records: Iterable[Json]) -> None:
        for record in records:
            file = record["file"]
            if file not in self._files:
                self._files[file] = FileUse(file)
            self._files[file].add(record)

    def files(self) -> list[FileUse]:
        return list(self._files.values())

"""What a source of models is: something that lists directories and reads byte ranges of exact versions.

A source runs in the worker processes, never beside the FUSE loop: it may block, and is called from several threads.
A new source type is one module with a class of this shape and one line in `mfs.sources.open_source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mfs.types import ByteRange, Entry, ObjectId

Page = tuple[str, list[Entry]]
"""(directory path inside the source, some of its entries)."""


@dataclass(slots=True)
class Moved:
    """What a range cost, where that is not just its bytes in one request."""

    origin_bytes: int = 0
    """That the origin sent: fewer than the range where it sends them compressed."""
    shared_bytes: int = 0
    """That came from other files on this node's SSD, where they stood already."""
    requests: int = 0
    decode_s: float = 0.0
    """Seconds that went into unpacking and verifying, where that takes any."""

    def __iadd__(self, other: Moved) -> Moved:
        self.origin_bytes += other.origin_bytes
        self.shared_bytes += other.shared_bytes
        self.requests += other.requests
        self.decode_s += other.decode_s
        return self


class Source(Protocol):
    """One origin of models. Construction does no I/O; the first `list` says whether the origin can be used."""

    identity: str
    """Stable name of this origin: part of every ObjectId, so equal over restarts, mounts and machines."""

    @property
    def address(self) -> str:
        """URL of the server that is asked first, for who looks whether it can be reached; '' where no network is.

        Without what lets anybody in: what it answers to whoever asks it may be a refusal.
        """
        ...

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield pages of directory `path` ('' is the root), and of directories below it where that costs nothing.

        A directory may come in several pages. Directories seen in any page are complete once the iterator ends
        without an error; nothing may be published before. A directory without entries is yielded with an empty page.
        deadline_s: time.monotonic() value after which the call gives up.
        Raises: NotFoundError, AccessError, StoreError (retries inside the deadline are the source's business).
        """
        ...

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> Moved | None:
        """Fill `out` with bytes [span.start, span.stop) of exactly this version.

        Returns what that cost, None where it was one request for just these bytes.

        out: writable, C-contiguous uint8, len(out) == len(span). Undefined after any exception: do not publish it.
        deadline_s: time.monotonic() value after which the call gives up; attempts in between are retried.
        Raises: ChangedError if the source holds another version now; NotFoundError, AccessError, IntegrityError,
            StoreError otherwise.
        Source: RFC 9110 §13.1.1 If-Match, §14.2 Range.
        """
        ...

    def close(self) -> None:
        """Drop connections. Calls under way end with StoreError."""
        ...


def name_fault(name: str) -> str | None:
    """Why `name` cannot be a file name in the tree, or None if it can.

    Names come from strangers: a registry must not reach outside the mount or forge terminal output.
    """
    if name in ("", ".", ".."):
        return "empty, '.' or '..'"
    if "/" in name:
        return "contains '/'"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        return "contains control characters"
    try:
        length_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if length_bytes > 255:
        return f"is {length_bytes} bytes long, more than 255"
    return None

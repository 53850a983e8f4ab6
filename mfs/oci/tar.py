"""The members of a tar, found by its headers alone: of a layer of some gigabytes a few kilobytes are read. Pure, over
a reader of ranges.

Known: ustar, pax and GNU's long names. Sparse members are left out, since their bytes do not stand in one piece. The
header's fields are read by `tarfile`; not its walk, which reads whatever size an extended header states, and goes
backwards where one states a negative number.

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from mfs.errors import StoreError, TransientStoreError
from mfs.fetch.dates import epoch_ns
from mfs.oci.artifact import BadLayerError
from mfs.sources import bounds

BLOCK = 512
MEMBERS_MAX = 200_000
"""Of one tar."""
_EXTENDED_BYTES_MAX = 1 << 20
"""Of one extended header: names have 4 kB at most."""
_EXTENDED_MAX = 8
"""Extended headers before one member: GNU's two and pax's two have one each."""
NAMES_MAX = 64 << 20
"""Characters in all names and targets of a listing together."""
_KEPT = frozenset({"path", "linkpath", "size", "mtime"})
"""Of what extended headers say; and whether anything begins with _SPARSE."""
_SPARSE = "GNU.sparse."
_WINDOW_BYTES_MIN, _WINDOW_BYTES_MAX = 4 << 10, 1 << 20

Read = Callable[[int, int], bytes]
"""(start, stop) -> exactly these bytes of the tar."""


class Kind(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    """Symbolic."""
    TWIN = "twin"
    """Another name of a file (a hard link)."""
    OTHER = "other"
    NAMELESS = "nameless"
    """Its name or target is longer than any can be; `path` is how it begins."""


class Member(NamedTuple):
    """One member. Names are as they stand, without what says nothing ('./', a leading '/')."""

    path: str
    kind: Kind
    offset: int = 0
    """Of the first byte, in the tar."""
    size: int = 0
    mtime_ns: int = 0
    target: str = ""
    """Of links, as it stands; of twins, a path in the tar."""
    fault: str = ""
    """Why it cannot be shown."""


class Allowance:
    """What the tars of one listing may hold together, counted while they are read, and until when that may take."""

    def __init__(self, where: str, deadline_s: float) -> None:
        self._where, self._deadline_s = where, deadline_s
        self._members_count = self._characters_count = 0

    def take_header(self) -> None:
        """Raises: TransientStoreError once the deadline has passed."""
        if time.monotonic() >= self._deadline_s:
            raise TransientStoreError(f"{self._where}: its tar layers were not read through before the deadline")

    def take(self, member: Member) -> Member:
        """The member, counted. Raises: StoreError for more than any listing has: half of it must not pass for all."""
        self._members_count += 1
        self._characters_count += len(member.path) + len(member.target)
        if self._members_count > bounds.ENTRIES_MAX:
            raise StoreError(f"{self._where}: more than {bounds.ENTRIES_MAX} names in its layers")
        if self._characters_count > NAMES_MAX:
            raise StoreError(f"{self._where}: more than {NAMES_MAX} characters in the names of its layers")
        return member


def members(read: Read, nbytes: int, allowance: Allowance) -> Iterator[Member]:
    """Every member of a tar of `nbytes`, in order.

    Raises: BadLayerError for what is no tar; whatever `read` and `allowance` do.
    """
    window = _Window(read, nbytes)
    at = members_count = extended_count = 0
    long: dict[str, str] = {}  # what extended headers say of the next member
    while True:
        allowance.take_header()
        if at + BLOCK > nbytes:
            if at != nbytes:
                raise BadLayerError(f"the tar ends within the header at {at}")
            return
        block = window.get(at, BLOCK)
        if not any(block):  # the end is blocks of zeros
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BadLayerError(f"no tar, or a broken one: at {at}: {error}") from None
        data = at + BLOCK
        size = header.size
        is_extended = header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE,
                                      tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        if not is_extended and "size" in long:
            if not (long["size"].isascii() and long["size"].isdigit() and len(long["size"]) < 20):
                raise BadLayerError(f"the member at {at} has the size {long['size'][:30]!r}")
            size = int(long["size"])
        holds = size if is_extended or _has_data(header.type) else 0
        if size < 0 or data + holds > nbytes:
            raise BadLayerError(f"the member at {at} has {size} bytes, the tar ends at {nbytes}")
        at = data + -(-holds // BLOCK) * BLOCK
        at = min(at, nbytes)  # the padding of the last may be missing
        if is_extended:
            extended_count += 1
            if extended_count > _EXTENDED_MAX:
                raise BadLayerError(f"more than {_EXTENDED_MAX} extended headers before one member")
            if size > _EXTENDED_BYTES_MAX:
                raise BadLayerError(f"an extended header of {size} bytes; expected {_EXTENDED_BYTES_MAX} at most")
            if header.type != tarfile.XGLTYPE:  # what is said of all says nothing of names and sizes
                long |= _extended(header.type, window.get(data, size))
            continue
        members_count += 1
        if members_count > MEMBERS_MAX:
            raise BadLayerError(f"more than {MEMBERS_MAX} members in one tar")
        yield allowance.take(_member(header, long, data, size))
        long, extended_count = {}, 0


def _has_data(kind: bytes) -> bool:
    return kind in tarfile.REGULAR_TYPES or kind not in tarfile.SUPPORTED_TYPES


def _member(header: tarfile.TarInfo, long: dict[str, str], data: int, size: int) -> Member:
    path, target = long.get("path", header.name), long.get("linkpath", header.linkname)
    for what, text in (("name", path), ("target", target)):
        if len(text) > bounds.PATH_BYTES_MAX:
            fault = f"has a {what} of {len(text)} characters, more than {bounds.PATH_BYTES_MAX}"
            return Member(_plain(path[:100]), Kind.NAMELESS, fault=fault)
    path = _plain(path)
    mtime_ns = epoch_ns(long.get("mtime")) or epoch_ns(header.mtime) or 0
    if header.type == tarfile.GNUTYPE_SPARSE or _SPARSE in long:
        return Member(path, Kind.OTHER, fault="is a sparse file, whose bytes do not stand in one piece")
    if header.isreg():
        return Member(path, Kind.FILE, data, size, mtime_ns)
    if header.isdir():
        return Member(path, Kind.DIRECTORY, mtime_ns=mtime_ns)
    if header.issym():
        return Member(path, Kind.LINK, mtime_ns=mtime_ns, target=target)
    if header.islnk():
        return Member(path, Kind.TWIN, mtime_ns=mtime_ns, target=_plain(target))
    return Member(path, Kind.OTHER, fault="is a device, a FIFO, or of a kind that is not known")


def _plain(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _extended(kind: bytes, body: bytes) -> dict[str, str]:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(body.partition(b"\0")[0])}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": _text(body.partition(b"\0")[0])}
    found: dict[str, str] = {}
    at = 0
    while at < len(body) and body[at : at + 1] != b"\0":
        digits = body[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = body[at + len(digits) + 1 : at + length]
        if length <= len(digits) or not record.endswith(b"\n") or b"=" not in record or at + length > len(body):
            raise BadLayerError(f"a broken record in an extended header: {body[at : at + 40]!r}")
        key, _, value = record[:-1].partition(b"=")
        name = _text(key)
        if name in _KEPT:
            found[name] = _text(value)
        elif name.startswith(_SPARSE):
            found[_SPARSE] = ""
        at += length
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class _Window:
    """Reads ahead where headers stand close to each other, and little where they do not."""

    def __init__(self, read: Read, nbytes: int) -> None:
        self._read = read
        self._nbytes = nbytes
        self._start = 0
        self._bytes = b""
        self._ahead = _WINDOW_BYTES_MIN

    def get(self, start: int, count: int) -> bytes:
        if not self._start <= start <= start + count <= self._start + len(self._bytes):
            is_near = start - (self._start + len(self._bytes)) < self._ahead
            self._ahead = min(2 * self._ahead, _WINDOW_BYTES_MAX) if self._bytes and is_near else _WINDOW_BYTES_MIN
            self._bytes = self._read(start, min(start + max(count, self._ahead), self._nbytes))
            self._start = start
        return self._bytes[start - self._start :][:count]

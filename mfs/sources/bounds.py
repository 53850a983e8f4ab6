"""How long, deep, large and late what an origin says may be: every number and length that strangers choose. Pure.

What is beyond costs the entry it belongs to, never the listing (`TreeBuilder`, `FolderSource`); `mfs.tree.listing`
holds the same bounds once more before anything is published. Only a listing with more names than any tree has is an
error as a whole: half of one must not pass for all of it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from mfs.sources.base import name_fault
from mfs.types import Entry, EntryKind

PATH_BYTES_MAX = 4095
"""Of a path inside its source: no program can name a longer one (Linux, PATH_MAX)."""
DEPTH_MAX = 512
"""Names in a path. A key of S3 has 1,024 bytes, so none is deeper; what publishing costs grows with it."""
FILE_BYTES_MAX = 16 << 40
"""As large as ext4 lets a file be. Tables count a file's chunks: 4 million of them still fit a frame."""
EMPTY_DIGEST = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""Of no bytes."""
VERSION_BYTES_MAX = 1024
LOCATOR_BYTES_MAX = 2048
DIGEST_BYTES_MAX = 128
"""Each travels with every order to a worker, and stands in memory once an entry. ETags have some 40 bytes."""
MTIME_NS_MAX = 9_214_646_400 * 10**9
"""2262-01-01: later dates are shown as this one. 64 bits of nanoseconds, as programs and the record of times keep them,
end in April of that year; a hundred days remain for the directories that must be later than all they hold."""
ENTRIES_MAX = 1_000_000
"""Files and directories that one answer, or one series of pages, may name."""
DIRECTORIES_MAX = 200_000
"""Of those, directories: each costs the daemon about 1.5 kB, and deep names make many of few bytes."""

_EXAMPLES_MAX = 3
_EXAMPLE_CHARACTERS_MAX = 100

log = logging.getLogger(__name__)


def path_fault(path: str) -> str | None:
    """Why `path`, inside its source, is too long or too deep for a tree; None if it is neither."""
    if len(path) * 4 > PATH_BYTES_MAX and (length := len(path.encode("utf-8", "surrogatepass"))) > PATH_BYTES_MAX:
        return f"the path is {length} bytes long, more than {PATH_BYTES_MAX}"
    if (depth := path.count("/") + 1) > DEPTH_MAX:
        return f"lies {depth} names deep, more than {DEPTH_MAX}"
    return None


def value_fault(entry: Entry) -> str | None:
    """Why what an origin says of an entry cannot be, whatever its name; None if it can."""
    if not 0 <= entry.size <= FILE_BYTES_MAX:
        size = str(entry.size) if abs(entry.size) < 10**30 else "of more than 30 digits"
        return f"has the size {size}, expected 0 to {FILE_BYTES_MAX}"
    if not entry.size and entry.digest and entry.digest.startswith("sha256:") and entry.digest != EMPTY_DIGEST:
        return f"has no bytes, and the {entry.digest[:19]}… of some"  # nothing is asked for: nothing else would tell
    most = PATH_BYTES_MAX if entry.kind is EntryKind.SYMLINK else VERSION_BYTES_MAX
    for what, text, bytes_max in (
        ("version", entry.version, most),
        ("locator", entry.locator, LOCATOR_BYTES_MAX),
        ("digest", entry.digest or "", DIGEST_BYTES_MAX),
    ):
        if len(text) * 4 > bytes_max and (length := len(text.encode("utf-8", "surrogatepass"))) > bytes_max:
            return f"has a {what} of {length} bytes, more than {bytes_max}"
    return None


def shown_ns(mtime_ns: int) -> int:
    """A time as a tree can show it: 0, which is none, for what is before 1970; never later than MTIME_NS_MAX."""
    return min(max(mtime_ns, 0), MTIME_NS_MAX)


def size_of(value: object) -> int:
    """Bytes, from a JSON number or the digits of one; -1, which `value_fault` refuses, for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():  # 1e3 is a number of JSON as good as 1000
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def parse_json(body: bytes) -> Any:
    """An origin's JSON. Bytes that are no UTF-8 become lone surrogates, which no name may hold.

    Raises: ValueError for what is no JSON, is nested deeper than anybody means it, or has more parts than a listing.
    """
    parts_count = body.count(b"{") + body.count(b"[")  # each becomes an object of 64 bytes or more
    if parts_count > 2 * ENTRIES_MAX:
        raise ValueError(f"{parts_count} objects and lists, more than {2 * ENTRIES_MAX}")
    try:
        return json.loads(body.decode(json.detect_encoding(body), "surrogateescape"), parse_int=_integer)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= 20 else float(text)  # Python refuses 4,301 digits, and with them the document


class LeftOut:
    """What of one listing cannot be shown, and why: one line of the log for all of it."""

    def __init__(self) -> None:
        self.count = 0
        self._examples: list[str] = []

    def note(self, name: str, why: str = "") -> None:
        """Count `name`; the first few are named."""
        self.count += 1
        if len(self._examples) < _EXAMPLES_MAX:
            shown = name if len(name) <= _EXAMPLE_CHARACTERS_MAX else f"{name[:_EXAMPLE_CHARACTERS_MAX]}…"
            self._examples.append(f"{shown!r} ({why})" if why else repr(shown))

    def __str__(self) -> str:
        """'3 names: 'a' (why), 'b' (why) and 1 more'; '' if all can be shown."""
        more = self.count - len(self._examples)
        names = "1 name" if self.count == 1 else f"{self.count} names"
        return f"{names}: {', '.join(self._examples)}{f' and {more} more' if more else ''}" if self.count else ""

    def say(self, where: str) -> None:
        """Log it, once; nothing if all can be shown."""
        if self.count:
            log.warning("%s: left out %s", where, str(self))
        self.count, self._examples = 0, []


def link_fault(folder: str, target: str) -> str | None:
    """Why a link in `folder`, a path inside its source, must not be shown: it could lead out. None if it cannot.

    Steps up are allowed at the start alone, so that no directory link on the way makes them lead higher than they look.
    """
    parts = target.split("/")
    up_count = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    if up_count > len(folder.split("/") if folder else []):
        return "leads out of the source"
    if any(name_fault(part) for part in parts[up_count:] if part != "."):
        return f"is a link to {target!r}"
    return None

"""Whether a file is a pickle, or holds one: by what is in it, whatever it is called.

Found are pickles of protocol 2 and later in any file, and of all protocols where the name says so; zip archives with a
pickle in them, which is what torch.save writes; numpy arrays of objects, alone or in an .npz. A '.bin' that is none of
these is fine. Not found are pickles inside compressed files and tar archives.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib

from mfs.registry.hashing import read_span
from mfs.sources import Source
from mfs.types import ObjectId

NAMES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".mar")
"""Names under which pickles go about, of protocols 0 and 1 too, which have no mark of their own."""

_HEAD_BYTES = 64 << 10
_OPCODES_ENOUGH = 24
"""So many opcodes in a row that make sense are a pickle: noise has one in four that does."""
_ZIP, _NPY = b"PK\x03\x04", b"\x93NUMPY"
_ARCHIVE_TAIL_BYTES_MAX = 64 << 20
"""Of an archive's directory that is looked at; a longer one is as good as a pickle."""


def fault(source: Source, obj: ObjectId) -> str | None:
    """What kind of pickle this file is or holds; None if it is none. Raises: as `Source.get_range`."""
    count = min(obj.size, _HEAD_BYTES)
    if not count:
        return None
    head = bytes(read_span(source, obj, 0, count, memoryview(bytearray(count))))
    if head[:4] == _ZIP:
        return _in_archive(source, obj)
    if head[:6] == _NPY:
        return "an array of pickled objects" if _has_objects(head) else None
    has_mark = len(head) > 1 and head[0] == 0x80 and head[1] in (2, 3, 4, 5)
    if (has_mark or obj.path.lower().endswith(NAMES)) and _is_pickle(head, is_whole=count == obj.size):
        return "a pickle"
    return None


def _is_pickle(head: bytes, *, is_whole: bool) -> bool:
    seen = 0
    try:
        for opcode, _, _ in pickletools.genops(io.BytesIO(head)):
            seen += 1
            if opcode.name == "STOP":
                return seen > 1
            if seen >= _OPCODES_ENOUGH:
                return True
    except Exception:  # an argument that goes on behind the head, in a pickle as in noise; the module raises many kinds
        return not is_whole and seen >= 3 and head[0] == 0x80
    return False


def _has_objects(head: bytes) -> bool:
    return b"'|O'" in head[:4096] or b"'O'" in head[:4096]


def _in_archive(source: Source, obj: ObjectId) -> str | None:
    try:
        with zipfile.ZipFile(io.BufferedReader(_Opened(source, obj))) as archive:
            if archive.start_dir < obj.size - _ARCHIVE_TAIL_BYTES_MAX:
                return "an archive whose directory is too long to look for pickles"
            for info in archive.infolist():
                if info.filename.lower().endswith((".pkl", ".pickle")):
                    return f"an archive with the pickle {info.filename!r:.100}"
                if info.filename.endswith(".npy") and not info.flag_bits & 1:
                    with archive.open(info) as member:
                        if _has_objects(member.read(4096)):
                            return f"an archive with pickled objects in {info.filename!r:.100}"
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, zlib.error):
        return "a damaged zip archive, in which a pickle may hide" if obj.path.lower().endswith(NAMES) else None
    return None


class _Opened(io.RawIOBase):
    """A file of a source, as zipfile wants one."""

    def __init__(self, source: Source, obj: ObjectId) -> None:
        self._source, self._obj, self._at = source, obj, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._obj.size}[whence]
        if at < 0:
            raise ValueError("before the file's beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        out = memoryview(buffer).cast("B")
        count = max(0, min(len(out), self._obj.size - self._at))
        if count:
            read_span(self._source, self._obj, self._at, self._at + count, out)
        self._at += count
        return count

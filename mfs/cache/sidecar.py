"""The format of the SSD tier. This docstring is its only reference; the functions below are pure.

Below the cache directory:

    mfs-cache.json                       {"format": 2}; a directory that holds anything else is refused
    v2/objects/<aa>/<cache_id>           data: the object's bytes at their own offsets, holes where blocks are missing,
                                         always exactly as long as the object; aa: the first two digits of cache_id
    v2/objects/<aa>/<cache_id>.sums      its sidecar: which blocks of it count, and their checksums
    v2/objects/<aa>/<cache_id>.new       a sidecar being made
    v2/names.lock                        byte n is locked by who makes or removes files of folder n of objects/
    v2/index/, v2/pins/                  `residency`'s tables and pins
    v2/evict.lock, v2/tree.sqlite        `workers.jobs`' and `tree.record`'s

ObjectId.cache_id names an object. A data file without a sidecar is nothing, nor is a sidecar without one. A sidecar is
a header page, then one record for each chunk; all integers are little-endian.

The header page, 4096 bytes:

     0  8s    magic b"MFSSUMS\\0"
     8  u32   format version, 2
    12  u32   state: 0 growing, 1 sealed
    16  u64   size of the object
    24  u64   inode of the data file that was sealed, 0 before
    32  u64   its modification time then, in ns since the epoch, 0 before
    40  40s   cache_id, ASCII
    80  u32   length of the identity, at most 3072
    84  identity: UTF-8 JSON [source, path, size, version, digest], cut off where it does not fit (people read it,
        and a scrub compares the digest)
  4088  u64   xxh3_64 of bytes 0 to 4088

A record, 512 bytes, so that it never straddles a page; all zero while nothing of its chunk counts:

     0  u32   blocks present, bit i for block i; never 0
     4  u32   chunk index
     8  u64   a random number, new at each writing: who finds the same record twice knows that none came in between
    16  32 x u64   xxh3_64 of each present block, 0 for absent ones
   272  16s   the era (`eras`) in which all of these blocks were written; zero if in several, or not known
   288  u64   modification time of the data file after the last of these writes, in ns since the epoch; 0 not known
   296  reserved, zero
   504  u64   xxh3_64 of bytes 0 to 504

Bytes under a promise never change: blocks are written before the record that promises them, a promise is taken back
before its bytes are punched out or written anew. So a kill at any instant leaves the old state or the new one. Without
fsync a power cut may leave garbage under a promise, or half a record: the checksums turn that into a miss.

Who changes things locks bytes of the sidecar (OFD locks, which die with their process): its byte 0 shared and the
record's first byte exclusive to write or drop a chunk; byte 0 exclusive to seal or remove the object. Readers lock
nothing and look twice where something does not verify.

Sealed: all blocks are there, forced to the disk, and each was either written in the era of the sealing or verified as
it stands on the disk. The first counts only while the file's time is the latest of all records, so that nobody wrote
to it after us. Nobody writes to the data file of a sealed object again, punches or truncates it: it leaves by unlink
alone, since the kernel may be handing its pages to readers (FUSE passthrough), past every check of ours. Only the very
file that was sealed, unwritten since, counts: its inode and time tell.
"""

from __future__ import annotations

import functools
import json
import secrets
import struct
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from mfs.cache import eras
from mfs.cache.chunks import full_mask
from mfs.cache.eras import Written
from mfs.types import BLOCKS_PER_CHUNK, CHUNK_BYTES, ObjectId

FORMAT = 2
"""Of the header; the directory has the same, see `directory`."""
HEADER_BYTES = 4096
RECORD_BYTES = 512
IDENTITY_BYTES_MAX = 3072
NOTHING = bytes(RECORD_BYTES)
"""The record of a chunk of which nothing counts."""
_MAGIC = b"MFSSUMS\0"
_HEADER = struct.Struct("<8sIIQQQ40sI")
_RECORD = struct.Struct(f"<IIQ{BLOCKS_PER_CHUNK}Q16sQ")
_SUM = struct.Struct("<Q")


UNWRITTEN = Written(eras.UNKNOWN, 0)
"""Nothing is known of when blocks were written: they count once they were verified."""


@dataclass(frozen=True)
class Header:
    """A sidecar's verified header."""

    cache_id: str
    object_bytes: int
    identity: str
    sealed: tuple[int, int] | None = None
    """(inode, modification time in ns) of the data file when it was sealed; None while the object grows."""

    @property
    def chunks_count(self) -> int:
        return -(-self.object_bytes // CHUNK_BYTES)

    @property
    def sidecar_bytes(self) -> int:
        return record_offset(self.chunks_count)

    @property
    def digest(self) -> str | None:
        """The digest that the source states, None if it states none or the identity is cut off."""
        try:
            digest = json.loads(self.identity)[4]
        except (ValueError, LookupError, TypeError):
            return None
        return digest if isinstance(digest, str) else None

    def chunk_bytes(self, index: int) -> int:
        """Length of a chunk."""
        return min(CHUNK_BYTES, self.object_bytes - index * CHUNK_BYTES)


@dataclass(frozen=True)
class Record:
    """A chunk's verified record."""

    mask: int
    sums: tuple[int, ...]
    raw: bytes
    """As it stands in the file."""
    written: Written = UNWRITTEN
    """In which era all of its blocks were written, and what time the file had after the last."""


def record_offset(index: int) -> int:
    """Where the record of a chunk stands in the sidecar."""
    return HEADER_BYTES + index * RECORD_BYTES


def header_of(obj: ObjectId) -> Header:
    """The header of an object that grows."""
    identity = json.dumps([obj.source, obj.path, obj.size, obj.version, obj.digest]).encode()[:IDENTITY_BYTES_MAX]
    return Header(obj.cache_id, obj.size, identity.decode("utf-8", "replace"))


def encode_header(header: Header) -> bytes:
    """The header page."""
    identity = header.identity.encode()[:IDENTITY_BYTES_MAX]
    page = bytearray(HEADER_BYTES)
    inode, mtime_ns = header.sealed or (0, 0)
    _HEADER.pack_into(
        page, 0, _MAGIC, FORMAT, header.sealed is not None, header.object_bytes, inode, mtime_ns,
        header.cache_id.encode(), len(identity),
    )  # fmt: skip
    page[_HEADER.size : _HEADER.size + len(identity)] = identity
    _SUM.pack_into(page, HEADER_BYTES - _SUM.size, xxh3_64_intdigest(bytes(page[: -_SUM.size])))
    return bytes(page)


@functools.lru_cache(maxsize=64)  # looked at with each order, and hardly ever another one
def parse_header(page: bytes) -> Header | None:
    """The header in a page, None if it does not verify."""
    if len(page) < HEADER_BYTES or _SUM.unpack_from(page, HEADER_BYTES - _SUM.size)[0] != xxh3_64_intdigest(
        page[: HEADER_BYTES - _SUM.size]
    ):
        return None
    magic, version, state, object_bytes, inode, mtime_ns, cache_id, identity_bytes = _HEADER.unpack_from(page)
    name = cache_id.decode("latin-1")
    if (
        (magic, version) != (_MAGIC, FORMAT)
        or state not in (0, 1)
        or not 0 < object_bytes < 2**63
        or identity_bytes > IDENTITY_BYTES_MAX
        or not is_cache_id(name)
    ):  # its checksum holds, so a program wrote it, but none that knows this format
        return None
    identity = page[_HEADER.size : _HEADER.size + identity_bytes].decode("utf-8", "replace")
    return Header(name, object_bytes, identity, (inode, mtime_ns) if state else None)


def encode_record(index: int, sums: dict[int, int], written: Written = UNWRITTEN) -> bytes:
    """The record of a chunk. sums: {block: checksum} of the blocks that count; written: see `Record`."""
    if not sums:
        return NOTHING
    raw = bytearray(RECORD_BYTES)
    mask = sum(1 << block for block in sums)
    _RECORD.pack_into(
        raw, 0, mask, index, secrets.randbits(64), *(sums.get(block, 0) for block in range(BLOCKS_PER_CHUNK)), *written
    )
    _SUM.pack_into(raw, RECORD_BYTES - _SUM.size, xxh3_64_intdigest(bytes(raw[: -_SUM.size])))
    return bytes(raw)


def parse_record(raw: bytes, index: int, length: int) -> Record | None:
    """The record of chunk `index`, which is `length` bytes long; None if it does not verify."""
    if raw == NOTHING:
        return Record(0, (), raw)
    if len(raw) < RECORD_BYTES or _SUM.unpack_from(raw, RECORD_BYTES - _SUM.size)[0] != xxh3_64_intdigest(
        raw[: RECORD_BYTES - _SUM.size]
    ):
        return None
    mask, found, _, *sums, era, mtime_ns = _RECORD.unpack_from(raw)
    if found != index or not mask or mask & ~full_mask(length):
        return None
    return Record(mask, tuple(sums), raw, Written(era, mtime_ns))


def is_cache_id(text: str) -> bool:
    """Whether this can be an ObjectId's cache_id."""
    return len(text) == 40 and not text.strip("0123456789abcdef")

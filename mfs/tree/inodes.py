"""Inode numbers: made of what they stand for, and back again.

A number is a hash of the source, the path and, for a file or a link, the version. So it stands for that one version for
ever, in every daemon of the mount: whoever takes a mount over need not be told what the kernel knows. The low 8 bits
are zero, and so is the highest; 0 is no inode, 1 the root.

Two names of one tree may meet in one number, once in a million trees of 300,000 files; `places` says what then. Pure.
"""

from __future__ import annotations

from array import array

from xxhash import xxh3_64_intdigest

HIDDEN = 0
"""Inode of an entry that is not shown."""
ROOT_INODE = 1
_KEPT = 0x7FFF_FFFF_FFFF_FF00
_SPARE = 0x100  # for the hash that would leave nothing


def entry_key(name: bytes, facts: bytes) -> int:
    """What tells an entry from others of its directory. facts: kind, size and version of a file; of a directory none.

    No name holds a zero byte, and the facts of a file are never empty.
    """
    return xxh3_64_intdigest(name + b"\0" + facts)


def directory_seed(mount: str, identity: str, path: str) -> int:
    """What tells a directory's entries from those of all others. mount: the source's name in this tree."""
    return xxh3_64_intdigest("\0".join((mount, identity, path)).encode("utf-8", "surrogatepass"))


def inode_of(key: int, seed: int) -> int:
    """The inode of an entry."""
    return ((key ^ seed) & _KEPT) or _SPARE


def inodes_of(keys: array[int], seed: int) -> array[int]:
    """Those of all entries of a directory, at once: 300,000 in a few ms."""
    size = len(keys) * keys.itemsize
    seeds, kept = (number.to_bytes(8, "little") * len(keys) for number in (seed, _KEPT))
    mixed = (int.from_bytes(keys.tobytes(), "little") ^ int.from_bytes(seeds, "little")) & int.from_bytes(
        kept, "little"
    )
    found = array("Q", mixed.to_bytes(size, "little"))
    if 0 in found:
        found = array("Q", (inode or _SPARE for inode in found))
    return found

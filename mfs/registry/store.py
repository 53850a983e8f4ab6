"""What a registry stands on: a store of immutable objects below one prefix. Each kind is one module.

Keys are relative to the registry's root and '/'-separated (`layout` makes them). All methods may block, and may be
called from several threads. Deadlines are time.monotonic() values; retries inside them are the store's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from mfs.types import ByteRange

SMALL_BYTES_MAX = 64 << 20
"""The longest object that `Store.read` brings: a manifest (`manifest.BYTES_MAX`)."""


class Stored(NamedTuple):
    """One object, as a listing has it."""

    key: str
    size: int
    """Bytes."""
    modified_ns: int
    """By the store's clock, since the epoch; whole seconds on most."""


class Store(Protocol):
    """Objects below one prefix. Construction does no I/O."""

    identity: str
    """Stable name of the place: equal over restarts and machines. No secret in it."""
    can_write: bool
    """Whether this kind of store can be written at all; a store on the web only reads."""

    def read(self, key: str, *, bytes_max: int = SMALL_BYTES_MAX, deadline_s: float) -> bytes:
        """A small object, whole. Raises: NotFoundError, AccessError, StoreError.

        bytes_max: of what is longer no more is read than shows it, and that is a StoreError.
        """
        ...

    def read_range(self, key: str, span: ByteRange, *, size: int, out: memoryview, deadline_s: float) -> None:
        """Fill `out` with bytes [span.start, span.stop) of an object.

        size: what the object is thought to have. out: as in `Source.get_range`.
        Raises: ChangedError if it has another size; NotFoundError, AccessError, IntegrityError, StoreError.
        """
        ...

    def doubt(self, key: str) -> None:
        """What `read_range` brought of an object was not its bytes: if it was a cache that gave them, ask none for it,
        for a while.
        """
        ...

    def size(self, key: str, *, deadline_s: float) -> int | None:
        """Bytes of an object, None if there is none. Raises: AccessError, StoreError."""
        ...

    def list(self, prefix: str, *, deadline_s: float) -> Iterator[Stored]:
        """Every object whose key begins with `prefix` (which ends in '/'), in the order of keys; none is no error."""
        ...

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[str]:
        """The first components of keys below `prefix` ('' or ending in '/'), each once, in the order of keys."""
        ...

    def create(self, key: str, body: bytes, *, deadline_s: float) -> bool:
        """Write an object unless there is one: whether it is ours. Atomic: seen whole, or not at all.

        Of two at once one gets True, if the store knows conditional writes; `is_conditional` says. A lost answer is
        settled by reading back (FORMAT.md, "A conditional write whose answer is lost"): bodies of keys that others may
        want too hold a token of their writer.
        Raises: AccessError, StoreError.
        """
        ...

    def write(self, key: str, body: bytes | memoryview, *, deadline_s: float) -> None:
        """Write an object, replacing what is there. Atomic likewise. Raises: AccessError, StoreError."""
        ...

    def delete(self, keys: Iterable[str], *, deadline_s: float) -> None:
        """Remove objects; those that are not there are no error. Raises: AccessError, StoreError."""
        ...

    def is_conditional(self, *, deadline_s: float) -> bool:
        """Whether the store itself decides `create`. Where not, two at once may both get True: who must know asks.

        Asked of the server once, by a write that cannot be taken.
        """
        ...

    def close(self) -> None:
        """Drop connections."""
        ...

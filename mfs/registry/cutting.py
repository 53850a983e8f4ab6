"""Where a file is cut into chunks. Pure; decided by sizes and tensors alone, never by content. FORMAT.md, "Chunks".

Equal tensors make equal chunks, in whichever file they stand: a tensor of ALONE_BYTES or more is cut from its own first
byte, so that nothing before it matters. Smaller ones are grouped with their neighbours, since a chunk each would cost a
request each; a large tensor, another element width or another file begins a new group, so that what a fine-tune adds in
one place moves few others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mfs.registry.manifest import CHUNK_BYTES_MAX
from mfs.safetensors import DTYPE_BITS, Header

ALONE_BYTES = 1 << 20
"""A tensor of so many bytes shares no chunk; smaller ones share up to so many."""


class Span(NamedTuple):
    """One chunk of a file."""

    start: int
    stop: int
    """Never equal to `start`, and at most CHUNK_BYTES_MAX behind it."""
    element_bytes: int
    """What its planes and differences are taken by: 1, 2, 4 or 8."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def element_bytes(dtype: str) -> int:
    """Bytes of a number of this dtype, as a chunk's table states it; 1 for those of a byte and less.

    A C64 is two numbers of 4 bytes.
    """
    return 4 if dtype == "C64" else max(1, DTYPE_BITS.get(dtype, 8) // 8)


def cut_plain(size: int) -> list[Span]:
    """The chunks of a file that is only bytes."""
    return list(_pieces(0, size, 1))


def cut_safetensors(header: Header) -> list[Span]:
    """The chunks of a safetensors file: first the header's, then those of its tensors."""
    return [*_pieces(0, header.data_start, 1), *_of_tensors(header)]


def _of_tensors(header: Header) -> Iterator[Span]:
    group: Span | None = None
    for tensor in header.tensors:
        if not tensor.nbytes:
            continue
        width = element_bytes(tensor.dtype)
        if group and (width != group.element_bytes or tensor.stop - group.start > ALONE_BYTES):
            yield group
            group = None
        if tensor.nbytes >= ALONE_BYTES:
            yield from _pieces(tensor.start, tensor.stop, width)
        else:
            group = Span(group.start if group else tensor.start, tensor.stop, width)
    if group:
        yield group


def _pieces(start: int, stop: int, width: int) -> Iterable[Span]:
    for at in range(start, stop, CHUNK_BYTES_MAX):
        yield Span(at, min(at + CHUNK_BYTES_MAX, stop), width)

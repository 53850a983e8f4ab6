"""Where files are cut: nothing missed, nothing twice, nothing empty, and equal tensors alike wherever they stand."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mfs.registry.cutting import ALONE_BYTES, Span, cut_plain, cut_safetensors, element_bytes
from mfs.registry.manifest import CHUNK_BYTES_MAX
from mfs.safetensors import DTYPE_BITS, Header, parse_header

WHOLE = [dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]


def header_of(*tensors: tuple[str, int], padding: int = 0) -> Header:
    """The header of a file with tensors of these dtypes and so many elements, in this order."""
    entries, at = {}, 0
    for number, (dtype, count) in enumerate(tensors):
        end = at + count * DTYPE_BITS[dtype] // 8
        entries[f"t{number}"] = {"dtype": dtype, "shape": [count], "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode() + b" " * padding
    return parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text) + at)


def check_cover(spans: list[Span], size: int) -> None:
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])][: len(spans)]
    assert (spans[-1].stop if spans else 0) == size
    assert all(0 < span.nbytes <= CHUNK_BYTES_MAX and span.element_bytes in (1, 2, 4, 8) for span in spans)


counts = st.integers(0, 40) | st.integers(0, 3 * ALONE_BYTES) | st.integers(0, 3 * CHUNK_BYTES_MAX)


@given(st.integers(0, 4 * CHUNK_BYTES_MAX))
def test_a_file_of_bytes_is_covered(size: int) -> None:
    check_cover(cut_plain(size), size)


@given(st.lists(st.tuples(st.sampled_from(WHOLE), counts), max_size=30))
def test_a_safetensors_file_is_covered_and_no_chunk_mixes(tensors: list[tuple[str, int]]) -> None:
    header = header_of(*tensors)
    spans = cut_safetensors(header)
    check_cover(spans, header.file_bytes)
    assert spans[0] == Span(0, header.data_start, 1)
    for span in spans[1:]:
        inside = [t for t in header.tensors if t.nbytes and t.start < span.stop and t.stop > span.start]
        assert {element_bytes(t.dtype) for t in inside} == {span.element_bytes}
        if len(inside) > 1:
            assert span.nbytes <= ALONE_BYTES
            assert (inside[0].start, inside[-1].stop) == (span.start, span.stop)
        elif inside[0].nbytes >= ALONE_BYTES:
            assert (span.start - inside[0].start) % CHUNK_BYTES_MAX == 0


@given(st.lists(st.tuples(st.sampled_from(WHOLE), st.integers(1, 3 * ALONE_BYTES)), max_size=8), st.integers(0, 999))
def test_what_stands_before_a_large_tensor_does_not_move_its_cuts(before: list[tuple[str, int]], padding: int) -> None:
    large = ("BF16", 5 * CHUNK_BYTES_MAX // 2 + 7)

    def cuts(header: Header) -> list[tuple[int, int]]:
        start = header.tensors[-1].start
        return [(s.start - start, s.stop - start) for s in cut_safetensors(header) if s.start >= start]

    assert cuts(header_of(*before, large, padding=padding)) == cuts(header_of(large))


def test_a_header_longer_than_a_chunk_is_cut_too() -> None:
    header = header_of(("F32", 3), padding=CHUNK_BYTES_MAX)
    spans = cut_safetensors(header)
    check_cover(spans, header.file_bytes)
    assert [span.start for span in spans] == [0, CHUNK_BYTES_MAX, header.data_start]

"""Every codec gives back what was put in, never makes a frame larger, and refuses what it cannot decode."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs.errors import IntegrityError
from mfs.registry import codecs
from mfs.registry.chunk import DEPTH_MAX, FRAME_BYTES, Table, parse_table, table_bytes
from mfs.registry.chunk_io import decode_chunk
from mfs.registry.encode import Base, Effort, Encoded, encode_chunk

WIDTHS = st.sampled_from([1, 2, 4, 8])
ALL = (codecs.RAW, codecs.ZSTD, codecs.PLANES, codecs.DIFFERENCE)


def weights(nbytes: int, seed: int, dtype: str = "bf16") -> bytes:
    """Numbers as weights are spread; 'bf16' by cutting float32."""
    numbers = np.random.default_rng(seed).standard_normal(nbytes // 2 + 8, np.float32) * 0.05
    if dtype == "bf16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:nbytes]
    return numbers.astype(dtype).tobytes()[:nbytes]


def nudged(plain: bytes, seed: int) -> bytes:
    """The same bf16 weights after some training: a few units in the last place."""
    words = np.frombuffer(plain, np.uint16, len(plain) // 2)
    moved = words + np.random.default_rng(seed).integers(-3, 4, len(words)).astype(np.uint16)
    return moved.tobytes() + plain[moved.nbytes :]


def decoded(encoded: Encoded, base: bytes | None = None) -> bytes:
    """As a reader has it, who knows the id and the length."""
    table = parse_table(encoded.body, encoded.table.id, encoded.table.plain_bytes)
    assert table == encoded.table
    assert table.stored_bytes == len(encoded.body)
    return bytes(decode_chunk(table, memoryview(encoded.body), None if base is None else memoryview(base)))


contents = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.builds(weights, st.integers(1, 3 * FRAME_BYTES), st.integers(0, 9), st.sampled_from(["bf16", "f4", "f2", "i1"])),
    st.builds(bytes, st.integers(1, 2 * FRAME_BYTES)),
    st.builds(lambda n: b"weight" * n, st.integers(1, 40_000)),
)


@settings(max_examples=60, deadline=None)
@given(contents, WIDTHS, st.sampled_from(Effort))
def test_what_is_encoded_alone_comes_back(plain: bytes, width: int, effort: Effort) -> None:
    encoded = encode_chunk(memoryview(plain), width, effort)
    assert decoded(encoded) == plain
    assert len(encoded.body) == encoded.alone_bytes <= table_bytes(len(plain)) + len(plain)
    assert (encoded.table.depth, encoded.table.base) == (0, None)
    if effort is Effort.NONE:
        assert {frame.codec for frame in encoded.table.frames} == {codecs.RAW}


@settings(max_examples=60, deadline=None)
@given(contents, WIDTHS, st.integers(0, 9), st.integers(0, DEPTH_MAX))
def test_what_is_encoded_as_a_difference_comes_back(plain: bytes, width: int, seed: int, depth: int) -> None:
    base = nudged(plain, seed)
    encoded = encode_chunk(memoryview(plain), width, Effort.FAST, Base("ab" * 32, depth, memoryview(base)))
    is_difference = encoded.table.depth > 0
    assert decoded(encoded, base if is_difference else None) == plain
    assert len(encoded.body) <= encoded.alone_bytes <= table_bytes(len(plain)) + len(plain)
    if is_difference:
        assert (encoded.table.depth, encoded.table.base) == (depth + 1, "ab" * 32)
        assert depth < DEPTH_MAX
        assert len(encoded.body) < 0.99 * encoded.alone_bytes


def test_real_weights_come_to_their_entropy() -> None:
    """Of 16 bits the 8 of sign and mantissa are noise, the 8 of the exponent hold some 2.6."""
    plain = weights(8 * FRAME_BYTES, 1)
    assert len(encode_chunk(memoryview(plain), 2).body) < 0.68 * len(plain)
    trained = encode_chunk(memoryview(nudged(plain, 2)), 2, Effort.FAST, Base("ab" * 32, 0, memoryview(plain)))
    assert len(trained.body) < 0.30 * len(plain)
    assert 0.6 * len(plain) < trained.alone_bytes < 0.68 * len(plain)


def test_a_base_that_does_not_help_is_not_used() -> None:
    plain, other = weights(2 * FRAME_BYTES, 1), weights(2 * FRAME_BYTES, 2)
    assert encode_chunk(memoryview(plain), 2, Effort.FAST, Base("ab" * 32, 0, memoryview(other))).table.base is None


def try_decode(codec: int, width: int, stored: bytes, plain_bytes: int, base: memoryview | None) -> bool:
    """Whether it was decoded; the one error it may raise otherwise."""
    out = memoryview(bytearray(plain_bytes))
    try:
        codecs.decode(codec, width, memoryview(stored), out, base)
    except IntegrityError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 255), WIDTHS, st.binary(max_size=300), st.integers(1, 400), st.booleans())
def test_noise_is_refused_or_decoded(codec: int, width: int, stored: bytes, plain_bytes: int, has_base: bool) -> None:
    try_decode(codec, width, stored, plain_bytes, memoryview(bytes(plain_bytes)) if has_base else None)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ALL), WIDTHS, st.data())
def test_a_frame_with_changed_bytes_is_refused_or_decoded(codec: int, width: int, data: st.DataObject) -> None:
    plain, base = weights(5000 + width - 1, 3), weights(5000 + width - 1, 4)
    if codec in (codecs.PLANES, codecs.DIFFERENCE):
        is_difference = codec == codecs.DIFFERENCE
        view = memoryview(plain)
        planes, tail = codecs.planes_of_difference(width, view, memoryview(base)) if is_difference else (
            codecs.planes_of(width, view)
        )  # fmt: skip
        packed: list[bytes | None] = [zstandard.ZstdCompressor().compress(plane) for plane in planes]
        stored = bytearray(codecs.join_planes(planes, packed, tail))
    else:
        stored = bytearray(plain if codec == codecs.RAW else zstandard.ZstdCompressor().compress(plain))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, min(60, len(stored) - 1)) | st.integers(0, len(stored) - 1))
        stored[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(stored)) | st.just(len(stored)))
    try_decode(codec, width, bytes(stored[:cut]), len(plain), memoryview(base))


def test_a_bomb_is_refused_before_anything_is_allocated() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(FRAME_BYTES))
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    ).compressobj(size=FRAME_BYTES)
    wide_frame = wide.compress(weights(FRAME_BYTES, 1)) + wide.flush()
    plane = (4 << 20).to_bytes(4, "little")
    tracemalloc.start()
    for stored in (bomb, unsized, wide_frame[:-9], bomb + bomb, plane * 2, b"\xff" * 40):
        for codec in (codecs.ZSTD, codecs.PLANES):
            assert not try_decode(codec, 2, stored, FRAME_BYTES, None)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("codec", [codecs.PLANES, codecs.DIFFERENCE])
def test_what_lacks_its_base_or_its_width_is_refused(codec: int) -> None:
    assert not try_decode(codec, 1 if codec == codecs.PLANES else 2, bytes(100), 100, None)
    assert not try_decode(codecs.DIFFERENCE, 2, bytes(100), 100, memoryview(bytes(99)))


def test_a_table_of_an_unknown_codec_is_refused() -> None:
    encoded = encode_chunk(memoryview(weights(300, 1)), 2)
    body = bytearray(encoded.body)
    body[64 + 36] = 0x7E
    with pytest.raises(IntegrityError, match="codec that is not known"):
        parse_table(bytes(body), encoded.table.id, 300)
    assert isinstance(encoded.table, Table)

"""mfs.safetensors against the reference reader: the same files accepted and refused, the differences named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from mfs.errors import IntegrityError
from mfs.safetensors import DTYPE_BITS, HEADER_BYTES_MAX, Header, header_bytes_needed, parse_header


def _file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _ours(blob: bytes) -> Header | None:
    try:
        return parse_header(blob, len(blob))
    except IntegrityError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    return None


def _reference(blob: bytes, path: Path) -> dict[str, tuple[str, list[int]]] | None:
    path.write_bytes(blob)
    try:
        with safe_open(path, "np") as f:
            return {k: (f.get_slice(k).get_dtype(), f.get_slice(k).get_shape()) for k in f.offset_keys()}
    except SafetensorError:
        return None


def _agree(blob: bytes, path: Path) -> None:
    ours, reference = _ours(blob), _reference(blob, path)
    assert (ours is None) == (reference is None), blob[:400]
    if ours is not None and reference is not None:
        assert {t.name: (t.dtype, list(t.shape)) for t in ours.tensors} == reference
        assert all(a.stop == b.start for a, b in zip(ours.tensors, ours.tensors[1:], strict=False))


def _braced(inside: str) -> str:
    return "{" + inside + "}"


ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
CASES = {
    "plain": _braced(ENTRY),
    "leading space": " \n" + _braced(ENTRY),
    "trailing space": _braced(ENTRY) + "  \n",
    "trailing word": _braced(ENTRY) + "x",
    "trailing form feed": _braced(ENTRY) + "\x0c",
    "trailing nul": _braced(ENTRY) + "\0",
    "byte order mark": "\ufeff" + _braced(ENTRY),
    "null metadata": f'{{"__metadata__":null,{ENTRY}}}',
    "two metadata": f'{{"__metadata__":{{}},"__metadata__":{{}},{ENTRY}}}',
    "metadata key twice": f'{{"__metadata__":{{"x":"1","x":"2"}},{ENTRY}}}',
    "metadata number": f'{{"__metadata__":{{"x":1}},{ENTRY}}}',
    "metadata number hidden by a second": f'{{"__metadata__":{{"x":1,"x":"2"}},{ENTRY}}}',
    "metadata list": f'{{"__metadata__":[],{ENTRY}}}',
    "field twice": '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "extra key": _braced(ENTRY.replace("}", ',"z":[1,{"q":null}]}')),
    "extra key twice": _braced(ENTRY.replace("}", ',"z":1,"z":2}')),
    "extra number too large": _braced(ENTRY.replace("}", ',"z":1e999}')),
    "extra integer too large": _braced(ENTRY.replace("}", ',"z":' + "9" * 400 + "}")),
    "extra integer large": _braced(ENTRY.replace("}", ',"z":' + "9" * 30 + "}")),
    "extra nan": _braced(ENTRY.replace("}", ',"z":NaN}')),
    "extra lone surrogate": _braced(ENTRY.replace("}", ',"z":"\\ud800"}')),
    "name with a lone surrogate": _braced(ENTRY.replace('"a"', '"a\\ud800"')),
    "name with a surrogate pair": _braced(ENTRY.replace('"a"', '"a\\ud83d\\ude00"')),
    "name with a control character": _braced(ENTRY.replace('"a"', '"a\n"')),
    "nested 125": _braced(ENTRY.replace("}", ',"z":' + "[" * 125 + "]" * 125 + "}")),
    "nested 126": _braced(ENTRY.replace("}", ',"z":' + "[" * 126 + "]" * 126 + "}")),
    "nested 5000": _braced(ENTRY.replace("}", ',"z":' + "[" * 5000 + "]" * 5000 + "}")),
    "float shape": _braced(ENTRY.replace("[2]", "[2.0]")),
    "boolean shape": _braced(ENTRY.replace("[2]", "[2,true]")),
    "negative shape": _braced(ENTRY.replace("[2]", "[-2]")),
    "three offsets": _braced(ENTRY.replace("[0,8]", "[0,8,9]")),
    "offsets reversed": _braced(ENTRY.replace("[0,8]", "[8,0]")),
    "offsets as an object": _braced(ENTRY.replace("[0,8]", '{"0":0,"1":8}')),
    "hole at the front": _braced(ENTRY.replace("[0,8]", "[4,12]")),
    "name twice": f'{{"a":{{"dtype":"I32","shape":[2],"data_offsets":[0,8]}},{ENTRY}}}',
    "name twice, first invalid": f'{{"a":{{"dtype":"I33","shape":[2],"data_offsets":[0,8]}},{ENTRY}}}',
    "name twice, first elsewhere": f'{{"a":{{"dtype":"I32","shape":[2],"data_offsets":[8,16]}},{ENTRY}}}',
    "overlap": f'{{"b":{{"dtype":"I32","shape":[2],"data_offsets":[0,8]}},{ENTRY}}}',
    "size mismatch": _braced(ENTRY.replace("[2]", "[3]")),
    "unknown dtype": _braced(ENTRY.replace("F32", "F33")),
    "lower case dtype": _braced(ENTRY.replace("F32", "f32")),
    "no offsets": '{"a":{"dtype":"F32","shape":[2]}}',
    "list": "[]",
    "empty": "",
    "zero times huge": f'{{{ENTRY},"b":{{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[8,8]}}}}',
    "huge times zero": f'{{{ENTRY},"b":{{"dtype":"F32","shape":[18446744073709551615,2,0],"data_offsets":[8,8]}}}}',
    "2^64 elements": _braced(ENTRY.replace("[2]", "[4294967296,4294967296]")),
    "2^64 bits": _braced(ENTRY.replace("[2]", "[4294967296,1073741824]")),
    "dimension of 2^64": _braced(ENTRY.replace("[2]", "[18446744073709551616]")),
    "half a byte": '{"a":{"dtype":"F4","shape":[15],"data_offsets":[0,8]}}',
    "sixteen nibbles": '{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}',
    "other order": '{"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},"a":{"dtype":"U8","shape":[4],'
    '"data_offsets":[0,4]}}',
    "unaligned": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[7],'
    '"data_offsets":[1,8]}}',
    "extra entry": _braced(ENTRY.replace("}", ',"z":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')),
    "nested 123 and an entry": _braced(
        ENTRY.replace("}", ',"z":' + "[" * 123 + _braced(ENTRY[4:])[1:-1] + "]" * 123 + "}")
    ),
    "nested 124 and an entry": _braced(
        ENTRY.replace("}", ',"z":' + "[" * 124 + _braced(ENTRY[4:])[1:-1] + "]" * 124 + "}")
    ),
    "extra entry, too large": _braced(ENTRY.replace("}", ',"z":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}')),
    "metadata as an entry": f'{{"__metadata__":{ENTRY[4:]},{ENTRY}}}',
    "an entry alone": ENTRY[4:],
    "tensors named as fields": f'{{"dtype":{ENTRY[4:]},"shape":{ENTRY[4:]},"data_offsets":{ENTRY[4:]}}}',
    "empty tensors named as fields": _braced(
        ",".join(f'"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for name in ("shape", "data_offsets"))
        + ',"dtype":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    ),
    "fields in another order": '{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}',
    "scalar": '{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES.keys())
def test_crafted_headers_are_judged_as_the_reference_does(text: str, tmp_path: Path) -> None:
    _agree(_file(text.encode("utf-8", "surrogatepass"), b"\0" * 8), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "ours_accepts"),
    [
        (b'{"a":["F32",[2],[0,8]]}', False),
        (b'{"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}', False),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', True),
    ],
    ids=["entry as a list", "dtype as an object", "minus zero"],
)
def test_named_differences(header: bytes, ours_accepts: bool, tmp_path: Path) -> None:
    """The three places where we and the reference part; if this fails, the module docstring is out of date."""
    blob = _file(header, b"\0" * 8)
    assert (_ours(blob) is not None) is ours_accepts
    assert (_reference(blob, tmp_path / "x.safetensors") is not None) is not ours_accepts


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    nbytes = 16 * DTYPE_BITS[dtype] // 8
    header = json.dumps({"a": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    blob = _file(header, bytes(nbytes))
    _agree(blob, tmp_path / "x.safetensors")
    parsed = parse_header(blob, len(blob))
    assert parsed.tensors[0].nbytes == nbytes == parsed.data_bytes
    assert parsed.oddities == ()


def test_oddities_are_named() -> None:
    header = (
        b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"note":1},'
        b'"b":{"dtype":"F16","shape":[2],"data_offsets":[1,5]},"b":{"dtype":"F16","shape":[2],"data_offsets":[1,5]}}'
    )
    header += b" " * (-len(header) % 8)
    blob = _file(header, bytes(5))
    oddities = " | ".join(parse_header(blob, len(blob)).oddities)
    for word in ("begin with", "unknown keys", "more than once", "not aligned"):
        assert word in oddities


def test_the_header_alone_is_enough() -> None:
    blob = _file(_braced(ENTRY).encode(), bytes(8))
    needed = header_bytes_needed(blob[:8])
    header = parse_header(blob[:needed], len(blob))
    assert header.data_start == needed
    assert (header.tensors[0].start, header.tensors[0].stop) == (needed, needed + 8)
    with pytest.raises(ValueError, match="buffer holds"):
        parse_header(blob[: needed - 1], len(blob))


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_truncated_files(cut: int, tmp_path: Path) -> None:
    blob = _file(_braced(ENTRY).encode(), bytes(8))
    _agree(blob[:cut], tmp_path / "x.safetensors")
    assert _ours(blob[:cut]) is None


def test_header_length_limit() -> None:
    with pytest.raises(IntegrityError, match="more than 100000000"):
        header_bytes_needed(struct.pack("<Q", HEADER_BYTES_MAX + 1))
    assert header_bytes_needed(struct.pack("<Q", HEADER_BYTES_MAX)) == HEADER_BYTES_MAX + 8


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def nearly_valid(draw: st.DrawFn) -> bytes:
    """A valid file, then some of its fields bent, then perhaps some bytes flipped."""
    header: dict[str, object] = {}
    reached = 0
    for name in draw(st.lists(st.text(max_size=6), max_size=5, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        elements = 1
        for n in shape:
            elements *= n
        nbytes = elements * DTYPE_BITS[dtype] // 8
        entry: dict[str, object] = {"dtype": dtype, "shape": shape, "data_offsets": [reached, reached + nbytes]}
        reached += nbytes
        bend = draw(st.integers(0, 12))
        if bend == 0:
            entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(JSON_VALUES)
        elif bend == 1:
            entry["data_offsets"] = [draw(st.integers(-2, 40)), draw(st.integers(-2, 40))]
        elif bend == 2:
            del entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))]
        header[name] = entry
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2) | JSON_VALUES
        )
    items = draw(st.permutations(list(header.items())))
    text = json.dumps(dict(items), ensure_ascii=draw(st.booleans())).encode()
    blob = bytearray(
        _file(text + b" " * draw(st.integers(0, 8)), bytes(max(0, reached + draw(st.sampled_from([0] * 8 + [-1, 1])))))
    )
    for _ in range(draw(st.sampled_from([0] * 4 + [1, 2]))):
        at = draw(st.integers(0, len(blob) - 1))
        blob[at] = draw(st.integers(0, 255))
    return bytes(blob)


def _is_named_difference(blob: bytes) -> bool:
    """Bent entries may fall on one of the named differences by chance."""
    ours = _ours(blob)
    return (ours is not None and b"-0" in blob) or (ours is None and (b"[" in blob or b"null" in blob) and _bent(blob))


def _bent(blob: bytes) -> bool:
    try:
        top = json.loads(blob[8 : header_bytes_needed(blob)])
    except (ValueError, IntegrityError):
        return False
    return isinstance(top, dict) and any(
        isinstance(e, list) or (isinstance(e, dict) and isinstance(e.get("dtype"), dict)) for e in top.values()
    )


@settings(max_examples=600, deadline=None)
@given(blob=nearly_valid())
def test_fuzzed_headers_are_judged_as_the_reference_does(blob: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    if not _is_named_difference(blob):
        _agree(blob, path)


@settings(max_examples=200, deadline=None)
@given(blob=st.binary(max_size=200))
def test_noise_is_refused_with_one_clear_line(blob: bytes) -> None:
    _ours(blob)
    if len(blob) >= 2:
        _ours(_file(blob))

"""Reading the header of a safetensors file: which tensor stands at which bytes. Pure: no I/O, no numpy, no torch.

A file is an 8-byte little-endian length N, N bytes of JSON, and the tensors' bytes without a hole. Whoever has the
first `header_bytes_needed(first_8_bytes)` bytes and knows the file's size has all that `parse_header` needs, so a table
of a remote file costs two small reads.

Accepted is what the reference reader (safetensors 0.8.0, Rust) accepts, also where the format's text says otherwise:
white space around the JSON, unknown keys in a tensor's entry, tensors that are not aligned, an order in the header
other than in the data, a name that comes twice (the last wins). All but the order are listed in `Header.oddities`, so
that a writer (`mfs push`) can be strict with one `if`. Refused here and accepted there: a tensor's entry written as a
list, and a dtype written as `{"F32": null}`. Accepted here and refused there: `-0` for `0`.

Source: safetensors repository, safetensors/src/tensor.rs; behaviour run on 0.8.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

from mfs.errors import IntegrityError

LENGTH_BYTES = 8
"""Size of the length field before the JSON."""

HEADER_BYTES_MAX = 100_000_000
"""Longest JSON the reference reader takes; a larger N is a hostile or foreign file."""

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of one element of every dtype the format has."""

_U64_MAX = 2**64 - 1
_NESTING_MAX = 124  # values below an entry's own braces; the reference's JSON reader stops at 128 in all
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_ALIGN_BYTES = {dtype: max(1, bits // 8) for dtype, bits in DTYPE_BITS.items()}


class TensorInfo(NamedTuple):
    """One tensor of one file."""

    name: str
    dtype: str
    """A key of DTYPE_BITS."""
    shape: tuple[int, ...]
    """Elements per axis; () is a scalar. For sub-byte dtypes: elements, not storage units."""
    start: int
    """First byte, counted from the beginning of the file."""
    stop: int
    """One past the last byte, counted from the beginning of the file."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The table of one file. Tensors stand in the order of their bytes and cover [data_start, file_bytes) exactly."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    """The writer's own strings; None where the header has no '__metadata__'."""
    data_start: int
    """First byte after the JSON, counted from the beginning of the file."""
    file_bytes: int
    """Size of the whole file."""
    oddities: tuple[str, ...]
    """What the reference accepts and the format's text does not, one line each; empty for a clean file."""

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors together."""
        return self.file_bytes - self.data_start

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        return {t.name: t for t in self.tensors}


def header_bytes_needed(first: bytes | bytearray | memoryview) -> int:
    """How many bytes from the beginning of the file `parse_header` wants: 8 + N.

    first: at least the file's first 8 bytes.
    Raises: IntegrityError if this cannot be a safetensors file.
    """
    if len(first) < LENGTH_BYTES:
        raise IntegrityError(f"not a safetensors file: {len(first)} bytes, expected at least {LENGTH_BYTES}")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > HEADER_BYTES_MAX:
        raise IntegrityError(
            f"not a safetensors file: its first 8 bytes say a header of {length} bytes, more than {HEADER_BYTES_MAX}"
        )
    return LENGTH_BYTES + length


def parse_header(buffer: bytes | bytearray | memoryview, file_bytes: int) -> Header:
    """Read the table of tensors, checking every promise that the header makes about the file.

    buffer: the file's first `header_bytes_needed` bytes, or more.
    file_bytes: size of the whole file; a file cut short or with a tail is refused here, before any tensor is read.
    Raises: IntegrityError, one line, naming the tensor and the property that does not hold.
    """
    data_start = header_bytes_needed(buffer)
    if data_start > file_bytes:
        raise IntegrityError(f"file cut short: its header ends at byte {data_start}, the file at {file_bytes}")
    if len(buffer) < data_start:
        raise ValueError(f"buffer holds {len(buffer)} bytes of a header of {data_start}")
    text = _decoded(bytes(buffer[LENGTH_BYTES:data_start]))
    top = _as_came(_parsed(text))
    if not isinstance(top, tuple):
        raise IntegrityError(f"header is not a JSON object but {_shown(top)}")
    if "\\u" in text:
        _refuse_lone_surrogates(top)

    oddities: list[str] = []
    if not text.startswith("{"):
        oddities.append("the header does not begin with '{'")
    metadata = _metadata(top)
    found: dict[str, TensorInfo] = {}
    for name, entry in top:
        if name == _METADATA:
            continue
        if name in found:
            oddities.append(f"tensor {_shown(name)} is described more than once; the last counts")
            del found[name]
        if type(entry) is not _Entry:
            try:
                entry = _entry(name, entry, oddities)
            except _WrongError as wrong:
                raise IntegrityError(f"tensor {_shown(name)}{wrong}") from None
        dtype, shape, start, stop = entry
        found[name] = TensorInfo(name, dtype, shape, data_start + start, data_start + stop)
    tensors = tuple(sorted(found.values(), key=lambda t: (t.start, t.stop)))
    _check_cover(tensors, data_start, file_bytes)
    _note_alignment(tensors, oddities)
    return Header(tensors, metadata, data_start, file_bytes, tuple(oddities))


class _WrongError(Exception):
    """What is wrong with an entry, to be said behind its tensor's name: showing that takes as long as all checks."""


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"header is not UTF-8: byte {error.start}: {error.reason}") from None


class _Entry(NamedTuple):
    """A tensor's entry in which everything is right; offsets as they came."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _parsed(text: str) -> Any:
    """What the JSON says. An object is a tuple of its pairs as they came, as a key may come twice; or an `_Entry`."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise IntegrityError("header is not usable JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and an integer of more digits than Python converts
        raise IntegrityError(f"header is not valid JSON: {str(error)[:200]}") from None


def _object(pairs: list[tuple[str, Any]]) -> _Entry | tuple[tuple[str, Any], ...]:
    """Nearly all are entries as the reference writes them. They are judged as they come: kept for later, with lists and
    pairs, thousands cost the collector of circles as much as all else."""
    if len(pairs) == len(_FIELDS):
        (first, dtype), (second, shape), (third, offsets) = pairs
        if (first, second, third) == _FIELDS:
            try:
                return _checked(dtype, shape, offsets)
            except _WrongError:  # said once its name is known
                pass
    return tuple(pairs)


def _as_came(value: Any) -> Any:
    """An entry as the pairs that it was."""
    if type(value) is not _Entry:
        return value
    dtype, shape, start, stop = value
    return (("dtype", dtype), ("shape", list(shape)), ("data_offsets", [start, stop]))


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _metadata(pairs: tuple[tuple[str, Any], ...]) -> dict[str, str] | None:
    given = [value for name, value in pairs if name == _METADATA]
    if len(given) > 1:
        raise IntegrityError(f"header has {len(given)} entries {_METADATA!r}, expected one at most")
    if not given or given[0] is None:
        return None
    value = given[0]
    if type(value) is not tuple:
        raise IntegrityError(f"{_METADATA} is {_shown(value)}, expected an object of strings")
    for key, item in value:
        if not isinstance(item, str):
            raise IntegrityError(f"{_METADATA} entry {_shown(key)} is {_shown(item)}, expected a string")
    return dict(value)


def _entry(name: str, entry: Any, oddities: list[str]) -> _Entry:
    """One that is wrong, or is not written as most are."""
    if not isinstance(entry, tuple):
        raise _WrongError(f" is described by {_shown(entry)}, expected an object")
    keys = [key for key, _ in entry]
    for key in _FIELDS:
        if keys.count(key) > 1:
            raise _WrongError(f" has {key!r} more than once")
    for key in _FIELDS:
        if key not in keys:
            raise _WrongError(f" has no {key!r}")
    extra = [(key, value) for key, value in entry if key not in _FIELDS]
    for _, value in extra:
        _check_extra(value, 0)
    if extra:
        shown = ", ".join(_shown(key) for key in list(dict(extra))[:5])
        oddities.append(f"tensor {_shown(name)} has unknown keys: {shown}")
    return _checked(*(entry[keys.index(key)][1] for key in _FIELDS))


def _checked(dtype: Any, shape: Any, offsets: Any) -> _Entry:
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _WrongError(f" has dtype {_shown(dtype)}, expected one of {' '.join(DTYPE_BITS)}")
    if not isinstance(shape, list):
        raise _wrong_shape(shape)
    elements = 1
    for n in shape:
        if type(n) is not int or not 0 <= n <= _U64_MAX:  # type(), since bool is an int
            raise _wrong_shape(shape)
        elements *= n
        if elements > _U64_MAX:
            raise _WrongError(f": shape {_shown(shape)} has more than 2^64 elements")
    start, stop = offsets if isinstance(offsets, list) and len(offsets) == 2 else (None, None)
    if type(start) is not int or type(stop) is not int or not (0 <= start <= _U64_MAX and 0 <= stop <= _U64_MAX):
        raise _WrongError(f" has data_offsets {_shown(offsets)}, expected [begin, end]")
    if stop < start:
        raise _WrongError(f" has data_offsets {_shown(offsets)}, which end before they begin")
    bits = elements * DTYPE_BITS[dtype]
    if bits > _U64_MAX:
        raise _WrongError(f": shape {_shown(shape)} of {dtype} has more than 2^64 bits")
    if bits % 8:
        raise _WrongError(f": shape {_shown(shape)} of {dtype} is {bits} bits, not a whole number of bytes")
    if bits // 8 != stop - start:
        raise _WrongError(
            f": shape {_shown(shape)} of {dtype} is {bits // 8} bytes, its data_offsets say {stop - start}"
        )
    return _Entry(dtype, tuple(shape), start, stop)


def _wrong_shape(shape: Any) -> _WrongError:
    return _WrongError(f" has shape {_shown(shape)}, expected a list of whole numbers below 2^64")


def _check_cover(tensors: Iterable[TensorInfo], data_start: int, file_bytes: int) -> None:
    reached = data_start
    for t in tensors:
        if t.start != reached:
            kind = "a hole" if t.start > reached else "an overlap"
            raise IntegrityError(f"{kind} before tensor {_shown(t.name)}: it starts at {t.start}, expected {reached}")
        reached = t.stop
    if reached != file_bytes:
        kind = "cut short" if reached > file_bytes else "longer than its tensors"
        raise IntegrityError(f"file {kind}: its tensors end at byte {reached}, the file at {file_bytes}")


def _note_alignment(tensors: Iterable[TensorInfo], oddities: list[str]) -> None:
    for name, dtype, _, start, stop in tensors:
        if start % _ALIGN_BYTES[dtype] and stop > start:
            oddities.append(f"tensor {_shown(name)} is not aligned: {dtype} at byte {start}")
            return  # one line is enough: a writer that misaligns one tensor misaligns many


def _check_extra(value: Any, depth: int) -> None:
    """Refuse in ignored values what the reference's JSON reader refuses: infinite numbers, deep nesting."""
    if depth > _NESTING_MAX and isinstance(value, list | tuple):
        raise _WrongError(": nested too deeply")
    if isinstance(value, float) and math.isinf(value):
        raise _WrongError(": a number is out of range")
    if isinstance(value, int) and abs(value) >= 1 << 1024:
        raise _WrongError(": a number is out of range")
    if isinstance(value, list):
        for item in value:
            _check_extra(item, depth + 1)
    elif isinstance(value, tuple):
        for _, item in _as_came(value):
            _check_extra(item, depth + 1)


def _refuse_lone_surrogates(value: Any) -> None:
    """JSON may spell half of a UTF-16 pair as an escape; such a name cannot be printed, nor sent over any socket."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise IntegrityError(f"header has a string that is no Unicode text: {_shown(item)}") from None
        elif isinstance(item, list | tuple):
            waiting.extend(item)


def _shown(value: Any) -> str:
    """A stranger's value, safe and short enough for one line of an error."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**40:
        return "a very large number"
    try:
        text = ascii(_plain(value))
    except (RecursionError, ValueError):  # deeply nested, or with a number too long to print
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Any) -> Any:
    """With objects as Python shows them."""
    if isinstance(value, tuple):
        return {key: _plain(item) for key, item in _as_came(value)}
    return [_plain(item) for item in value] if isinstance(value, list) else value

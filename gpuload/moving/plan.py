"""From tensor tables and a placement to the ordered list of moves. Pure: no I/O, no torch, no device.

    tensors of all shards + Placement ──plan_transfers──> Transfer per tensor ──Packing──> Batch per buffer fill

Nobody changes a transfer or a piece; but there are thousands, and a frozen dataclass takes three times as long to make.

A tensor-parallel rank gets its slice of a tensor. Cut along the first axis that is one run of bytes; cut along a later
axis it is many equal rows at a fixed distance, which a device copies in one strided (2-D) operation:

    file   |..rrrr....rrrr....rrrr....|      r: row_bytes each, rows_count of them, first at `start`
                └─pitch─┘
    device |rrrrrrrrrrrr|                    packed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from mfs.errors import UsageError
from mfs.safetensors import DTYPE_BITS, Header, TensorInfo

GAP_BYTES_MAX = 64 << 10
"""Unwanted bytes read along between two wanted ones rather than asking twice. 64 KiB at 3 GB/s take
20 us, about what a second request through the kernel and the thread hop cost."""

PIECES_MAX = 256
"""Of one batch. Each is some 50 us of a loop's time, which is others' too."""

MEGATRON_RULES: Mapping[str, int | None] = {
    "*.q_proj.weight": 0, "*.k_proj.weight": 0, "*.v_proj.weight": 0, "*.qkv_proj.weight": 0,
    "*.q_proj.bias": 0, "*.k_proj.bias": 0, "*.v_proj.bias": 0,
    "*.gate_proj.weight": 0, "*.up_proj.weight": 0, "*.o_proj.weight": 1, "*.down_proj.weight": 1,
    "*.w1.weight": 0, "*.w3.weight": 0, "*.w2.weight": 1,
    "*embed_tokens.weight": 0, "lm_head.weight": 0,
}  # fmt: skip
"""The usual split of decoder models: attention heads and the MLP's inside by output rows, the two way-backs by columns.

Source: Megatron-LM (arXiv 1909.08053), names as in transformers' Llama, Qwen and Mistral families.
"""


@dataclass(frozen=True)
class Placement:
    """Where tensors go, and which part of each."""

    device: str = "cpu"
    """For every tensor that `device_map` does not name."""
    device_map: Mapping[str, str] = field(default_factory=dict)
    """Module prefix -> device; the longest prefix that ends at a '.' wins, '' stands for all. As in accelerate."""
    rank: int = 0
    """This process among the `world` that share the model, from 0."""
    world: int = 1
    rules: Mapping[str, int | None] = field(default_factory=dict)
    """Glob over tensor names -> axis to cut in `world` parts, or None for whole; the first match wins, else whole."""

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world}: expected 0 <= rank < world")

    def device_of(self, name: str) -> str:
        if not self.device_map:
            return self.device
        prefix = name
        while True:
            if prefix in self.device_map:
                return self.device_map[prefix]
            if not prefix:
                return self.device
            prefix = prefix.rpartition(".")[0]

    def axis_of(self, name: str) -> int | None:
        if self.world == 1:
            return None
        for pattern, axis in self.rules.items():
            if fnmatchcase(name, pattern):
                return axis
        return None


@dataclass(slots=True)
class Transfer:
    """One tensor, or this rank's slice of it, on its way from one shard to one device."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """What arrives."""
    device: str
    shard: int
    """Index of the shard it comes from."""
    start: int
    """First wanted byte, from the beginning of the shard."""
    row_bytes: int
    rows_count: int
    pitch_bytes: int
    """From the first byte of a row to that of the next; equals row_bytes where there is one row."""

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.rows_count

    @property
    def stop(self) -> int:
        """One past the last wanted byte in the shard."""
        if not self.nbytes:
            return self.start
        return self.start + (self.rows_count - 1) * self.pitch_bytes + self.row_bytes


@dataclass(slots=True)
class Piece:
    """What is copied in one operation: some rows, or a run of bytes, of one transfer; never more than a buffer."""

    transfer: int
    """Index into the list of transfers."""
    offset: int
    """Where it belongs, in bytes from the beginning of what arrives."""
    start: int
    """First byte in the shard."""
    row_bytes: int
    rows_count: int
    pitch_bytes: int

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.rows_count

    @property
    def stop(self) -> int:
        return self.start + (self.rows_count - 1) * self.pitch_bytes + self.row_bytes


@dataclass(slots=True)
class Batch:
    """One fill of one staging buffer: bytes [start, stop) of a shard, and the pieces that are cut out of it."""

    shard: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read; the pieces may want fewer."""
        return self.stop - self.start


def plan_transfers(headers: Sequence[Header], placement: Placement) -> list[Transfer]:
    """One transfer per tensor, in the order of the shards and, inside each, of the bytes.

    Raises: UsageError if two shards hold the same name, or a rule cannot be followed.
    """
    transfers: list[Transfer] = []
    seen: dict[str, int] = {}
    for shard, header in enumerate(headers):
        own = dict.fromkeys([info.name for info in header.tensors], shard)
        if not seen.keys().isdisjoint(own):
            name = next(name for name in own if name in seen)
            raise UsageError(f"tensor {name!r} stands in shard {seen[name]} and again in shard {shard}")
        seen |= own
        if placement.world == 1 and not placement.device_map:  # nothing to find out, thirty thousand times
            device = placement.device
            transfers += [
                Transfer(name, dtype, shape, device, shard, start, nbytes := stop - start, 1, nbytes)
                for name, dtype, shape, start, stop in header.tensors
            ]
        else:
            transfers += [slice_tensor(info, shard, placement) for info in header.tensors]
    return transfers


def slice_tensor(info: TensorInfo, shard: int, placement: Placement) -> Transfer:
    """This placement's part of one tensor. Raises: UsageError if the axis cannot be cut in `world` equal parts."""
    device = placement.device_of(info.name)
    axis = placement.axis_of(info.name)
    if axis is None:
        return Transfer(info.name, info.dtype, info.shape, device, shard, info.start, info.nbytes, 1, info.nbytes)
    if not 0 <= axis < len(info.shape) or info.shape[axis] % placement.world:
        raise UsageError(
            f"tensor {info.name!r} of shape {list(info.shape)} cannot be cut along axis {axis} in {placement.world}"
            " equal parts: give another rule for it, or None to keep it whole"
        )
    part = info.shape[axis] // placement.world
    return cut_axis(info, shard, device, axis, placement.rank * part, (placement.rank + 1) * part)


def cut_axis(info: TensorInfo, shard: int, device: str, axis: int, first: int, last: int) -> Transfer:
    """The part [first, last) of one tensor along `axis`, as rows at a fixed distance.

    Raises: UsageError if a part does not begin and end at whole bytes (sub-byte dtypes).
    """
    bits = DTYPE_BITS[info.dtype]
    for n in info.shape[axis + 1 :]:
        bits *= n
    if (bits * first) % 8 or (bits * last) % 8 or (bits * info.shape[axis]) % 8:
        raise UsageError(f"tensor {info.name!r} of {info.dtype} cannot be cut at {first}:{last}: not whole bytes")
    rows = 1
    for n in info.shape[:axis]:
        rows *= n
    shape = (*info.shape[:axis], last - first, *info.shape[axis + 1 :])
    row_bytes, pitch = bits * (last - first) // 8, bits * info.shape[axis] // 8
    start = info.start + bits * first // 8
    if row_bytes == pitch or rows == 1:  # one run of bytes
        row_bytes, rows = row_bytes * rows, 1
        pitch = row_bytes
    return Transfer(info.name, info.dtype, shape, device, shard, start, row_bytes, rows, pitch)


def cut_transfer(index: int, transfer: Transfer, piece_bytes: int) -> Sequence[Piece]:
    """The transfer in pieces whose span in the shard is at most `piece_bytes`.

    Pieces are cut at fixed distances from the tensor's own beginning, so equal tensors give equal pieces wherever
    they stand in a file.
    """
    start, row_bytes, rows_count, pitch_bytes = (
        transfer.start, transfer.row_bytes, transfer.rows_count, transfer.pitch_bytes
    )  # fmt: skip
    if not row_bytes * rows_count:
        return ()
    if rows_count == 1 and row_bytes <= piece_bytes:
        return (Piece(index, 0, start, row_bytes, 1, row_bytes),)
    if rows_count > 1 and pitch_bytes <= piece_bytes and pitch_bytes - row_bytes <= GAP_BYTES_MAX:
        step = piece_bytes // pitch_bytes
        return [
            Piece(
                index, row * row_bytes, start + row * pitch_bytes, row_bytes, min(step, rows_count - row), pitch_bytes
            )
            for row in range(0, rows_count, step)
        ]
    return [
        Piece(index, row * row_bytes + at, start + row * pitch_bytes + at, n, 1, n)
        for row in range(rows_count)
        for at in range(0, row_bytes, piece_bytes)
        for n in (min(piece_bytes, row_bytes - at),)
    ]


class Packing:
    """Pieces that follow each other closely, put into batches one by one: thousands of tensors take longer to plan than
    a link needs to begin, and whoever takes a batch knows how much it may hold. One thread at a time."""

    def __init__(self, pieces: Iterable[tuple[int, Piece]]) -> None:
        """pieces: each with its shard."""
        self._pieces = iter(pieces)
        self._next = next(self._pieces, None)

    def take(self, most_bytes: int) -> Batch | None:
        """The next batch, of at most `most_bytes` unless its first piece has more; None after the last."""
        if self._next is None:
            return None
        of, piece = self._next
        self._next = None
        group, start, stop = [piece], piece.start, piece.stop
        for shard, piece in self._pieces:
            first = piece.start
            last = max(stop, first + (piece.rows_count - 1) * piece.pitch_bytes + piece.row_bytes)
            is_near = shard == of and start <= first <= stop + GAP_BYTES_MAX
            if not is_near or last - start > most_bytes or len(group) == PIECES_MAX:
                self._next = (shard, piece)
                break
            group.append(piece)
            stop = last
        return Batch(of, start, stop, tuple(group))

    def all(self, most_bytes: int) -> list[Batch]:
        """All that are left."""
        return list(iter(lambda: self.take(most_bytes), None))


def pack_transfers(transfers: Sequence[Transfer], *, piece_bytes: int, device: str | None = None) -> Packing:
    """The pieces of all transfers (to `device`, if given), in order."""
    return Packing(
        (t.shard, piece)
        for index, t in enumerate(transfers)
        if device is None or t.device == device
        for piece in cut_transfer(index, t, piece_bytes)
    )


def plan_batches(
    transfers: Sequence[Transfer], *, buffer_bytes: int, piece_bytes: int | None = None, device: str | None = None
) -> list[Batch]:
    """The same in fills of `buffer_bytes` at most."""
    piece_bytes = min(piece_bytes or buffer_bytes, buffer_bytes)
    return pack_transfers(transfers, piece_bytes=piece_bytes, device=device).all(buffer_bytes)


def pack_pieces(pieces: Iterable[tuple[int, Piece]], *, buffer_bytes: int) -> list[Batch]:
    """(shard, piece) pairs in fills of `buffer_bytes` at most."""
    return Packing(pieces).all(buffer_bytes)

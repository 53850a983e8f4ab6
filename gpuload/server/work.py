"""One load on its way: what was asked, what it comes to on each device, what is known of its bytes. None move here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blake3 import blake3

from gpuload.moving.plan import Piece, Placement, Transfer
from gpuload.moving.pool import Range
from gpuload.moving.shards import Shard
from gpuload.moving.timing import Timing
from gpuload.server.catalog import Block, ResidentTensor
from gpuload.server.client_files import ClientFiles
from gpuload.server.digest_files import Digest, Geometry
from gpuload.server.digests import digest_block, geometry
from gpuload.server.layout import BlockPlan, plan_blocks
from gpuload.server.returning import Returning
from gpuload.server.site import Site
from gpuload.server.versions import Version
from mfs.tracing.spans import Span

PieceKey = tuple[int, int]
"""(transfer, offset): names a piece within one job."""


@dataclass(frozen=True)
class Job:
    """What to load, and as what."""

    name: str | None
    """None: by content, shared with whoever loaded the same bytes."""
    label: str
    shards: Sequence[Shard]
    versions: Sequence[Version]
    """Of each shard's file, before its table was read."""
    files: ClientFiles
    """Makes the calls on them."""
    placements: Sequence[Placement]
    """One; or one for each tensor-parallel rank, each on a device of its own: their parts are one model."""
    is_swap: bool = False
    """Replace whoever has the name."""
    asked_fd: int | None = None
    """A commit's socket, by which its one file is filled as it is read; see `pulled`."""
    known: Mapping[PieceKey, Digest] | None = None
    """Of every piece, where nothing is to be read: a commit that comes back; see `commits`."""
    allow_gap: bool = False
    """If both do not fit, give up the old model first; a failure then leaves neither."""
    is_pinned: bool = False
    retain: str = "lru"
    wait_s: float = 0.0
    """Longest wait for memory of a device that others still hold."""
    timing: Timing | None = None
    """Told where the time goes, if somebody asks."""
    span: Span | None = None
    """Below what it is traced, if it is."""


@dataclass
class Report:
    """What a load did, in bytes of tensors, on all its devices together."""

    bytes_total: int = 0
    bytes_kept: int = 0
    """In blocks that were resident and are shared in place."""
    bytes_moved_inside: int = 0
    """Copied from one place of the device to another."""
    bytes_from_ram: int = 0
    """Brought back from the page-locked RAM tier, over the bus."""
    bytes_copied: int = 0
    """Brought to the device from files, or a mount's RAM, over the bus."""
    bytes_hashed: int = 0
    """Read from the files while looking for what differs: their digests were not known."""
    bytes_hashed_before: int = 0
    """Of these, read by a pass of their own, since without knowing them it was not sure that all would fit."""
    evicted: list[str] = field(default_factory=list)
    had_gap: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class PartWork:
    """What of a job stands on one device: planned blocks, then the blocks it holds."""

    site: Site
    plans: list[BlockPlan]
    own: list[Block | None] = field(default_factory=list)
    known: list[list[tuple[int, int, Digest]] | None] = field(default_factory=list)
    """Of each plan, as far as `Work.learn` found it: (offset in the block, nbytes, digest) of every piece, if all are
    known."""
    digests: list[Digest | None] = field(default_factory=list)
    """Of each planned block, where its pieces are known."""
    returning: Returning = field(init=False)
    """What of it comes from the RAM tier."""

    def __post_init__(self) -> None:
        self.returning = Returning(self.site.tier)

    @property
    def is_known(self) -> bool:
        return None not in self.known

    def resident(self, index: int) -> Block | None:
        """A complete block in the arena with the bytes of plan `index`, if they are known."""
        digest = self.digests[index]
        return None if digest is None else self.site.catalog.blocks.get(digest)

    def pieces(self) -> Iterator[Piece]:
        return (piece for plan in self.plans for _, piece in plan.pieces)

    def let_go(self) -> None:
        """Give everything back; idempotent."""
        self.returning.let_go()
        own, self.own = self.own, []
        for block in own:
            if block is not None:
                self.site.catalog.let_go(block)


class Work:
    """One job on its way: pure planning results, and the digests known so far.

    What takes long for many tensors (making one, `recall`, `learn`, `describe`, `find_content`, `found`, `table`) is
    for threads.
    """

    def __init__(self, job: Job, transfers: list[Transfer], sites: Sequence[Site]) -> None:
        self.job, self.transfers, self.versions = job, transfers, job.versions
        self.parts = [PartWork(s, plan_blocks(transfers, s.arena.granule_bytes, s.name)) for s in sites]
        self.digests: dict[PieceKey, Digest] = {}
        self.content: tuple[str, dict[str, str]] | None = None
        """The whole model's digest, and that of what stands on each device; by `find_content`."""
        self._described: dict[str, bytes] = {}
        self.inherits_pin = False
        """A pin belongs to the name, so a swap passes it on."""
        self.lenders: Sequence[Path | None] = ()
        """The mount's door of each shard, if that was asked."""
        self.report = Report(bytes_total=sum(t.nbytes for t in transfers))

    @property
    def is_known(self) -> bool:
        """As far as `learn` found."""
        return all(part.is_known for part in self.parts)

    def unknown(self, part: PartWork) -> Iterator[Piece]:
        return (piece for piece in part.pieces() if (piece.transfer, piece.offset) not in self.digests)

    def learn(self) -> None:
        """Work out what the digests of pieces, as known by now, come to."""
        for part in self.parts:
            self.learn_part(part)
        self.content = None

    def learn_part(self, part: PartWork) -> None:
        """The same for what stands on one device."""
        part.known = [self._digests_of(plan) for plan in part.plans]
        part.digests = [None if pieces is None else digest_block(pieces) for pieces in part.known]

    def _digests_of(self, plan: BlockPlan) -> list[tuple[int, int, Digest]] | None:
        found = [
            (offset, piece.nbytes, self.digests.get((piece.transfer, piece.offset), b""))
            for offset, piece in plan.pieces
        ]
        return found if all(digest for _, _, digest in found) else None

    def recall(self, known: Sequence[Mapping[Geometry, Digest]]) -> None:
        """Fill in what is remembered, and learn from it. known: of each shard."""
        for part in self.parts:
            for piece in part.pieces():
                digest = known[self.transfers[piece.transfer].shard].get(geometry(piece))
                if digest is not None:
                    self.digests[piece.transfer, piece.offset] = digest
        self.learn()

    def lenders_of(self, plan: BlockPlan) -> list[Range]:
        """Where on mounts a block's bytes stand; nothing if some do not, or as rows."""
        found = []
        for transfer in (self.transfers[index] for index in plan.transfers) if any(self.lenders) else ():
            door = self.lenders[transfer.shard]
            if door is None or transfer.rows_count > 1:
                return []
            found.append(Range(door, self.job.shards[transfer.shard].inode, transfer.start, transfer.stop))
        return found

    def found(self) -> list[list[tuple[Geometry, Digest]]]:
        """What is known by now, for each shard."""
        by_shard: list[list[tuple[Geometry, Digest]]] = [[] for _ in self.job.shards]
        for part in self.parts:
            for piece in part.pieces():
                digest = self.digests.get((piece.transfer, piece.offset))
                if digest is not None:
                    by_shard[self.transfers[piece.transfer].shard].append((geometry(piece), digest))
        return by_shard

    def describe(self) -> None:
        """What of the model's digests needs no bytes: the files' own strings, which are handed out beside the tensors,
        and the name, type and shape of every tensor. Once; `find_content` does it where it was not done.

        As JSON without spaces, in UTF-8: PROTOCOL.md."""
        if self._described:
            return
        strings = [sorted((shard.header.metadata or {}).items()) for shard in self.job.shards]
        for device in self._devices():
            rows = [(t.name, t.dtype, t.shape) for t in self.transfers if device in ("", t.device)]
            text = json.dumps([strings, rows], ensure_ascii=False, separators=(",", ":"))
            self._described[device] = blake3(text.encode("utf-8")).digest()

    def find_content(self) -> None:
        """Fill in `content`; all digests must be known."""
        self.describe()
        keys = sorted((piece.transfer, piece.offset, part.site.name) for part in self.parts for piece in part.pieces())

        def digest(device: str) -> str:
            own = b"".join([self.digests[transfer, at] for transfer, at, where in keys if device in ("", where)])
            return blake3(self._described[device] + own).hexdigest()

        of = {device: digest(device) for device in self._devices()}
        self.content = of[self._devices()[0]], {part.site.name: of[part.site.name] for part in self.parts}

    def _devices(self) -> list[str]:
        """Whose digests are wanted: first all devices', which is '' if they are several."""
        names = [part.site.name for part in self.parts]
        return names if len(names) == 1 else ["", *names]

    def table(self) -> list[ResidentTensor]:
        """Where every tensor stands, in the order of the files."""
        numbers = {part.site.name: i for i, part in enumerate(self.parts)}
        blocks, offsets = [-1] * len(self.transfers), [0] * len(self.transfers)
        for part in self.parts:
            for i, plan in enumerate(part.plans):
                for index, offset in zip(plan.transfers, plan.offsets, strict=True):
                    blocks[index], offsets[index] = i, offset
        return [
            ResidentTensor(t.name, t.dtype, t.shape, numbers[t.device], block, offset, t.row_bytes * t.rows_count)
            for t, block, offset in zip(self.transfers, blocks, offsets, strict=True)
        ]

    def let_go(self) -> None:
        for part in self.parts:
            part.let_go()

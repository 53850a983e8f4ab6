"""What a device is to gpuload. Addresses are integers in the device's own space; who passes one owns its bounds.

Two kinds exist: `host.HostDevice` (shared memory, any machine) and `cuda.CudaDevice`. Every kind passes
`gpuload.testing.DeviceSuite`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Run = tuple[int, int]
"""(first granule, how many): granules that follow each other in an arena."""


def total_granules(runs: Iterable[Run]) -> int:
    """How many granules these are."""
    return sum(count for _, count in runs)


@dataclass(frozen=True, slots=True)
class Memory:
    """What the device says about itself, now. Other processes' use is counted in."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has memory of a device."""

    pid: int
    nbytes: int


class Event(Protocol):
    """A point in a stream."""

    def wait(self, timeout_s: float) -> None:
        """Block until all that was queued before this point is done.

        Raises: DeviceError if a copy before it failed; BusyError when `timeout_s` passes.
        """
        ...


class Stream(Protocol):
    """Copies that happen in order, beside the caller. Queueing returns at once; sources must stay until an event says
    so. A stream belongs to one thread at a time."""

    def copy_in(self, dst: int, src: int, nbytes: int) -> None:
        """From host memory at `src`, staging or such as the device `reaches`, to device memory at `dst`."""
        ...

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """`copy_in` for each (dst, src, nbytes)."""
        ...

    def copy_in_rows(self, dst: int, src: int, *, row_bytes: int, rows_count: int, pitch_bytes: int) -> None:
        """Rows that stand `pitch_bytes` apart on the host, packed on the device."""
        ...

    def copy_out(self, dst: int, src: int, nbytes: int) -> None:
        """From device memory at `src` to staging at `dst`; beside copies in of other streams."""
        ...

    def copy_within(self, dst: int, src: int, nbytes: int) -> None:
        """Inside the device; the ranges do not overlap."""
        ...

    def record(self) -> Event: ...

    def close(self) -> None:
        """Finish what is queued, then end. Idempotent."""
        ...


class Staging(Protocol):
    """Page-locked host memory that streams copy from and to; page-aligned. The device `reaches` it."""

    address: int
    view: memoryview

    def lock(self, nbytes: int) -> None:
        """See that the first `nbytes` are page-locked: before a stream copies from them, and while none does.

        Raises: DeviceError if the driver refuses.
        """
        ...

    def close(self) -> None: ...


class Arena(Protocol):
    """Addresses for granules, contiguous at `address` for their owner, and device memory behind those that were given
    some. One thread at a time commits and releases."""

    address: int
    granule_bytes: int
    granules_count: int
    """Of how many there may be memory at a time."""
    places_count: int
    """How many have addresses: 0..count-1."""
    has_pieces: bool
    """Whether each run that is committed is a piece of memory: released and exported as that run, and attached to by a
    descriptor of its own. Else all memory is one, and any runs do everywhere."""

    def commit(self, runs: Sequence[Run]) -> None:
        """Put memory behind these granules, which have none.

        Raises: FitError if the device has not that much free; DeviceError otherwise. None of them has any then.
        """
        ...

    def release(self, runs: Sequence[Run]) -> None:
        """Give the memory behind these granules back to the device; they keep their addresses, which nobody may use
        meanwhile."""
        ...

    def export(self, runs: Sequence[Run]) -> list[int]:
        """Descriptors with which another process maps these granules, read-only: one, or one for each piece. The caller
        closes them. From any thread."""
        ...

    def shared(self) -> int | None:
        """A descriptor that all of its memory lives by, if there is one: see `descriptors`."""
        ...

    def descriptors(self, runs: Sequence[Run]) -> Sequence[int]:
        """What these pieces live by, one for each; none where there are no pieces. As long as any process has copies of
        these, however this one ends, the memory is there, and another process of ours can `adopt` it. They stay the
        arena's, until it gives the piece back."""
        ...

    def adopt(self, runs: Sequence[Run], fds: Sequence[int]) -> None:
        """Have the memory that another process of ours has behind these pieces; from copies of its `descriptors`,
        which are the arena's from here on. Where all has one descriptor there is nothing to do. Raises: DeviceError.
        """
        ...

    def close(self) -> None: ...


class Change(Protocol):
    """Other granules for a mapping, as many, held and ready; nobody sees them yet."""

    waits_to_close: bool
    """As `Mapping.waits_to_close`."""

    def exchange(self) -> None:
        """Show these in place of what the mapping shows, and keep that; once more: the other way round. Waits for the
        device. Nobody may use the addresses meanwhile, nor capture a graph on that device.

        Raises: DeviceError. What was shown is shown again then, every granule of it; or, where not even that succeeds,
            none: the mapping is hidden.
        """
        ...

    def close(self) -> None:
        """Let go of what is not shown. Idempotent."""
        ...


A = TypeVar("A", bound=Arena)


def whole(arena: A) -> A:
    """An arena with memory behind all of it, in one piece. Raises: as `Arena.commit`; it is closed then."""
    try:
        if arena.granules_count:
            arena.commit([(0, arena.granules_count)])
    except BaseException:
        arena.close()
        raise
    return arena


class Mapping(Protocol):
    """Granules of another process's arena, contiguous at `address` in this one."""

    address: int
    nbytes: int
    waits_to_close: bool
    """Whether `close` waits for the device. Then no finalizer and no timer may call it: they run in the middle of
    anything, the capture of a CUDA graph too, which that would break."""
    is_hidden: bool
    """See `hide`."""

    def prepare(self, fds: Sequence[int], runs: Sequence[Run], *, is_same: bool) -> Change:
        """Get ready to show other granules at the same addresses. `fds` as for `Device.attach`; they stay the caller's.

        is_same: they are of the arena that is shown already, whose granules are held: equal numbers are equal bytes.
        Raises: DeviceError; ValueError for another number of granules.
        """
        ...

    def hide(self) -> None:
        """Show nothing any more: whoever reads there ends, rather than take one content for another. Raises:
        DeviceError."""
        ...

    def close(self) -> None:
        """Unmap. Nobody may use the addresses afterwards. In a forked child, what is its parent's alone stays."""
        ...


class Device(Protocol):
    """One device of this machine, as this process sees it."""

    name: str
    """As torch writes it: 'cpu', 'cuda:0'. A card's number is this process's own (CUDA_VISIBLE_DEVICES)."""
    identity: str
    """Who it is, to every process of this machine: 'GPU-' and the card's UUID; in host memory its name."""
    node: int | None
    """The memory node (NUMA) that it hangs at; None where there is but one, or nobody says."""
    exports_read_only: bool
    """Whether nobody who attaches can come to write, whatever they call: so for a sealed memfd, not for CUDA, where the
    importer chooses the access."""
    granule_bytes: int
    """The unit of an arena: what one model holds, another cannot use a part of."""
    is_direct: bool
    """True if the CPU reaches device memory, so that a source can fill it without staging."""

    def memory(self) -> Memory: ...

    def open_stream(self) -> Stream: ...

    def alloc_staging(self, nbytes: int, *, is_locked: bool = True) -> Staging:
        """is_locked=False: `Staging.lock` does it, once somebody has filled it and so touched its pages."""
        ...

    def reserve_arena(self, nbytes: int, shared: int | None = None) -> Arena:
        """Addresses for so much; no memory. Raises: DeviceError.

        shared: a copy of what `Arena.shared` of another process gave: its memory. The arena's from here on.
        """
        ...

    def create_arena(self, nbytes: int) -> Arena:
        """With memory behind all of it. Raises: FitError if the device has not that much free; DeviceError."""
        ...

    def holders(self) -> Sequence[Holder]:
        """Who has memory of this device, this process too, as far as anybody says; largest first."""
        ...

    def attach(self, fds: Sequence[int], runs: Sequence[Run]) -> Mapping:
        """Map what `Arena.export(runs)` gave another process. `fds` stay the caller's. Raises: DeviceError."""
        ...

    def register(self, address: int, nbytes: int) -> None:
        """Page-lock memory of another's that this process has mapped, readable at least, so that streams may copy from
        it in place. Page-aligned; a range that was registered is registered once more, and unregistered as often.

        Raises: DeviceError if the driver refuses; nothing is registered then.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo one `register` that began there; no stream may copy from it any more, nor the memory be unmapped yet."""
        ...

    def reaches(self, address: int, nbytes: int) -> bool:
        """Whether streams of this device may copy from there in place. Cheap; from any thread."""
        ...

    def read_back(self, address: int, nbytes: int) -> bytes:
        """Device bytes on the host; slow, for checks."""
        ...

    def close(self) -> None: ...

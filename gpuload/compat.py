"""What a CUDA driver can run, and what a wheel's kernels need of a card. Pure; NVIDIA's rules, as of 2026-09.

Three rules decide whether a program built with some toolkit runs (Source: NVIDIA, "CUDA Compatibility", chapters "Why
CUDA Compatibility" and "Minor Version Compatibility", releases 575 to 615; CUDA Programming Guide 13.4, 1.3 "The CUDA
platform"; the NVIDIA compatibility guides of Turing to Blackwell):

1. A driver runs what was built with its own toolkit or an older one, of any major version.
2. Within one major version, from CUDA 11 on, a driver also runs what a newer toolkit built, with limits: it compiles no
   PTX that is newer than itself (cudaErrorUnsupportedPtxVersion), and lacks what came later. The least drivers:
   11.x 450 (450.80.02), 12.x 525 (525.60.13), 13.x 580 (580.65.06).
3. Of another major version it runs nothing newer, but where NVIDIA's package cuda-compat is installed (cards of data
   centres only): then the library in it says the version that counts.

Kernels in a binary are either machine code, sm_XY, for cards X.Y and later ones X.Z of the same major version; sm_XYa,
for X.Y alone; sm_XYf, for X.Y and later of its family; or PTX, compute_XY, which a driver compiles for X.Y and later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

Version = tuple[int, int]

DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""Toolkit's major version -> the least driver (Linux) of its minor version compatibility."""

TOOLKITS: tuple[Version, ...] = (
    (11, 8), (12, 1), (12, 4), (12, 6), (12, 8), (12, 9), (13, 0),
)  # fmt: skip
"""Those that torch's wheels were built with, from torch 2.0 to 2.10."""

CARDS: tuple[tuple[Version, str, Version, Version | None], ...] = (
    ((5, 0), "Maxwell", (6, 5), (12, 9)),
    ((6, 0), "Pascal (P100)", (8, 0), (12, 9)),
    ((6, 1), "Pascal (P4, P40)", (8, 0), (12, 9)),
    ((7, 0), "Volta (V100)", (9, 0), (12, 9)),
    ((7, 5), "Turing (T4)", (10, 0), None),
    ((8, 0), "Ampere (A100, A30)", (11, 0), None),
    ((8, 6), "Ampere (A10, A40, RTX 30)", (11, 1), None),
    ((8, 9), "Ada (L4, L40, RTX 40)", (11, 8), None),
    ((9, 0), "Hopper (H100, H200)", (11, 8), None),
    ((10, 0), "Blackwell (B200)", (12, 8), None),
    ((10, 3), "Blackwell (B300)", (12, 9), None),
    ((12, 0), "Blackwell (RTX 50, RTX PRO)", (12, 8), None),
    ((12, 1), "Blackwell (GB10)", (12, 9), None),
)
"""(compute capability, name, first toolkit that builds for it, last one; None: none has dropped it yet)."""

_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


class Runs(StrEnum):
    """How something runs."""

    ALL = "runs"
    NO_JIT = "runs, but compiles no PTX"
    """By minor version compatibility."""
    NO = "does not run"


@dataclass(frozen=True)
class Reach:
    """Whether a binary's kernels run on one card."""

    runs: bool
    by: str
    """The entry that does it: 'sm_80', 'compute_90'; '' if none does."""
    reason: str = ""
    """Why not, or what it costs."""


def parse_version(text: str) -> Version | None:
    """'12.6', '12.6.3' -> (12, 6)."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def of_driver(number: int) -> Version:
    """What cuDriverGetVersion says: 12040 is 12.4."""
    return number // 1000, number % 1000 // 10


def toolkit_on_driver(toolkit: Version, driver: Version) -> Runs:
    """Whether what a toolkit built runs with a driver. driver: the CUDA version that it says it has."""
    if toolkit <= driver:
        return Runs.ALL
    if toolkit[0] == driver[0] and toolkit[0] >= 11:
        return Runs.NO_JIT
    return Runs.NO


def driver_for(toolkit: Version) -> str:
    """The least driver that runs what a toolkit built, in words."""
    least = DRIVERS.get(toolkit[0])
    return f"driver {least} or newer" if least else f"a driver of CUDA {toolkit[0]}.{toolkit[1]} or newer"


def kernels_on_card(built: Sequence[str], card: Version, *, can_jit: bool = True) -> Reach:
    """Whether kernels built for 'sm_80', 'compute_90' and the like run on a card of compute capability `card`.

    can_jit: whether the driver compiles the binary's PTX; see `toolkit_on_driver`.
    """
    found = [(kind, (int(major), int(minor)), suffix, one) for one in built if (match := _ARCH.fullmatch(one))
             for kind, major, minor, suffix in [match.groups()]]  # fmt: skip
    code = [(arch, one) for kind, arch, suffix, one in found if kind == "sm" and _code_runs(arch, suffix, card)]
    if code:
        return Reach(True, max(code)[1])
    ptx = [(arch, one) for kind, arch, suffix, one in found
           if kind == "compute" and (arch == card if suffix == "a" else arch <= card)]  # fmt: skip
    if ptx and can_jit:
        return Reach(True, max(ptx)[1], "compiled by the driver when it is first used: minutes, once")
    if ptx:
        return Reach(False, "", f"only PTX ({max(ptx)[1]}) would do, and the driver is older than what made it")
    listed = ", ".join(built) or "nothing"
    return Reach(False, "", f"it has kernels for {listed}, and none of them is for {card[0]}.{card[1]}")


def _code_runs(arch: Version, suffix: str, card: Version) -> bool:
    if suffix == "a":
        return arch == card
    return arch[0] == card[0] and arch[1] <= card[1]


def name_of(card: Version) -> str:
    """'Hopper (H100, H200)'; '' if it is not in the table."""
    return next((name for capability, name, *_ in CARDS if capability == card), "")


def toolkits_for(card: Version) -> tuple[Version, Version | None] | None:
    """(first, last) toolkit that builds machine code for a card; None if it is not in the table."""
    return next(((first, last) for capability, _, first, last in CARDS if capability == card), None)

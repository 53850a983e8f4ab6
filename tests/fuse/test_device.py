"""What was agreed on at INIT, and whether another libfuse agrees to the same; with messages laid out by hand."""

from __future__ import annotations

import struct

import pytest

from mfs.errors import ConfigError
from mfs.fuse.device import Agreement

INIT_EXT, HAS_RESEND = 1 << 30, 1 << 7
FLAGS, FLAGS2 = 0b1011 | INIT_EXT, 0b11


def request(*, minor: int = 45, flags: int = 0b1111 | INIT_EXT, flags2: int = 0b111 | HAS_RESEND) -> bytes:
    """fuse_in_header and fuse_init_in."""
    return struct.pack("<IIQQIIIHH", 104, 26, 2, 0, 0, 0, 0, 0, 0) + struct.pack(
        "<IIIII44x", 7, minor, 1 << 17, flags, flags2
    )


def reply(*, minor: int = 38, flags: int = FLAGS, max_write: int = 1 << 20, background: int = 0) -> bytes:
    """fuse_out_header and fuse_init_out."""
    body = struct.pack(
        "<IIIIHHIIHHI28x", 7, minor, 1 << 17, flags, background, 0, max_write, 1, 256, 0, FLAGS2
    )  # fmt: skip
    return struct.pack("<IiQ", 16 + len(body), 0, 2) + body


def test_repeated_is_what_is_in_force() -> None:
    """Nothing is offered again that was refused, and no newer protocol than both speak; all else is as it was."""
    repeated = Agreement(request(), reply()).repeated()
    assert repeated == request(minor=38, flags=FLAGS, flags2=FLAGS2)


def test_a_kernel_that_can_send_again_says_so() -> None:
    assert Agreement(request(), reply()).can_resend
    assert not Agreement(request(flags2=0b111), reply()).can_resend


@pytest.mark.parametrize("other", [{"minor": 40}, {"background": 12}])
def test_what_binds_nobody_may_differ(other: dict[str, int]) -> None:
    Agreement(request(), reply()).check_same(reply(**other))


@pytest.mark.parametrize("other", [{"flags": FLAGS | 0b100}, {"flags": FLAGS & ~1}, {"max_write": 1 << 17}])
def test_another_meaning_refuses_the_handover(other: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="cannot be handed over"):
        Agreement(request(), reply()).check_same(reply(**other))

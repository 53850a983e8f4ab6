"""The descriptor of /dev/fuse itself, beneath libfuse: what was agreed on at INIT, and asking for answers still owed.

libfuse speaks to whatever file stands behind its descriptor. So it says INIT over a socket pair first, and the device
is put in the socket's place when both sides have agreed (`Channel`). That shows us the agreement, and lets a second
daemon's libfuse come to the same one without asking the kernel, which says INIT only once.

Source: include/uapi/linux/fuse.h (fuse_in_header, fuse_init_in, fuse_init_out, fuse_out_header), fs/fuse/dev.c
(fuse_notify_resend, since Linux 6.9).
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from mfs.errors import ConfigError, StoreError

_DEVICE = os.makedev(10, 229)
_REQUEST_BYTES_MAX = 1 << 16  # the kernel refuses to hand a request to a buffer of less than 8 KiB
_INIT_TIMEOUT_S = 10.0
_IN_HEADER_BYTES, _OUT_HEADER_BYTES = 40, 16
_INIT_IN = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2
_INIT_OUT = struct.Struct("<IIIIHHIIHHII")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth"""
_OUT_HEADER = struct.Struct("<IiQ")  # length, error or notification, unique
_NOTIFY_RESEND = 7
_FLAGS2_HAS_RESEND = 1 << 7  # FUSE_HAS_RESEND, bit 39 of the 64
_FLAGS2_PASSTHROUGH = 1 << 5
_STACK_DEPTH = 1  # of files that the kernel reads in our place: any but those of an overlay
_FLAGS_INIT_EXT = 1 << 30  # the message has flags2
_FLAGS_HONOURED = (
    1 << 0  # ASYNC_READ
    | 1 << 4  # EXPORT_SUPPORT: LOOKUP of "." and ".."
    | 1 << 5  # BIG_WRITES
    | 1 << 12  # AUTO_INVAL_DATA
    | 1 << 13  # DO_READDIRPLUS
    | 1 << 15  # ASYNC_DIO
    | 1 << 18  # PARALLEL_DIROPS
    | 1 << 22  # MAX_PAGES
    | 1 << 23  # CACHE_SYMLINKS
    | _FLAGS_INIT_EXT
)
"""What `operations` keeps when it is agreed on. libfuse agrees to more by itself (locks, truncation at open), which a
read-only tree has no answer to."""


@dataclass(frozen=True)
class Agreement:
    """What kernel and libfuse said at INIT; holds for as long as the mount does."""

    request: bytes
    reply: bytes

    @property
    def can_resend(self) -> bool:
        """Whether the kernel can be asked to send unanswered requests again."""
        flags2 = _INIT_IN.unpack_from(self.request, _IN_HEADER_BYTES)[4]
        return bool(flags2 & _FLAGS2_HAS_RESEND)

    @property
    def has_passthrough(self) -> bool:
        """Whether kernel and we agreed on backing files."""
        flags2: int = _INIT_OUT.unpack_from(self.reply, _OUT_HEADER_BYTES)[10]
        return bool(flags2 & _FLAGS2_PASSTHROUGH)

    @property
    def write_bytes_max(self) -> int:
        """The longest write the kernel may send: a buffer for requests must have room for it (fuse_dev_do_read)."""
        write_bytes_max: int = _INIT_OUT.unpack_from(self.reply, _OUT_HEADER_BYTES)[6]
        return write_bytes_max

    def repeated(self) -> bytes:
        """An INIT that offers exactly what is in force, for another libfuse to accept."""
        major, minor, read_ahead, flags, flags2 = _INIT_IN.unpack_from(self.request, _IN_HEADER_BYTES)
        _, minor_out, _, flags_out, *_, flags2_out, _ = _INIT_OUT.unpack_from(self.reply, _OUT_HEADER_BYTES)
        in_force = (
            major,
            min(minor, minor_out),
            read_ahead,
            flags & (flags_out | _FLAGS_INIT_EXT),
            flags2 & flags2_out,
        )
        request = bytearray(self.request)
        _INIT_IN.pack_into(request, _IN_HEADER_BYTES, *in_force)
        return bytes(request)

    def check_same(self, reply: bytes) -> None:
        """Raises: ConfigError unless a reply to `repeated` means what was agreed on."""
        said, agreed = _meaning(reply), _meaning(self.reply)
        if said != agreed:
            raise ConfigError(
                f"this libfuse would not speak to the kernel like the one that mounted ({said}, agreed: {agreed}): "
                f"the mount cannot be handed over; unmount it and mount again"
            )


def _meaning(reply: bytes) -> tuple[int, ...]:
    """What in an INIT reply binds both sides: major, flags, max_write, time_gran, max_pages, flags2.

    Left out: read-ahead and queue limits, which are the kernel's own once set, and the minor version, which is the
    smaller of both.
    """
    major, _, _, flags, _, _, max_write, time_gran, max_pages, _, flags2, _ = _INIT_OUT.unpack_from(
        reply, _OUT_HEADER_BYTES
    )
    return major, flags, max_write, time_gran, max_pages, flags2


class Channel:
    """libfuse's descriptor, with a socket behind it until `connect` puts the device there."""

    def __init__(self) -> None:
        self._ours, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = far.detach()
        """What libfuse reads and writes."""

    def take_place_of(self, fd: int) -> int:
        """Become descriptor `fd`, which libfuse has opened; the file that was there is returned."""
        before = os.dup(fd)
        os.dup2(self.fd, fd, inheritable=False)
        os.close(self.fd)
        self.fd = fd
        return before

    @property
    def our_end(self) -> socket.socket:
        """Where libfuse's side of the conversation can be had."""
        return self._ours

    def connect(self, device: int) -> None:
        """From now on libfuse talks to the kernel. Nobody may be waiting on `fd`. `device` stays the caller's."""
        os.dup2(device, self.fd, inheritable=False)
        self._ours.close()

    def disconnect(self) -> None:
        """Let go of the device; libfuse keeps a descriptor behind which nobody is. Nobody may be waiting on it."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            os.dup2(near.fileno(), self.fd, inheritable=False)

    def close(self) -> None:
        """For a channel that libfuse never got."""
        self._ours.close()
        os.close(self.fd)


def find() -> int:
    """The descriptor of /dev/fuse that libfuse has just opened. Raises: ConfigError if there is not exactly one."""
    found = [int(path.name) for path in Path("/proc/self/fd").iterdir() if _is_device(int(path.name))]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} descriptors of /dev/fuse are open in this process: expected one")
    return found[0]


def _is_device(fd: int) -> bool:
    try:
        status = os.fstat(fd)
    except OSError:  # the one that listed /proc
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEVICE


def read_init(device: int) -> bytes:
    """The kernel's INIT, which waits in a fresh device. Raises: StoreError if it does not."""
    if not select.select([device], [], [], _INIT_TIMEOUT_S)[0]:
        raise StoreError(f"the kernel did not begin to talk within {_INIT_TIMEOUT_S:g} s of the mount")
    return os.read(device, _REQUEST_BYTES_MAX)


def honoured(request: bytes, reply: bytes) -> bytes:
    """libfuse's reply to an INIT without what we could not keep, and with what we can and it knows nothing of."""
    fields = list(_INIT_OUT.unpack_from(reply, _OUT_HEADER_BYTES))
    fields[3] &= _FLAGS_HONOURED
    fields[10] &= _FLAGS2_HAS_RESEND
    if _INIT_IN.unpack_from(request, _IN_HEADER_BYTES)[4] & _FLAGS2_PASSTHROUGH:
        fields[3] |= _FLAGS_INIT_EXT
        fields[10] |= _FLAGS2_PASSTHROUGH
        fields[11] = _STACK_DEPTH
    changed = bytearray(reply)
    _INIT_OUT.pack_into(changed, _OUT_HEADER_BYTES, *fields)
    return bytes(changed)


def resend(device: int) -> None:
    """Have the kernel send again what was read from the device and never answered."""
    os.write(device, _OUT_HEADER.pack(_OUT_HEADER_BYTES, _NOTIFY_RESEND, 0))


def is_connected(device: int) -> bool:
    """Whether the mount still stands: a connection that was ended polls as an error."""
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)

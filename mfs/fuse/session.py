"""One FUSE session: mounting, serving, telling the kernel what changed. pyfuse3 has one session per process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pyfuse3
import trio

from mfs.errors import ConfigError
from mfs.fuse.kernel import MAX_READS
from mfs.fuse.operations import Operations

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def mounted(
    operations: Operations, mountpoint: Path, *, label: str, allow_other: bool
) -> AsyncIterator[trio.CancelScope]:
    """Mount, serve while the context is open, unmount.

    Yields a scope that is cancelled when the kernel ends the session (somebody unmounted). Raises: ConfigError if it
    cannot be mounted. On exit requests still waiting are dropped: their readers get ENOTCONN.
    """
    options = {"default_permissions", "ro", "nosuid", "nodev", "subtype=mfs", f"fsname=mfs:{_ascii(label)}"}
    if allow_other:
        options.add("allow_other")
    try:
        pyfuse3.init(operations, str(mountpoint), options)
    except RuntimeError as error:
        raise ConfigError(
            f"{mountpoint} cannot be mounted ({error}): {_mount_help(allow_other)}; libfuse's own words are in the log"
        ) from error
    try:
        async with trio.open_nursery() as nursery:
            ended = trio.CancelScope()

            async def serve() -> None:
                await pyfuse3.main(max_tasks=MAX_READS)
                ended.cancel()

            nursery.start_soon(serve)
            try:
                yield ended
            finally:
                nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)
        operations.close_all()


def invalidate_names(names: Iterable[tuple[int, str]]) -> None:
    """Have the kernel ask again for (directory inode, name). Never blocks: pyfuse3 has a thread that sends them."""
    for inode, name in names:
        pyfuse3.invalidate_entry_async(inode, name.encode(), ignore_enoent=True)


def _mount_help(allow_other: bool) -> str:
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing; in a container start it with --device /dev/fuse --cap-add SYS_ADMIN"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse cannot be opened ({errno.errorcode.get(error.errno or 0)})"
    if allow_other and os.geteuid():
        return "--allow-other needs 'user_allow_other' in /etc/fuse.conf for users other than root"
    return "is fusermount3 installed (Debian package fuse3) and the mount point yours?"


def _ascii(label: str) -> str:
    """A label that libfuse takes as an option value: ASCII, without what separates options."""
    return "".join(c if c.isascii() and c.isprintable() and c not in ",\\ " else "_" for c in label)

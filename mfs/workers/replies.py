"""Replies that a worker writes by itself: the kernel hears from whoever has brought the bytes (decisions/0027).

An order says to whom its bytes go: what stands before them, which is the daemon's to know, and the part of the piece.
The daemon answers all the same when it hears that they are there, and whoever comes second is told so (ENOENT) and has
done nothing. So nothing is said of replies in a worker's answer, and whatever becomes of one the daemon makes good.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class Device:
    """A descriptor that is closed with the last who uses it: a thread may be writing when it is taken back."""

    def __init__(self, fd: int) -> None:
        """fd: ours from now on."""
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Replies:
    """Writes them while there is a device. Thread-safe."""

    def __init__(self) -> None:
        self.device: Device | None = None

    def write(self, replies: Mapping[bytes, tuple[int, int]], piece: memoryview) -> None:
        """Answer with parts of a piece whose bytes are there and verified.

        replies: by what goes before the bytes, where they begin and end in the piece.
        """
        device = self.device
        if device is None:
            return
        for head, (start, stop) in replies.items():
            try:
                os.writev(device.fd, [head, piece[start:stop]])
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):  # the reader is gone, or the mount
                    logger.warning("a reply of %d bytes was not taken (%s)", stop - start, error)

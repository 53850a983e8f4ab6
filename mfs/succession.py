"""Taking a mount over from a daemon that was killed: all there is of it is what its holder has kept.

Node ids and most of the tree are made anew (`tree.inodes`, `tree.record`); what cannot be stands in the journal. No
origin is asked before readers are served again: what it shows now is looked at afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import trio

from mfs.errors import StoreError
from mfs.fuse.device import Agreement, is_connected
from mfs.fuse.journal import AGREEMENT, FORMAT, Journal
from mfs.mount import Mount


class Remains:
    """See `mount.Predecessor`."""

    def __init__(self, held: Sequence[int]) -> None:
        """held: /dev/fuse, the mount's lock, its journal. Raises: StoreError if they are of no use."""
        self._device, self.lock, journal = held
        self._journal = Journal(journal)
        row = self._journal.row(AGREEMENT)
        if row is None or row[0] != FORMAT:
            raise StoreError(f"the journal of the daemon that was killed is not of format {FORMAT}")
        _, request, reply, *known = row
        self.agreement = Agreement(request, reply)
        self.identities: list[str] = known[0] if known else []
        """Of the sources; none from an earlier version's daemon."""

    async def hand_over(self, mount: Mount) -> None:
        """Have `mount` show what was shown, know what the kernel knows, and answer it."""
        await mount.looking.show_last(mount.pool.identities)
        renewed = mount.operations.inherit(self._journal)
        mount.operations.settled = trio.Event()
        if not is_connected(self._device):
            mount.note_gone()
            raise StoreError("the mount was taken away while nobody served it")
        mount.session.connect(self._device, self.agreement)
        mount.session.invalidate_names(renewed)
        os.close(self._device)

    async def wait_ended(self) -> None:
        """It has."""

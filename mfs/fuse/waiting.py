"""Handlers that wait for a source, and how many of them one model may have: each holds a task, and reads ahead hold the
kernel's queue as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mfs.errors import StoreError
from mfs.fuse.kernel import MAX_BACKGROUND
from mfs.workers.shares import Group, Shares


class Waiting:
    """Those of one mount."""

    def __init__(self) -> None:
        self._shares = Shares(MAX_BACKGROUND)

    def check(self, group: Group) -> None:
        """Raises: StoreError where a model may let no further handler wait."""
        if not self._shares.may_take(group):
            raise StoreError(
                f"{self._shares.held(group)} requests wait for this model already, more than its share of "
                f"{MAX_BACKGROUND}; the others go on"
            )

    @contextmanager
    def for_(self, group: Group) -> Iterator[None]:
        """Hold a handler while a model may let it wait. Raises: StoreError where its share is used up."""
        self.check(group)
        self._shares.take(group)
        try:
            yield
        finally:
            self._shares.give(group)

"""Which models a mount has, and how large they are as far as somebody has looked. A model: a top-level directory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import trio

from mfs.tree.namespace import Namespace
from mfs.types import EntryKind

_TURN_S = 0.005  # without giving way to readers
_FILE = bytes((EntryKind.FILE,))


@dataclass
class ModelSize:
    """One model; or, with name '', the files beside the models of a source."""

    source: int
    name: str
    size: int | None = None
    """Sum of its files as far as its directories are listed; None if its own is not."""
    files_count: int = 0


class ModelSizes:
    """Adds the tree up again only after something was published. Belongs to the trio thread."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._models: list[ModelSize] = []
        self._published_count = -1

    async def look(self) -> list[ModelSize]:
        """All models of the tree; nothing is asked of any source. Gives way to readers."""
        published = self._namespace.published_count
        if published == self._published_count:
            return self._models
        found = dict[tuple[int, str], ModelSize]()
        turn_ends = time.monotonic() + _TURN_S
        for top in self._namespace.tops():
            listing = top.listing
            for index in range(len(listing) if listing is not None else 0):
                if listing.kinds[index] == EntryKind.DIRECTORY and listing.inodes[index]:  # type: ignore[union-attr]
                    name = listing.names[index]  # type: ignore[union-attr]
                    found[top.source, name] = ModelSize(top.source, name)
                if time.monotonic() > turn_ends:
                    await trio.lowlevel.checkpoint()
                    turn_ends = time.monotonic() + _TURN_S
        for directory in self._namespace.listed():
            if directory.source >= 0 and directory.listing is not None and not directory.removed:
                files_count = directory.listing.kinds.count(_FILE)
                name = directory.path.partition("/")[0]
                if name == "" and files_count:
                    found[directory.source, ""] = ModelSize(directory.source, "")
                model = found.get((directory.source, name))
                if model is not None:
                    if model.size is not None or directory.path == name:
                        model.size = (model.size or 0) + directory.listing.total_bytes
                    model.files_count += files_count
            if time.monotonic() > turn_ends:
                await trio.lowlevel.checkpoint()
                turn_ends = time.monotonic() + _TURN_S
        self._models, self._published_count = list(found.values()), published
        return self._models

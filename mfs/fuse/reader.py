"""What the handlers ask of whoever brings bytes: `mfs.reader` is it."""

from __future__ import annotations

from io import FileIO
from typing import Any, Protocol

from mfs.fuse.loop import Body
from mfs.tree.nodes import Node
from mfs.types import ByteRange
from mfs.workers.shares import Group


class OpenFile(Protocol):
    """An open object: what `Reader.open` returns."""

    size: int
    group: Group
    """Whose share of the handlers its readers use."""

    @property
    def settled(self) -> bool:
        """Whether `settle` would return at once."""
        ...

    def read_nowait(self, span: ByteRange) -> Body | None: ...

    def begin(self, span: ByteRange, head: bytes | None) -> Any:
        """Have what is missing of `span` ordered, if nothing stands in the way; `read` is to follow, with what this
        returns.

        head: what to put before the bytes for whoever brings them to answer the kernel; None: nobody may.
        """
        ...

    async def read(self, span: ByteRange, begun: Any) -> Body: ...

    async def settle(self) -> None: ...

    @property
    def state(self) -> object:
        """The same for all handles on one object version."""
        ...

    @property
    def may_be_whole(self) -> bool:
        """Whether `whole` is worth asking."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether there is such a file, as far as is known."""
        ...

    async def whole(self) -> FileIO | None:
        """A file that is the object, verified and complete; None if there is none now."""
        ...

    def pass_through(self) -> None:
        """The kernel reads that file by itself: until `close`, nothing will be heard of this handle."""
        ...

    @property
    def has_header(self) -> bool:
        """Whether `header` is worth asking."""
        ...

    async def header(self) -> bytes | None: ...

    def export(self) -> list[Any]: ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Where bytes and attributes beyond the tree come from."""

    def open(self, node: Node) -> OpenFile: ...

    def reopen(self, exported: list[Any]) -> OpenFile:
        """A handle like the one that said this of itself with `OpenFile.export`."""
        ...

    async def attributes(self, node: Node) -> dict[str, str]: ...

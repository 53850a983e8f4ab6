"""The tree of an artifact or an image, from its layers. Pure, over who tells the members of a tar layer.

An artifact's layers are files, or tars of files, side by side. An image's build on each other: a later one replaces and
removes (`.wh.` names) what is below; of the result what lies under `models/` is shown, as modelcars have it.

Source: image-spec 1.1 layer.md, "Whiteouts"; KServe's modelcars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mfs.errors import StoreError
from mfs.oci.artifact import BadLayerError, Descriptor, Manifest, Place, entry_at, mtime_ns_of, named_layers, packing_of
from mfs.oci.media import Packing
from mfs.oci.tar import Kind, Member
from mfs.sources import bounds
from mfs.sources.tree import TreeBuilder
from mfs.types import Entry, EntryKind

IMAGE_ROOT = "models"
"""Of an image only this is shown, without its name."""

Members = Callable[[Descriptor, Packing], Sequence[Member]]
"""All members of a tar layer. Raises: BadLayerError where the layer's content is what is wrong."""

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_HOPS_MAX = 40
"""Links through links followed, as Linux does."""
_STEPS_MAX = 10_000_000
"""Names that all links of one listing lead through."""


class _Leaf(NamedTuple):
    """A member, and the layer it stands in."""

    member: Member
    layer: Descriptor

    def entry(self) -> Entry:
        packing = packing_of(self.layer)
        place = Place(packing, self.layer.digest, self.layer.size, self.member.offset, self.member.size)
        return entry_at(place, self.member.mtime_ns)


class _Node(dict[str, "_Node | _Leaf"]):
    """A directory."""


def add_files(tree: TreeBuilder, manifest: Manifest, members: Members, where: str) -> None:
    """Put all files of a manifest into the tree: what is left out of an artifact is wrong for ever.

    Raises: StoreError where nothing of it can be shown, or an image not whole; what `members` raises, but for
    BadLayerError of an artifact's layer.
    """
    if manifest.is_image:
        _add_image(tree, manifest, members, where)
    else:
        _add_artifact(tree, manifest, members, where)
    if not len(tree) and tree.left_out.count:
        raise StoreError(f"{where}: nothing of it can be shown: left out {tree.left_out}")


def _add_image(tree: TreeBuilder, manifest: Manifest, members: Members, where: str) -> None:
    if manifest.faults:
        raise StoreError(f"{where}: an image with a layer that is none: {manifest.faults[0]}")
    image = _Overlay(where, tree, IMAGE_ROOT)
    for layer in manifest.layers:
        image.lay(members(layer, packing_of(layer)), layer)
    shown = image.root.get(IMAGE_ROOT)
    if not isinstance(shown, _Node):
        raise StoreError(f"{where}: an image without /{IMAGE_ROOT}: neither a model artifact nor a modelcar")
    _show(tree, shown, where)


def _add_artifact(tree: TreeBuilder, manifest: Manifest, members: Members, where: str) -> None:
    if not manifest.layers and not manifest.faults:
        raise StoreError(f"{where}: a manifest without layers: nothing of it is a file")
    if manifest.faults:
        tree.leave_out(f"{manifest.faults_count} layers", "; ".join(manifest.faults))
    loose = _Overlay(where, tree)
    for path, layer in named_layers(manifest.layers):
        try:
            packing = packing_of(layer)
            if packing is not Packing.RAW:
                loose.lay(members(layer, packing), layer, has_whiteouts=False)
                continue
        except BadLayerError as error:
            tree.leave_out(f"layer {layer.digest[:19]}", str(error))
            continue
        if path:
            place = Place(packing, layer.digest, layer.size, 0, layer.size)
            tree.add_file(path, entry_at(place, mtime_ns_of(layer)))
        else:
            tree.leave_out(f"layer {layer.digest[:19]}", f"of type {layer.media_type!r:.80}: states no file name")
    _show(tree, loose.root, where)


class _Overlay:
    """Layers over layers."""

    def __init__(self, where: str, tree: TreeBuilder, shown: str = "") -> None:
        """tree: is told of names that cannot stand anywhere. shown: the top directory that matters, '' for all."""
        self.root = _Node()
        self._where, self._tree, self._shown = where, tree, shown
        self._directories_count = 0

    def lay(self, found: Sequence[Member], layer: Descriptor, *, has_whiteouts: bool = True) -> None:
        """Lay one layer over what is there. Raises: StoreError for more directories than any tree has."""
        found = [member for member in found if member.path and not self._cannot_stand(member)]
        if has_whiteouts:
            for member in found:
                self._take_away(member.path)
            found = [member for member in found if not member.path.rpartition("/")[2].startswith(_WHITEOUT)]
        for member in found:
            folder, _, name = member.path.rpartition("/")
            directory = self._directory(folder)
            if member.kind is Kind.DIRECTORY:
                self._directory(member.path)
            else:
                is_twin = member.kind is Kind.TWIN
                directory[name] = self._twin(member, layer) if is_twin else _Leaf(member, layer)

    def _cannot_stand(self, member: Member) -> bool:
        """Whether no tree can hold its name: it is left out, and its directories cost nothing."""
        fault = member.fault if member.kind is Kind.NAMELESS else bounds.path_fault(member.path)
        if fault and (not self._shown or member.path.partition("/")[0] == self._shown):
            self._tree.leave_out(member.path, fault)
        return fault is not None

    def _take_away(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        above = _at(self.root, folder)
        if not isinstance(above, _Node):
            return
        if name == _OPAQUE:
            above.clear()
        elif name.startswith(_WHITEOUT):
            above.pop(name.removeprefix(_WHITEOUT), None)

    def _directory(self, path: str) -> _Node:
        found = self.root
        for part in path.split("/") if path else ():
            inner = found.get(part)
            if not isinstance(inner, _Node):
                self._directories_count += 1
                if self._directories_count > bounds.DIRECTORIES_MAX:
                    raise StoreError(f"{self._where}: more than {bounds.DIRECTORIES_MAX} directories in its layers")
                inner = found[part] = _Node()
            found = inner
        return found

    def _twin(self, member: Member, layer: Descriptor) -> _Leaf:
        twin = _at(self.root, member.target)
        if isinstance(twin, _Leaf) and twin.member.kind in (Kind.FILE, Kind.LINK):
            return twin
        fault = f"is another name of {member.target!r:.100}, which is not there"
        return _Leaf(member._replace(kind=Kind.OTHER, fault=fault), layer)


def _at(root: _Node, path: str) -> _Node | _Leaf | None:
    found: _Node | _Leaf | None = root
    for part in path.split("/") if path else ():
        if not isinstance(found, _Node):
            return None
        found = found.get(part)
    return found


def _show(tree: TreeBuilder, root: _Node, where: str) -> None:
    links = _Links(root, where)
    for path, node in _walk(root):
        if isinstance(node, _Node):
            tree.add_directory(path)
        elif node.member.kind is Kind.FILE:
            tree.add_file(path, node.entry())
        elif node.member.kind is Kind.LINK:
            folder = path.rpartition("/")[0]
            if fault := links.fault(folder, node.member.target):
                tree.leave_out(path, fault)
            else:
                mtime_ns = node.member.mtime_ns
                tree.add_file(path, Entry("", EntryKind.SYMLINK, 0, mtime_ns, node.member.target))
        else:
            tree.leave_out(path, node.member.fault)


def _walk(root: _Node) -> Iterator[tuple[str, _Node | _Leaf]]:
    waiting: list[tuple[str, _Node]] = [("", root)]
    while waiting:
        folder, directory = waiting.pop()
        for name, node in directory.items():
            path = f"{folder}/{name}" if folder else name
            yield path, node
            if isinstance(node, _Node):
                waiting.append((path, node))


class _Links:
    """Where links lead, through other links where those stand on the way."""

    def __init__(self, root: _Node, where: str) -> None:
        self._root, self._where = root, where
        self._steps_count = 0

    def fault(self, folder: str, target: str) -> str | None:
        """Why a link in `folder` is not shown: it leads out, to nothing, or to one that does; None if it does not.

        Raises: StoreError where all links together lead through more names than any tree's.
        """
        if fault := bounds.link_fault(folder, target):
            return fault
        nowhere = f"is a link to {target!r:.100}, which is not there"
        above: list[_Node] = [self._root]
        names = folder.split("/") if folder else []
        for name in names:
            inner = above[-1].get(name)
            if not isinstance(inner, _Node):
                return nowhere
            above.append(inner)
        waiting = target.split("/")[::-1]
        hops_count = 0
        while waiting:
            self._steps_count += 1
            if self._steps_count > _STEPS_MAX:
                raise StoreError(f"{self._where}: its links lead through more than {_STEPS_MAX} names")
            part = waiting.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if len(above) == 1:
                    return nowhere
                above.pop()
                names.pop()
                continue
            found = above[-1].get(part)
            if isinstance(found, _Node):
                above.append(found)
                names.append(part)
            elif found is None:
                return nowhere
            elif found.member.kind is Kind.LINK:
                hops_count += 1
                if hops_count > _HOPS_MAX or bounds.link_fault("/".join(names), found.member.target):
                    return f"is a link to {target!r:.100}, which leads to nothing that is shown"
                waiting += found.member.target.split("/")[::-1]
            elif found.member.kind is not Kind.FILE or waiting:
                return nowhere
        return None

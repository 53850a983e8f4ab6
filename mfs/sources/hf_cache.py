"""A repository as huggingface_hub's own cache shows it, for programs that name a model by its name on the Hub. Pure.

    models--org--name/           the mount's directory for the source
        refs/main                the commit, as text
        snapshots/<commit>/…     the files, at their places

With HF_HUB_CACHE on the mount and HF_HUB_OFFLINE=1 `from_pretrained("org/name")` finds them there. The files stand in
the snapshot themselves: the cache's links into `blobs/` only save room on a disk.
Source: huggingface_hub, guide "Understand caching".
"""

from __future__ import annotations

from collections.abc import Iterable

from mfs.sources.base import Page
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, Entry, EntryKind, ObjectId

_REFS, _SNAPSHOTS = "refs", "snapshots"


def directory_name(repo: str) -> str:
    """The name of the directory that the cache keeps a repository in."""
    return "--".join(("models", *repo.split("/")))


def cache_pages(pages: Iterable[Page], where: str, revision: str, commit: str) -> list[Page]:
    """The pages of a repository at a commit, as the cache would have them.

    revision: as the user named it; programs that name none ask for `main`, which is the same commit here.
    """
    tree = TreeBuilder(where, "")
    for name in sorted({"main", revision} - {commit}):
        tree.add_file(f"{_REFS}/{name}", Entry("", EntryKind.FILE, len(commit), 0, commit))
    tree.add_directory(f"{_SNAPSHOTS}/{commit}")
    for folder, entries in pages:
        for entry in entries:
            path = "/".join(part for part in (_SNAPSHOTS, commit, folder, entry.name) if part)
            if entry.kind is EntryKind.FILE:
                tree.add_file(path, entry)
            else:
                tree.add_directory(path)
    return list(tree.pages())


def fill_ref(obj: ObjectId, span: ByteRange, out: memoryview) -> bool:
    """Whether an object is one of the cache's own, whose bytes are its version; then `out` is filled."""
    if not obj.path.startswith(f"{_REFS}/"):
        return False
    out[:] = obj.version.encode()[span.start : span.stop]
    return True


def repository_path(path: str) -> str:
    """The path inside the repository of a path in a snapshot."""
    return path.split("/", 2)[2]

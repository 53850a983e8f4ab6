"""A model as an image: uncompressed tars with files under /models/, which containerd mounts as it mounts any image.

Large files have a layer each, so that what two versions share is stored and fetched once; the small ones share the
first. More than LAYERS_MAX are put together: overlayfs and Docker take some 120. Pure.

Source: image-spec 1.1 config.md, layer.md; KServe's modelcars; Kubernetes' image volumes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence

from mfs.oci.files import IMAGE_ROOT
from mfs.oci.tar import BLOCK
from mfs.types import ObjectId

ARCHITECTURES = ("amd64", "arm64")
"""One image for each, of the same layers: weights are the same for all, but who runs images looks for its own."""
LAYERS_MAX = 100
SMALL_BYTES = 16 << 20

Pieces = tuple[bytes | ObjectId, ...]


def layers(files: Sequence[ObjectId], mtime_s: int) -> list[tuple[str, Pieces]]:
    """(name for messages, pieces of a tar) of each layer. Equal files make equal layers; all have the one time."""
    small = [file for file in files if file.size < SMALL_BYTES]
    large = [file for file in files if file.size >= SMALL_BYTES]
    each = -(-len(large) // (LAYERS_MAX - 1)) or 1
    groups = [small] if small else []
    groups += [large[start : start + each] for start in range(0, len(large), each)]
    return [(_name(group), _tar(group, mtime_s, is_first=number == 0)) for number, group in enumerate(groups)]


def config(architecture: str, diff_ids: Sequence[str]) -> dict[str, object]:
    """The image's configuration: nothing to run, only a file system."""
    return {
        "architecture": architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [{"created_by": "mfs push --modelcar"} for _ in diff_ids],
    }


def _name(group: Sequence[ObjectId]) -> str:
    return group[0].path if len(group) == 1 else f"{group[0].path} and {len(group) - 1} more"


def _tar(group: Sequence[ObjectId], mtime_s: int, *, is_first: bool) -> Pieces:
    pieces: list[bytes | ObjectId] = []
    if is_first:
        root = tarfile.TarInfo(IMAGE_ROOT)
        root.type, root.mode, root.mtime = tarfile.DIRTYPE, 0o755, mtime_s
        pieces.append(root.tobuf(tarfile.PAX_FORMAT))
    for file in group:
        header = tarfile.TarInfo(f"{IMAGE_ROOT}/{file.path}")
        header.size, header.mode, header.mtime = file.size, 0o644, mtime_s
        pieces.append(header.tobuf(tarfile.PAX_FORMAT))
        if file.size:
            pieces.append(file)
        if padding := -file.size % BLOCK:
            pieces.append(bytes(padding))
    pieces.append(bytes(2 * BLOCK))
    return tuple(pieces)

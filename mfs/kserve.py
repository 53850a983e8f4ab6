"""A model that is mounted on the node, put where KServe's servers look for it: links instead of a download.

KServe calls a storage initializer with pairs of a URI and a directory, and mounts that directory into the server. Ours
makes links in it to the files below a mount that both containers see at the same path. Ends once all of them are there.

Source: KServe, ClusterStorageContainer and its python/storage-initializer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mfs.control import mountinfo
from mfs.errors import ConfigError, NotFoundError, StoreError, UsageError

SCHEME = "mfs"
_PAUSE_S = 0.2


def model_path(uri: str, mounts: Path) -> Path:
    """What 'mfs://models/llama' means: the path 'models/llama' below `mounts`. Raises: UsageError."""
    parts = urlsplit(uri)
    if parts.scheme != SCHEME or parts.query or parts.fragment:
        raise UsageError(f"{uri!r:.200}: expected mfs://PATH, a path below {mounts}")
    names = [unquote(name) for name in f"{parts.netloc}/{parts.path}".split("/") if name]
    if not names or any(name in (".", "..") or "/" in name or "\0" in name for name in names):
        raise UsageError(f"{uri!r:.200}: expected mfs://PATH, a path below {mounts} without '.' and '..'")
    return mounts.joinpath(*names)


def pairs(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """[(URI, directory)] of what KServe says. Raises: UsageError."""
    if not arguments or len(arguments) % 2:
        raise UsageError(f"{len(arguments)} arguments: expected pairs of a URI and a directory")
    return [(uri, Path(os.path.abspath(place))) for uri, place in zip(arguments[::2], arguments[1::2], strict=True)]


def wait_for(model: Path, *, until_s: float) -> None:
    """Until the model is seen in a mount of ours. until_s: time.monotonic() value.

    Raises: NotFoundError if it is not by then, and where a mount is.
    """
    while True:
        in_mount = mountinfo.locate(str(model)) is not None
        if in_mount and os.path.lexists(model):
            return
        if time.monotonic() >= until_s:
            if in_mount:
                raise NotFoundError(f"{model}: no such model in the mount: check the URI, or 'mfs refresh' on the node")
            raise NotFoundError(
                f"{model}: no mount of mfs shows there: the pod needs the volume with 'mountPropagation: "
                f"HostToContainer', or the node's mount is missing"
            )
        time.sleep(_PAUSE_S)


def link(model: Path, place: Path) -> int:
    """Make what is in the directory `model`, or that one file, seen in the directory `place`. How many names.

    Links that are there and ours are made anew. Raises: ConfigError if something else has such a name; StoreError.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(model)) if model.is_dir() else None
        targets = {name: model / name for name in names} if names is not None else {model.name: model}
        for name, target in targets.items():
            at = place / name
            if at.is_symlink():
                at.unlink()
            elif at.exists():
                raise ConfigError(f"{at} is there already and no link of ours: expected an empty directory")
            at.symlink_to(target)
    except OSError as error:
        raise StoreError(f"{error.filename or model}: {error.strerror}") from error
    return len(targets)

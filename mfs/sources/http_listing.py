"""What stands in a folder on a web server: nginx's JSON index or a manifest of ours. Pure; no I/O.

The manifest, `mfs-manifest.json` in the folder or any .json named by the URL:

    {"files": [{"path": "m/w.safetensors", "size": 123, "sha256": "…", "etag": "…", "mtime": 1767225600}]}

path: below the manifest's folder, '/'-separated. size: bytes. The rest may be absent; sha256 is hex of the whole file,
etag as the server sends it (quotes and W/ do not matter), mtime seconds since the epoch, ISO 8601 or a date of HTTP. An
entry that says what cannot be is left out, a date that is none is taken for absent.

What binds a read to a version goes into `Entry.locator`: see `mfs.sources.binding`.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from typing import Any

from mfs.errors import StoreError
from mfs.fetch.dates import epoch_s
from mfs.fetch.validators import opaque_of
from mfs.sources.binding import UNBOUND, locator_of
from mfs.sources.bounds import parse_json, size_of
from mfs.sources.tree import TreeBuilder
from mfs.types import Entry, EntryKind

MANIFEST_NAME = "mfs-manifest.json"

_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


def is_autoindex(body: bytes) -> bool:
    """Whether a folder's answer is nginx's JSON index."""
    return body.lstrip()[:1] == b"["


def add_autoindex(tree: TreeBuilder, body: bytes, where: str) -> list[str]:
    """Put nginx's JSON index of one folder into the tree; its names. Raises: StoreError if it is none."""
    names: list[str] = []
    try:
        items = parse_json(body)
        for item in items:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                tree.leave_out(reprlib.repr(item), "an entry without a name")
                continue
            names.append(name := item["name"])
            path = name.replace("/", "\0")  # a '/' inside a name is a fault, not a directory
            if item.get("type") == "directory":
                tree.add_unlisted_directory(path)
            elif item.get("type") == "file":
                size, seconds = size_of(item.get("size")), epoch_s(item.get("mtime"))
                dated = seconds if seconds is not None else reprlib.repr(item.get("mtime"))
                tree.add_file(path, _entry(size, f"{dated}-{size}", seconds))
        if items and not names:
            raise ValueError("none of its entries has a name")
    except (ValueError, TypeError) as e:
        raise StoreError(f"{where}: expected nginx's JSON index, got {body[:60]!r}: {e}") from e
    return names


def add_manifest(tree: TreeBuilder, body: bytes, where: str) -> None:
    """Put all files of a manifest into the tree. Raises: StoreError naming what is wrong with it."""
    try:
        files = parse_json(body)["files"]
        if not isinstance(files, list):
            raise TypeError("'files' is no list")
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f'{where}: expected {{"files": [{{"path": …, "size": …}}]}}, got {body[:60]!r}: {e!r}') from e
    fallback = f"{UNBOUND}:{hashlib.sha256(body).hexdigest()[:16]}"
    for number, item in enumerate(files):
        try:
            path, entry = _manifest_entry(item, fallback)
        except ValueError as e:
            tree.leave_out(f"entry {number} of 'files', {reprlib.repr(item)}", str(e))
        else:
            tree.add_file(path, entry)
    if files and not len(tree):
        raise StoreError(f"{where}: none of its files can be shown: {tree.left_out}")


def _manifest_entry(item: dict[str, Any], fallback: str) -> tuple[str, Entry]:
    """(path, entry). `fallback`: the version where the manifest names none; it changes with the manifest.

    Raises: ValueError saying what is wrong. Numbers and lengths beyond reason are the tree's business.
    """
    if not isinstance(item, dict) or not isinstance(item.get("path"), str) or "size" not in item:
        raise ValueError("expected an object with a path, which is a string, and a size, the number of bytes")
    path, size, seconds = item["path"], size_of(item["size"]), epoch_s(item.get("mtime"))
    digest = None
    sha256, etag = item.get("sha256"), item.get("etag") or None
    if sha256 is not None:
        match = _SHA256.fullmatch(sha256.lower()) if isinstance(sha256, str) else None
        if not match:
            raise ValueError("sha256 must be 64 hex digits")
        digest = f"sha256:{match[1]}"
    if etag is not None and not isinstance(etag, str):
        raise ValueError("etag must be a string")
    tag = f'"{opaque}"' if (opaque := opaque_of(etag or "")) else None
    version = tag or digest or (f"{seconds}-{size}" if seconds is not None else fallback)
    return path, _entry(size, version, seconds, etag=etag, digest=digest)


def _entry(
    size: int, version: str, seconds: int | None, *, etag: str | None = None, digest: str | None = None
) -> Entry:
    locator = locator_of(etag, None if seconds is None else seconds * 1_000_000_000)
    mtime_ns = (seconds or 0) * 1_000_000_000
    return Entry("", EntryKind.FILE, size, mtime_ns, version, digest, locator)

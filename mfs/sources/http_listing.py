"""What stands in a folder on a web server: nginx's JSON index or a manifest of ours. Pure; no I/O.

The manifest, `mfs-manifest.json` in the folder or any .json named by the URL:

    {"files": [{"path": "m/w.safetensors", "size": 123, "sha256": "…", "etag": "…", "mtime": 1767225600}]}

path: below the manifest's folder, '/'-separated. size: bytes. The rest may be absent; sha256 is hex of the whole file,
etag as the server sends it, mtime seconds since the epoch or ISO 8601.

What binds a read to a version goes into `Entry.locator` as a header line: `If-Match: "…"`, `ETag: W/"…"` (weak:
compared with the answer only), or `If-Unmodified-Since: <HTTP date>`.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any

from mfs.errors import StoreError
from mfs.sources.tree import TreeBuilder
from mfs.types import Entry, EntryKind

MANIFEST_NAME = "mfs-manifest.json"

_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


def is_autoindex(body: bytes) -> bool:
    """Whether a folder's answer is nginx's JSON index."""
    return body.lstrip()[:1] == b"["


def add_autoindex(tree: TreeBuilder, body: bytes, where: str) -> list[str]:
    """Put nginx's JSON index of one folder into the tree; its names. Raises: StoreError if it is none."""
    names = []
    try:
        for item in json.loads(body.decode("utf-8", "surrogateescape")):
            names.append(name := str(item["name"]))
            path = name.replace("/", "\0")  # a '/' inside a name is a fault, not a directory
            if item["type"] == "directory":
                tree.add_unlisted_directory(path)
            elif item["type"] == "file":
                seconds = _epoch_of_http_date(item["mtime"])
                tree.add_file(path, _entry(int(item["size"]), f"{seconds}-{item['size']}", seconds))
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f"{where}: expected nginx's JSON index, got {body[:60]!r}: {e!r}") from e
    return names


def add_manifest(tree: TreeBuilder, body: bytes, where: str) -> None:
    """Put all files of a manifest into the tree. Raises: StoreError naming what is wrong with it."""
    try:
        files = json.loads(body)["files"]
        if not isinstance(files, list):
            raise TypeError("'files' is no list")
    except (ValueError, KeyError, TypeError) as e:
        raise StoreError(f'{where}: expected {{"files": [{{"path": …, "size": …}}]}}, got {body[:60]!r}: {e!r}') from e
    fallback = f"manifest:{hashlib.sha256(body).hexdigest()[:16]}"
    for number, item in enumerate(files):
        try:
            path, entry = _manifest_entry(item, fallback)
        except (ValueError, KeyError, TypeError, OverflowError) as e:
            raise StoreError(f"{where}: entry {number} of 'files' is {str(item)[:80]!r}: {e!r}") from e
        tree.add_file(path, entry)


def _manifest_entry(item: dict[str, Any], fallback: str) -> tuple[str, Entry]:
    """(path, entry). `fallback`: the version where the manifest names none; it changes with the manifest."""
    path, size = item["path"], item["size"]
    if not isinstance(path, str) or type(size) is not int or size < 0:
        raise ValueError("path must be a string and size a number of bytes")
    seconds = _epoch_of(item["mtime"]) if item.get("mtime") is not None else None
    digest = None
    if item.get("sha256") is not None:
        match = _SHA256.fullmatch(str(item["sha256"]).lower())
        if not match:
            raise ValueError("sha256 must be 64 hex digits")
        digest = f"sha256:{match[1]}"
    etag = str(item["etag"]) if item.get("etag") else None
    if etag and not etag.endswith('"'):
        etag = f'"{etag}"'
    version = etag or digest or (f"{seconds}-{size}" if seconds is not None else fallback)
    return path, _entry(size, version, seconds, etag=etag, digest=digest)


def _entry(
    size: int, version: str, seconds: int | None, *, etag: str | None = None, digest: str | None = None
) -> Entry:
    if etag:
        locator = f"ETag: {etag}" if etag.startswith("W/") else f"If-Match: {etag}"
    elif seconds is not None:
        locator = f"If-Unmodified-Since: {email.utils.formatdate(seconds, usegmt=True)}"
    else:
        locator = ""
    mtime_ns = (seconds or 0) * 1_000_000_000
    return Entry("", EntryKind.FILE, size, mtime_ns, version, digest, locator)


def _epoch_of_http_date(text: str) -> int:
    return int(email.utils.parsedate_to_datetime(text).timestamp())


def _epoch_of(value: Any) -> int:
    """Whole seconds since the epoch: Last-Modified knows no finer ones."""
    if isinstance(value, int | float):
        return int(value)
    moment = datetime.fromisoformat(str(value))
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

"""Where models come from. `open_source` is the only place that knows all kinds; each kind is one module.

A new kind is a module with a class of the shape `mfs.sources.base.Source` and an `open_url`, and a line in `_MODULES`.
"""

from __future__ import annotations

import importlib
from urllib.parse import urlsplit

from mfs.errors import UsageError
from mfs.sources.base import Page, Source
from mfs.sources.options import SourceOptions

__all__ = ["Page", "Source", "SourceOptions", "open_source"]

_MODULES = {
    "file": "mfs.sources.folder",
    "s3": "mfs.sources.s3",
    "http": "mfs.sources.http",
    "https": "mfs.sources.http",
    "hf": "mfs.sources.hf",
}
"""Scheme -> module with `open_url(url, options) -> Source`. Imported when used: botocore alone weighs 30 MB."""


def open_source(url: str, options: SourceOptions | None = None) -> Source:
    """The source that `url` names: s3://bucket/prefix, hf://org/name[@rev], http(s)://host/path/, file:///dir or /dir.

    Does no I/O; the first `list` says whether the origin can be used.
    Raises: UsageError if the URL cannot name a source.
    """
    scheme = "file" if url.startswith("/") else urlsplit(url).scheme
    module = _MODULES.get(scheme)
    if module is None:
        known = ", ".join(f"{name}://" for name in _MODULES)
        raise UsageError(f"{shown_url(url)!r}: not a source; expected {known} or an absolute path")
    source: Source = importlib.import_module(module).open_url(url, options or SourceOptions())
    return source


def shown_url(url: str) -> str:
    """`url` without the password it may carry, for messages."""
    head, at, tail = url.partition("://")
    if not at or "@" not in tail.partition("/")[0]:
        return url
    authority, slash, rest = tail.partition("/")
    return f"{head}://***@{authority.rpartition('@')[2]}{slash}{rest}"

"""Where models come from. `open_source` is the only place that knows all kinds; each kind is one module.

A new kind is a module with a class of the shape `mfs.sources.base.Source` and an `open_url`, and a line in `_MODULES`.
"""

from __future__ import annotations

import importlib
from urllib.parse import urlsplit

from mfs.errors import UsageError
from mfs.shown import mask_url
from mfs.sources.base import Page, Source
from mfs.sources.options import SourceOptions

__all__ = ["Page", "Source", "SourceOptions", "open_source"]

_MODULES = {
    "file": "mfs.sources.folder",
    "s3": "mfs.sources.s3",
    "http": "mfs.sources.http",
    "https": "mfs.sources.http",
    "hf": "mfs.sources.hf",
    "mfs+s3": "mfs.registry.source",
    "mfs+file": "mfs.registry.source",
    "mfs+http": "mfs.registry.source",
    "mfs+https": "mfs.registry.source",
    "oci": "mfs.oci.source",
    "oci+http": "mfs.oci.source",
    "oci+https": "mfs.oci.source",
}
"""Scheme -> module with `open_url(url, options) -> Source`. Imported when used: botocore alone weighs 30 MB."""


def open_source(url: str, options: SourceOptions | None = None) -> Source:
    """The source that `url` names: s3://bucket/prefix, hf://org/name[@rev], oci://host/repository[:tag],
    http(s)://host/path/, file:///dir or /dir; or a registry of ours on one of these:
    mfs+s3://bucket/registry[/model[:tag]], mfs+file, mfs+http, mfs+https.

    Does no I/O; the first `list` says whether the origin can be used.
    Raises: UsageError if the URL cannot name a source.
    """
    try:
        scheme = "file" if url.startswith("/") else urlsplit(url).scheme
    except ValueError as error:  # a host in brackets that is no address
        raise UsageError(f"{mask_url(url)!r}: {error}") from None
    module = _MODULES.get(scheme)
    if module is None:
        known = ", ".join(f"{name}://" for name in _MODULES)
        raise UsageError(f"{mask_url(url)!r}: not a source; expected {known} or an absolute path")
    source: Source = importlib.import_module(module).open_url(url, options or SourceOptions())
    return source

"""From an mfs+…:// URL to the store over the registry's root, and what of it is meant.

A root holds the marker, `mfs-registry.json`. It is looked for at the place named and at the place above, so that
`…/registry`, `…/registry/llama` and `…/registry/llama:v7` all lead to `…/registry`. Where there is none, a push makes
the place above the last component the root, and that component the model's name.
"""

from __future__ import annotations

import importlib
import json
from typing import NamedTuple

from mfs.errors import AccessError, MfsError, NotFoundError, StoreError, UsageError
from mfs.registry import layout
from mfs.registry.layout import Address
from mfs.registry.store import Store
from mfs.shown import mask_url
from mfs.sources.options import SourceOptions

VERSION = 1
MARKER_BYTES_MAX = 64 << 10

_MODULES = {
    "file": "mfs.registry.folder_store",
    "s3": "mfs.registry.s3_store",
    "http": "mfs.registry.web_store",
    "https": "mfs.registry.web_store",
}
"""Scheme -> module with `open_place(place, options) -> Store`. Imported when used."""


class Place(NamedTuple):
    """A registry, and what of it is meant. Whoever has it closes the store."""

    store: Store
    """Over the root."""
    model: str | None
    """None: the registry as a whole."""
    tag: str | None
    manifest: str | None
    """64 hex digits, where the URL names one."""

    @property
    def name(self) -> str:
        """'llama:v7', for messages."""
        behind = f":{self.tag}" if self.tag else f"@sha256:{self.manifest}" if self.manifest else ""
        return f"{self.model or ''}{behind}"


def store_at(place: str, options: SourceOptions) -> Store:
    """The store over 's3://…', 'file://…' or 'http(s)://…', whether or not a registry is there.

    Raises: UsageError, ConfigError.
    """
    module = importlib.import_module(_MODULES[place.partition("://")[0]])
    store: Store = module.open_place(place, options)
    return store


def open_url(url: str, options: SourceOptions, *, deadline_s: float) -> Place:
    """Find the registry that a URL leads to; as `open_address`."""
    return open_address(layout.parse_address(url), options, deadline_s=deadline_s)


def open_address(address: Address, options: SourceOptions, *, deadline_s: float) -> Place:
    """Find the registry that an address leads to.

    Raises: NotFoundError if there is none; StoreError for one of another version; AccessError; UsageError.
    """
    looked: list[str] = []
    refused: MfsError | None = None
    for place, model in _candidates(address):
        store = store_at(place, options)
        try:
            if _has_marker(store, deadline_s):
                return Place(store, model, address.tag, address.manifest)
        except AccessError as e:  # a bucket's policy may cover what is above, or only what is below
            refused = refused or e
        except BaseException:
            store.close()
            raise
        store.close()
        looked.append(f"{mask_url(place)}/{layout.MARKER_KEY}")
    if refused:
        raise refused
    raise NotFoundError(f"{_url(address)}: no registry: there is no {' and no '.join(looked)}; 'mfs push' makes one")


def open_or_create(address: Address, options: SourceOptions, *, deadline_s: float) -> Place:
    """Find the registry, or make one above the model that the address names: the first push.

    Raises: as `open_address`; UsageError if the address names no model, or a store that cannot be written.
    """
    try:
        found = open_address(address, options, deadline_s=deadline_s)
    except NotFoundError:
        return create_root(address, options, deadline_s=deadline_s)
    if found.model is None:
        found.store.close()
        raise UsageError(f"{_url(address)}: is the registry itself; name a model in it: {_url(address)}/MODEL:TAG")
    return found


def create_root(address: Address, options: SourceOptions, *, deadline_s: float) -> Place:
    """Make the place above the last component the root of a registry. Two at once both find it made.

    Raises: UsageError, AccessError, StoreError.
    """
    above, _, model = address.place.rpartition("/")
    if not layout.is_name(model) or above.endswith(":/") or (address.scheme != "file" and above.endswith("/")):
        raise UsageError(
            f"{_url(address)}: expected …/REGISTRY/MODEL:TAG, with letters, digits, '.', '_' and '-' in MODEL"
        )
    store = store_at(above, options)
    try:
        if not store.can_write:
            raise UsageError(f"{_url(address)}: a registry on the web is only read; push to the store behind it")
        store.create(layout.MARKER_KEY, layout.MARKER_BODY, deadline_s=deadline_s)
        _has_marker(store, deadline_s)
    except BaseException:
        store.close()
        raise
    return Place(store, model, address.tag, address.manifest)


def _candidates(address: Address) -> list[tuple[str, str | None]]:
    """(place, model there) where the marker may be."""
    above, _, last = address.place.rpartition("/")
    found: list[tuple[str, str | None]] = []
    if not address.tag and not address.manifest:
        found.append((address.place, None))
    if layout.is_name(last) and not above.endswith(":/"):
        found.append((above, last))
    return found


def _has_marker(store: Store, deadline_s: float) -> bool:
    """Whether this is a registry's root. Raises: StoreError if it is one that we cannot read."""
    where = f"{store.identity}/{layout.MARKER_KEY}"
    try:
        size = store.size(layout.MARKER_KEY, deadline_s=deadline_s)
        if size is None:
            return False
        body = store.read(layout.MARKER_KEY, deadline_s=deadline_s) if size <= MARKER_BYTES_MAX else b""
    except NotFoundError:
        return False
    try:
        said = json.loads(body)
        if said["format"] != "mfs-registry" or type(version := said["version"]) is not int:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(f"{where}: expected the marker of a registry, got {body[:60]!r}") from None
    if version != VERSION:
        raise StoreError(f"{where}: a registry of version {version}, this mfs reads {VERSION}: upgrade it")
    return True


def _url(address: Address) -> str:
    return mask_url(f"mfs+{address.place}")

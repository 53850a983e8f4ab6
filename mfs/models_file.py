"""The TOML file of `mfs apply`: which models are to be present where, and what tags are to mean.

    [mounts."/mnt/models"]
    unpin = true                        # whatever is pinned here and not asked for below; otherwise it stays pinned

    [mounts."/mnt/models".models]       # paths inside the mount: a model, a tag of one, a single file; "." is all of it
    "llama-ft/prod" = { tier = "ssd", pinned = true, revision = "sha256:…" }
    "minilm" = { tier = "ram" }

    [registries."mfs+s3://models/registry"]
    profile = "publisher"               # and whatever else says how a source is reached
    tags = { "llama-ft:prod" = "v7", "llama:stable" = "sha256:…" }

Unknown keys are errors, as in `config_file`. Pure but for reading the file.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfs import config_file
from mfs.control.api import Tier
from mfs.errors import ConfigError
from mfs.registry import layout
from mfs.shown import mask_url
from mfs.sources.base import name_fault

_MOUNT_KEYS, _MODEL_KEYS = ("models", "unpin"), ("tier", "pinned", "revision")
_REACHING = ("endpoint_url", "profile", "region", "token")


@dataclass(frozen=True)
class WantedModel:
    """What is wanted of the files at and below a path of a mount."""

    path: str
    """From the mount's root; '' is all of it."""
    tier: Tier | None = None
    """Where all of their bytes are to be; None: that is left open."""
    pinned: bool | None = None
    """Whether they are to be pinned; None: as they are."""
    revision: str | None = None
    """The manifest of a registry, 'sha256:…', or the commit of a Hub that is to be shown there; None: whichever."""


@dataclass(frozen=True)
class WantedMount:
    """What is wanted of one mount."""

    mountpoint: str
    models: tuple[WantedModel, ...]
    unpin: bool = False
    """Whether what is pinned and not to be so by `models` is let go."""


@dataclass(frozen=True)
class WantedRegistry:
    """What is wanted of one registry."""

    url: str
    tags: Mapping[str, str]
    """'model:tag' -> 'sha256:…', or another tag of the same model."""
    reached: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `sources.SourceOptions`."""


@dataclass(frozen=True)
class Wanted:
    """What one file says."""

    mounts: tuple[WantedMount, ...]
    registries: tuple[WantedRegistry, ...]


def read(file: Path) -> Wanted:
    """What `file` says. Raises: ConfigError naming the file and the key."""
    document = config_file.read_document(file)
    config_file.check_keys(document, ("mounts", "registries"), f"{file}: ")
    mounts = [
        _mount(place, table, f"{file}: [mounts.{place!r}] ") for place, table in _tables(document, "mounts", file)
    ]
    registries = [
        _registry(url, table, f"{file}: [registries.{mask_url(url)!r}] ")
        for url, table in _tables(document, "registries", file)
    ]
    return Wanted(tuple(mounts), tuple(registries))


def _tables(document: dict[str, Any], key: str, file: Path) -> list[tuple[str, dict[str, Any]]]:
    found = document.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise ConfigError(f"{file}: {key}: expected tables named [{key}.NAME]")
    return list(found.items())


def _mount(place: str, table: dict[str, Any], where: str) -> WantedMount:
    config_file.check_keys(table, _MOUNT_KEYS, where)
    if not os.path.isabs(place):
        raise ConfigError(f"{where}is no absolute path of a mount")
    models = table.get("models", {})
    if not isinstance(models, dict):
        raise ConfigError(f"{where}models is {models!r:.80}: expected a table of paths")
    wanted = tuple(_model(path, keys, f"{where}models.{path!r} ") for path, keys in models.items())
    for one in wanted:
        for other in wanted:
            if one is not other and (not other.path or f"{one.path}/".startswith(f"{other.path}/")):
                raise ConfigError(f"{where}models: {one.path!r} lies in {other.path or '.'!r}, which is named too")
    return WantedMount(os.path.normpath(place), wanted, _flag(table, "unpin", where) or False)


def _model(path: str, table: Any, where: str) -> WantedModel:
    if not isinstance(table, dict):
        raise ConfigError(f'{where}is {table!r:.80}: expected a table such as {{ tier = "ssd", pinned = true }}')
    config_file.check_keys(table, _MODEL_KEYS, where)
    inside = "" if path == "." else path.rstrip("/")
    fault = next((fault for part in inside.split("/") if (fault := name_fault(part))), None) if path != "." else None
    if fault or posixpath.isabs(path):
        raise ConfigError(f"{where}is no path inside the mount: {fault or 'it is absolute'}")
    tier = table.get("tier")
    if tier not in (None, "ssd", "ram"):
        raise ConfigError(f'{where}tier is {tier!r:.80}: expected "ssd" or "ram"')
    revision = table.get("revision")
    if revision is not None and digest_of(revision) is None and not _is_commit(revision):
        raise ConfigError(
            f'{where}revision is {revision!r:.80}: expected "sha256:" and 64 hexadecimal digits, or the 40 of a commit'
        )
    return WantedModel(inside, tier, _flag(table, "pinned", where), revision)


def _registry(url: str, table: dict[str, Any], where: str) -> WantedRegistry:
    config_file.check_keys(table, ("tags", *_REACHING), where)
    if not url.startswith(tuple(f"{scheme}://" for scheme in layout.SCHEMES)):
        raise ConfigError(f"{where}is no registry: expected mfs+s3://… and the like")
    tags = table.get("tags", {})
    if not isinstance(tags, dict) or not all(isinstance(means, str) for means in tags.values()):
        raise ConfigError(f'{where}tags: expected a table such as {{ "llama:prod" = "v7" }}')
    for name, means in tags.items():
        if name.count(":") != 1 or not all(map(layout.is_name, name.split(":"))):
            raise ConfigError(f'{where}tags: {name!r:.80}: expected "model:tag"')
        if digest_of(means) is None and not layout.is_name(means):
            raise ConfigError(
                f'{where}tags: {name} is {means!r:.80}: expected another tag, or "sha256:…" of a manifest'
            )
    reached = {key: table[key] for key in _REACHING if key in table}
    for key, value in reached.items():
        if not isinstance(value, str):
            raise ConfigError(f"{where}{key}: expected a string")
    return WantedRegistry(url, dict(tags), reached)


def digest_of(text: object) -> str | None:
    """The manifest's id in 'sha256:…', None if this is no such text."""
    if not isinstance(text, str) or not text.startswith("sha256:") or not layout.is_id(text.removeprefix("sha256:")):
        return None
    return text.removeprefix("sha256:")


def _is_commit(text: object) -> bool:
    return isinstance(text, str) and len(text) == 40 and not text.strip("0123456789abcdef")


def _flag(table: dict[str, Any], key: str, where: str) -> bool | None:
    value = table.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}{key} is {value!r:.80}: expected true or false")
    return value

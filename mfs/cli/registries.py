"""What all commands on registries share: the options by which one is reached, and what an address means there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mfs.errors import NotFoundError, UsageError
from mfs.shown import mask_url

if TYPE_CHECKING:
    from mfs.registry.store import Store
    from mfs.sources.options import SourceOptions

REACHING: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "endpoint_url",
        "--endpoint-url",
        {"metavar": "URL", "help": "Ask this server (Ceph, MinIO, a mirror of the Hub)."},
    ),
    ("profile", "--profile", {"metavar": "NAME", "help": "Section of the AWS configuration files."}),
    ("region", "--region", {"metavar": "NAME", "help": "AWS region."}),
    ("unsigned", "--unsigned", {"is_flag": True, "help": "No signatures, for public S3 buckets."}),
    ("requester_pays", "--requester-pays", {"is_flag": True, "help": "Pay for S3 requests where the owner does not."}),
)
"""(field of SourceOptions, option, what click wants to know of it): how a source is reached, in all commands alike."""


def reaching_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that `reached` takes out of its arguments."""
    for name, option, more in reversed(REACHING):
        command = click.option(name, option, default=None, **more)(command)
    return command


def reached(arguments: Mapping[str, Any]) -> SourceOptions:
    """How a registry is reached, from a command's arguments."""
    from mfs.sources.options import SourceOptions

    return SourceOptions(**{name: arguments[name] for name, *_ in REACHING if arguments.get(name) is not None})


def is_registry(text: str) -> bool:
    """Whether this is the address of a registry, or of something in one; else it is taken for a path."""
    return text.startswith("mfs+")


def full(manifest_id: str) -> str:
    """What stands behind '@' in an address, and wherever JSON calls a revision."""
    return f"sha256:{manifest_id}"


class Revision(NamedTuple):
    """One revision that an address means."""

    store: Store
    model: str
    tag: str | None
    manifest_id: str

    @property
    def name(self) -> str:
        """'llama:prod, sha256:0123456789ab', for people."""
        tag = f":{self.tag}, " if self.tag else "@"
        return f"{self.model}{tag}sha256:{self.manifest_id[:12]}"


@contextmanager
def opened_revision(url: str, options: SourceOptions) -> Iterator[Revision]:
    """The revision that …/model:tag or …/model@sha256:… means now. Raises: UsageError, NotFoundError, MfsError."""
    from mfs.registry import opening, tags
    from mfs.registry.chunk_io import IO_S

    place = opening.open_url(url, options, deadline_s=time.monotonic() + IO_S)
    try:
        if place.model is None or not (place.tag or place.manifest):
            raise UsageError(f"{mask_url(url)}: expected …/MODEL:TAG or …/MODEL@sha256:… of one revision")
        manifest_id = place.manifest
        if manifest_id is None:
            assert place.tag is not None
            move = tags.current(place.store, place.model, place.tag, deadline_s=time.monotonic() + IO_S)
            if move is None or move.manifest is None:
                raise NotFoundError(f"{mask_url(url)}: no such tag")
            manifest_id = move.manifest
        yield Revision(place.store, place.model, place.tag, manifest_id)
    finally:
        place.store.close()

"""What a request says, field by field: checked, and made what the server works with. Nothing is done here but to read
the tables of the files that it brings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpuload.moving.model_files import without
from gpuload.moving.plan import Placement
from gpuload.moving.shards import Shard
from gpuload.server import pulled
from gpuload.server.client_files import ClientFiles
from gpuload.server.tables import TENSORS_MAX, read_table
from gpuload.server.versions import Version, look
from gpuload.server.work import Job
from mfs.errors import UsageError

NAME_LENGTH_MAX = 200
RULES_MAX = 10_000

MEMORY_WAIT_MAX_S = 600.0
"""Longest wait that may be asked for; others' loads of that device wait as well."""


async def job(
    called: str | None, request: dict[str, Any], files: ClientFiles | None, placements: Sequence[Placement]
) -> Job:
    """What a load, a swap, an open or a commit asks for; its files' tables are read.

    Raises: UsageError, and what files raise.
    """
    is_commit = request.get("op") == "commit"
    is_swap = request.get("op") == "swap"
    if is_commit and list(placements) != [Placement(placements[0].device)]:
        raise UsageError("a commit goes whole to one device: say that by 'device' alone")
    labels = request.get("files")
    count = (len(files.fds) - is_commit) if files is not None else 0
    if files is None or not isinstance(labels, list) or len(labels) != count:
        raise UsageError(f"{count} files came, expected as many names in 'files', and one at least")
    retain = request.get("retain", "lru")
    if retain not in ("lru", "lease"):
        raise UsageError(f"retain {str(retain)[:50]!r}: expected 'lru' or 'lease'")
    paths = [_printable(str(label))[:500] for label in labels]
    left_out = _left_out(request, count)
    if is_commit:
        await files.call(lambda: pulled.check(files.fds))
    shards, versions = await files.call(lambda: _shards(paths, files, left_out))
    if is_commit:
        versions = [replace(version, key=None) for version in versions]  # a name for nothing: it is filled later
    return Job(
        name=called,
        label=_printable(str(request.get("label", paths[0])))[:500],
        shards=shards,
        versions=versions,
        files=files,
        placements=placements,
        is_swap=is_swap or is_commit,
        asked_fd=files.fds[-1] if is_commit else None,
        allow_gap=flag(request, "allow_gap", False),
        is_pinned=flag(request, "pinned", False),
        retain=retain,
        wait_s=seconds(request, "wait_s"),
    )


def _shards(
    paths: Sequence[str], files: ClientFiles, left_out: dict[int, list[str]]
) -> tuple[list[Shard], list[Version]]:
    """Each file's table, less what is not to be taken from it, and what the file was before that was read.

    The descriptor is what is loaded. The name beside it may lead to a faster way to the same file (a mount's RAM),
    and is only believed where it leads to that very file: else a client could name what it may not read.
    """
    shards, versions, tensors_count = [], [], 0
    for path, fd in zip(paths, files.fds, strict=False):  # behind a commit's file comes its socket
        name = path if _is_same_file(path, fd) else f"(descriptor) {path}"
        versions.append(look(fd))
        shards.append(Shard(name, fd, read_table(fd, name, files.who, tensors_max=TENSORS_MAX - tensors_count)))
        tensors_count += len(shards[-1].header.tensors)
    return without(shards, left_out), versions


def _left_out(request: dict[str, Any], count: int) -> dict[int, list[str]]:
    """Position of a file -> names that are not to be taken from it, as `model_files.left_out` has them."""
    given = request.get("left_out") or {}
    check_object(given, "left_out")
    if not all(key.isascii() and key.isdecimal() and int(key) < count for key in given):
        raise UsageError(f"'left_out' must name files by their position, below {count}")
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in given.values()):
        raise UsageError("'left_out' must be a list of names for each file")
    return {int(key): names for key, names in given.items()}


def _is_same_file(path: str, fd: int) -> bool:
    try:
        return os.path.isabs(path) and os.path.samestat(os.stat(path), os.fstat(fd))
    except (OSError, ValueError):
        return False


def check_object(value: object, what: str) -> None:
    if not isinstance(value, dict) or len(value) > RULES_MAX:
        raise UsageError(f"{what} must be an object of at most {RULES_MAX} entries")


def name(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > NAME_LENGTH_MAX or _printable(value) != value:
        raise UsageError(f"a model's name is 1 to {NAME_LENGTH_MAX} printable characters")
    return value


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def text(request: dict[str, Any], key: str) -> str:
    value = request.get(key, "")
    if not isinstance(value, str):
        raise UsageError(f"{key!r} must be a text")
    return value[:500]


def nbytes(request: dict[str, Any], key: str, default: int | None = None) -> int:
    value = request.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise UsageError(f"{key!r} must be a number of bytes")
    return value


def seconds(request: dict[str, Any], key: str) -> float:
    value = request.get(key, 0.0)
    if type(value) not in (int, float) or not 0 <= value <= MEMORY_WAIT_MAX_S:
        raise UsageError(f"{key!r} must be a number of seconds, {MEMORY_WAIT_MAX_S:.0f} at most")
    return float(value)


def flag(request: dict[str, Any], key: str, default: bool) -> bool:
    value = request.get(key, default)
    if not isinstance(value, bool):
        raise UsageError(f"{key!r} must be true or false")
    return value

"""What server and client agree on: where each operation lives in HTTP, and how errors travel.

    GET  /v1/status /v1/config /v1/ls?path= /v1/stat?path=      one JSON value
    GET  /v1/metrics                                            text for Prometheus, by the Accept header OpenMetrics
    GET  /v1/overview?sort=&match=&count= /v1/heat?path= /v1/loads?path=    one JSON value
    POST /v1/pin /v1/unpin /v1/evict /v1/refresh /v1/shutdown   one JSON value
    POST /v1/prefetch /v1/verify /v1/watch                      a stream: one JSON value per line

A POST carries a JSON object with the operation's arguments. Errors are {"error": {"type": ..., "message": ...}} with
a fitting status, or as the last line of a stream that had begun. Blank lines in a stream mean 'still working'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mfs.control.rows import ORDERS
from mfs.errors import (
    AccessError,
    ChangedError,
    ConfigError,
    IntegrityError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
    to_wire,
)

PREFIX = "/v1/"
DEPTH_MAX = 16
"""Of what a client sends; an order is an object with a list of texts."""
STREAM_TYPE = "application/x-ndjson"
SORTS = tuple(ORDERS)
ROWS_MAX = 1000
MATCH_CHARACTERS_MAX = 256
HEARTBEAT_S = 5.0
"""A stream is never silent for longer; a client that hears nothing for several of these may give up."""


@dataclass(frozen=True)
class Operation:
    """One method of DaemonApi as HTTP."""

    method: str
    changes: bool = False
    """Only the daemon's own user and root may."""
    streams: bool = False
    takes_paths: bool = False
    takes_path: bool = False
    tiers: tuple[str, ...] = ()
    takes_wait: bool = False
    says_text: bool = False
    """It is told what is accepted, and its answer is no JSON."""
    takes_rows: bool = False
    """Of a table: which rows, in which order, how many."""


OPERATIONS = {
    "status": Operation("GET"),
    "config": Operation("GET"),
    "metrics": Operation("GET", says_text=True),
    "ls": Operation("GET", takes_path=True),
    "stat": Operation("GET", takes_path=True),
    "loads": Operation("GET", takes_path=True),
    "overview": Operation("GET", takes_rows=True),
    "heat": Operation("GET", takes_path=True),
    "prefetch": Operation("POST", changes=True, streams=True, takes_paths=True, tiers=("ssd", "ram"), takes_wait=True),
    "pin": Operation("POST", changes=True, takes_paths=True),
    "unpin": Operation("POST", changes=True, takes_paths=True),
    "evict": Operation("POST", changes=True, takes_paths=True, tiers=("ssd", "ram", "all")),
    "refresh": Operation("POST", changes=True),
    "verify": Operation("POST", changes=True, streams=True, takes_paths=True),
    "watch": Operation("POST", changes=True, streams=True),  # changes nothing, but slows readers while it runs
    "shutdown": Operation("POST", changes=True),
}

_STATUS_BY_ERROR: tuple[tuple[type[MfsError], int], ...] = (
    (UsageError, 400),
    (ConfigError, 400),
    (NotFoundError, 404),
    (AccessError, 403),
    (ChangedError, 409),
    (IntegrityError, 502),
    (TransientStoreError, 503),
    (StoreError, 502),
)


def http_status(error: MfsError) -> int:
    """The HTTP status that says roughly what the error's class says exactly."""
    return next((status for cls, status in _STATUS_BY_ERROR if isinstance(error, cls)), 500)


def error_body(error: MfsError) -> dict[str, Any]:
    """The error as it stands in a response."""
    name, message = to_wire(error)
    return {"error": {"type": name, "message": message}}


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object a client sent, nested no deeper than can be worked with. Raises: UsageError."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise UsageError(f"JSON nested deeper than {DEPTH_MAX} levels") from None
    except ValueError as error:  # not UTF-8, too
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"not a JSON object: {data[:100]!r}")
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises: UsageError if a value is nested deeper than DEPTH_MAX.

    What Python has just managed to read it may fail to print a few frames further down.
    """
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [child for inner in level for child in _children(inner) if isinstance(child, list | dict)]
        if not level:
            return
    raise UsageError(f"JSON nested deeper than {DEPTH_MAX} levels")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def parse_arguments(operation: Operation, values: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for the method of DaemonApi, from what a client sent. Raises: UsageError."""
    given = dict(values)
    arguments: dict[str, Any] = {}
    if operation.takes_path:
        arguments["path"] = _path(given.pop("path", ""))
    if operation.takes_paths:
        paths = given.pop("paths", None)
        if not isinstance(paths, list) or not paths:
            raise UsageError(f"paths is {paths!r}: expected a list of at least one path")
        arguments["paths"] = [_path(path) for path in paths]
    if operation.tiers:
        tier = given.pop("tier", operation.tiers[0])
        if tier not in operation.tiers:
            raise UsageError(f"tier is {tier!r}: expected one of {', '.join(operation.tiers)}")
        arguments["tier"] = tier
    if operation.takes_wait:
        wait = given.pop("wait", True)
        if not isinstance(wait, bool):
            raise UsageError(f"wait is {wait!r}: expected true or false")
        arguments["wait"] = wait
    if operation.takes_rows:
        arguments |= _rows(given)
    if given:
        raise UsageError(f"unknown argument {next(iter(given))!r}")
    return arguments


def _rows(given: dict[str, Any]) -> dict[str, Any]:
    """What to show of a table; taken out of `given`. Raises: UsageError."""
    sort, match, count = given.pop("sort", SORTS[0]), given.pop("match", ""), given.pop("count", "100")
    if sort not in SORTS:
        raise UsageError(f"sort is {sort!r}: expected one of {', '.join(SORTS)}")
    if not isinstance(match, str) or len(match) > MATCH_CHARACTERS_MAX:
        raise UsageError(f"match is not a text of at most {MATCH_CHARACTERS_MAX} characters")
    if not isinstance(count, str) or not count.isascii() or not count.isdecimal() or int(count[:9]) > ROWS_MAX:
        raise UsageError(f"count is {str(count)[:20]!r}: expected 0 to {ROWS_MAX}")
    return {"sort": sort, "match": match, "count": int(count)}


def _path(value: Any) -> str:
    """A path relative to the mount's root in its one spelling: no leading, trailing or double '/', no '.' or '..'."""
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"path is {value!r}: expected a path relative to the mount's root")
    parts = [part for part in value.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(f"path {value!r} contains '..': expected a path below the mount's root")
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise UsageError(f"path {value!r} is no text a file system could hold") from None
    return "/".join(parts)

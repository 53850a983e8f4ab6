"""Rows of models, as `DaemonApi.overview` gives them: the orders they may be had in. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def _largest(name: str) -> Callable[[Row], Any]:
    return lambda row: (-(row[name] or 0), row["path"])


def _recent(row: Row) -> Any:
    return -row["fetching_count"], -row["open_count"], -row["last_used_at"], -row["ram_bytes"], row["path"]


ORDERS: dict[str, Callable[[Row], Any]] = {
    "recent": _recent,
    "name": lambda row: row["path"],
    "size": _largest("size"),
    "ssd": _largest("ssd_bytes"),
    "ram": _largest("ram_bytes"),
    "origin": _largest("origin_bytes"),
}
"""Sort keys by name: what is going on first; by name; else the largest first."""

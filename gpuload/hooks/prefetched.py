"""`safe_open.prefetch` (safetensors 0.9) served by the resident server: a loader that hands each tensor out once.

The library's own loads to a card in the background. Where the server has an arena on that card there is nothing to wait
for: every tensor is a copy inside the card, or the server's memory where the program said that it only reads. What the
library would refuse it still does, in its own words: a plan that is not plainly good is left to it.

Source: safetensors 0.9.0rc1, its type stubs, and its behaviour where there is no card.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from gpuload.client.tensors import fresh
from gpuload.hooks.counts import counts
from gpuload.hooks.resident import is_copied

Plan = dict[str, slice | None]


class Prefetched:
    """In the place of safetensors' PrefetchLoader: the same methods, and errors of the same class."""

    def __init__(self, held: Mapping[str, Any], plan: Plan, device: str, error: type[Exception]) -> None:
        """held: the server's tensors, and with them its lease. plan: names in the order of the file.

        error: what safetensors raises.
        """
        self._held: Mapping[str, Any] | None = held
        self._plan = plan
        self._left = dict.fromkeys(plan)
        self._is_copied, self._error = is_copied(device), error
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return list(self._plan)

    def __len__(self) -> int:
        return len(self._plan)

    def take(self, name: str) -> Any:
        if name not in self._plan:
            raise self._error(f"the prefetch plan does not name {name}")
        made = self._taken(name)
        if made is None:
            raise self._error(f"tensor {name} was taken before: each can be taken once")
        return made

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name in self._plan:
            made = self._taken(name)
            if made is not None:
                yield name, made
                del made

    def close(self) -> None:
        """Idempotent; tensors that were taken stay."""
        with self._lock:
            self._held = None
        from gpuload.client.attached import close_left

        close_left()

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _taken(self, name: str) -> Any:
        """The tensor; None if it was taken before."""
        with self._lock:
            if self._held is None:
                raise self._error("this prefetch loader is closed")
            if name not in self._left:
                return None
            del self._left[name]
            whole = self._held[name]
        counts.add(served=1)
        rows = self._plan[name]
        part = whole if rows is None else whole[rows]
        return part.clone() if self._is_copied else fresh(part)


def plan_of(given: object, shapes: Mapping[str, list[int]]) -> Plan | None:
    """The plan, in the order of `shapes`, of all if none is given; None where the library has to say what is wrong."""
    if given is None:
        return dict.fromkeys(shapes)
    if not isinstance(given, dict) or not given or not all(_is_good(n, rows, shapes) for n, rows in given.items()):
        return None
    return {name: given[name] for name in shapes if name in given}


def _is_good(name: object, rows: object, shapes: Mapping[str, list[int]]) -> bool:
    if not isinstance(name, str) or name not in shapes:
        return False
    if rows is None:
        return True
    if not isinstance(rows, slice) or not shapes[name]:
        return False
    count = shapes[name][0]
    bounds = [bound for bound in (rows.start, rows.stop) if bound is not None]
    return rows.step in (None, 1) and all(type(bound) is int and -count <= bound <= count for bound in bounds)

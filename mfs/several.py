"""Doing something for each of many, several at once. Below every room that asks workers; knows none of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from mfs.errors import MfsError

T = TypeVar("T")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[object]], *, at_once: int) -> None:
    """Do `work` for each item, in their order, `at_once` of them at most under way.

    Raises: MfsError, the first of all: nothing is begun after it, and what is under way goes to its end.
    Cancellation: of all.
    """
    left, errors = iter(items), list[MfsError]()

    async def take_turns() -> None:
        for item in left:
            try:
                await work(item)
            except MfsError as error:
                errors.append(error)
            if errors:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(take_turns)
    if errors:
        raise errors[0]

"""How a bound is shared, so that a model or a source that hangs leaves room for all others. Pure counting.

Connections, RAM slots, handlers and orders ahead are few, and whoever waits for a dead origin holds what he has until
his deadline. So no bound is handed out first come, first served. It is divided by this rule, wherever one is shared:

    who holds n may take one more while more than n are free

One model alone gets half of a bound, which is therefore made twice what one model should have; a second gets half of
what is left, and so on: six models that hang leave something of 64. Beyond the total, whoever holds nothing may take
one, up to twice the total; and an eighth is out of reach for any single source.
"""

from __future__ import annotations

from collections import Counter

Group = tuple[int, str]
"""Who shares: (source number, model). A model is a top-level directory inside its source."""

NOBODY: Group = (-1, "")
"""For what belongs to no source."""


class Shares:
    """Counts who holds how much of one bound. Belongs to one thread."""

    def __init__(self, total: int, *, hard: int | None = None) -> None:
        """total: divided by the rule. hard: never more than this; by default twice the total."""
        self._total = total
        self._hard = 2 * total if hard is None else hard
        self._held: Counter[Group] = Counter()
        self._by_source: Counter[int] = Counter()
        self.count = 0
        """Held by all together."""

    def held(self, group: Group) -> int:
        return self._held[group]

    def may_take(self, group: Group, *, leaving: int = 0) -> bool:
        """Whether the group may have one more.

        leaving: kept free beyond the rule, for what is less urgent than other work of the same group.
        """
        held = self._held[group]
        in_rule = held < self._total - self.count - leaving or (not held and self.count < self._hard)
        return in_rule and self._by_source[group[0]] < 7 * (self._hard - self.count)

    def take(self, group: Group) -> None:
        """Hold one more."""
        self._held[group] += 1
        self._by_source[group[0]] += 1
        self.count += 1

    def give(self, group: Group) -> None:
        """Give one back."""
        self.count -= 1
        self._by_source[group[0]] -= 1
        self._held[group] -= 1
        if not self._held[group]:
            del self._held[group]


def group_of_file(source: int, path: str) -> Group:
    """The group of a file by its path inside the source; files beside the models are one group."""
    return source, path.partition("/")[0] if "/" in path else ""


def group_of_directory(source: int, path: str) -> Group:
    """The group that a directory inside the source belongs to; the root is none of the models."""
    return source, path.partition("/")[0]

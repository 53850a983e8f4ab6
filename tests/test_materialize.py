"""Which files a --materialize pattern names, and what is kept over a handover while an origin hangs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from mfs.cache.chunk_state import ObjectState
from mfs.materialize import Keeper, KeeperConfig, matches
from mfs.types import ObjectId


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("**", "a/b/c"),
        ("*", "a"),
        ("*", "a/b"),
        ("llama", "llama/1/w.safetensors"),
        ("llama", "prod/llama/w"),
        ("llama*", "prod/llama-3-8b/w"),
        ("*.safetensors", "prod/llama/1/w.safetensors"),
        ("prod/llama", "prod/llama/1/w"),
        ("/llama", "llama/1/w"),
        ("prod/*/1", "prod/llama/1/w"),
        ("prod/**/w", "prod/llama/1/w"),
        ("prod/**/w", "prod/w"),
        ("**/1/*.bin", "llama/1/w.bin"),
        ("m[ab]/w", "ma/w"),
        ("a?/w", "ab/w"),
        ("prod/**", "prod/a"),
    ],
)
def test_names(pattern: str, path: str) -> None:
    assert matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("llama", "llama-2/w"),
        ("/llama", "prod/llama/w"),
        ("llama/1", "prod/llama/1/w"),
        ("prod/*/w", "prod/llama/1/w"),
        ("*.bin", "w.bin.txt"),
        ("prod/llama/1/w/x", "prod/llama/1/w"),
        ("Llama", "llama/w"),
        ("prod/**", "prod"),
    ],
)
def test_does_not_name(pattern: str, path: str) -> None:
    assert not matches(pattern, path)


class HangingTier:
    """An SSD tier from which one object was lost, whose origin hangs."""

    def __init__(self) -> None:
        self.marked: dict[str, list[float]] = {}
        self.looked_at: list[str] = []

    async def call(self, op: str, **arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if op == "keep":
            for fields in arguments["objects"]:
                self.marked.setdefault(fields[1], []).append(trio.current_time())
            return {}
        assert op == "lacking"
        self.looked_at.append(arguments["obj"][1])
        return {"chunks": [0] if arguments["obj"][1] == "hangs" else []}

    async def bring(self, state: ObjectState, index: int, *, to_ssd: bool) -> bool:
        await trio.sleep_forever()
        return True

    async def seal(self, state: ObjectState) -> bool:
        return False


async def test_what_hangs_after_a_handover_costs_nothing_else_its_mark(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A mark lasts two minutes; what the next daemon brings again may take longer, or for ever."""
    tier: Any = HangingTier()
    keeper = Keeper(KeeperConfig(("*",), ("",), 1000.0, 1 << 40, 0), tier, tier, tier)
    for name in ("hangs", "whole"):
        keeper.inherit(ObjectState(ObjectId("s", name, 100, "v"), 0))
    with trio.move_on_after(500):
        await keeper.run()
    assert sorted(tier.looked_at) == ["hangs", "whole"]
    for name in ("hangs", "whole"):
        times = [0.0, *tier.marked[name], 500.0]
        assert max(later - earlier for earlier, later in pairwise(times)) < 60

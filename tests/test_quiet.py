"""A mount of which nobody wants anything sleeps: what looks now and then does so while there is something to see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
import trio
import trio.testing

from mfs.cache.sealing import open_sealed
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.fuse.backing import Passthrough
from mfs.prefetch.engine import PrefetchConfig, Prefetcher
from mfs.types import CHUNK_BYTES, ByteRange
from mfs.whole import WholeFiles
from tests.workers.rig import running_rig, until

_SOON_S = 4.0


@pytest.fixture
def null() -> Iterator[BinaryIO]:
    with open(os.devnull, "rb") as device:
        yield device


async def test_nothing_is_looked_at_when_all_is_done(
    tmp_path: Path, null: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfs.fuse.backing._LINGER_S", 1.0)
    async with running_rig(tmp_path) as rig, trio.open_nursery() as nursery:
        prefetcher = Prefetcher(PrefetchConfig(4, ssd=True), rig.cache, rig.pool, lambda state: [])
        whole = WholeFiles(rig.cache, rig.pool, partial(open_sealed, SsdTier(SsdConfig(rig.cache_dir))))
        passthrough = Passthrough()
        passthrough.connect(null.fileno(), cast(Any, SimpleNamespace(has_passthrough=False)))
        await nursery.start(prefetcher.run)
        nursery.start_soon(whole.run)
        nursery.start_soon(passthrough.run)
        obj = rig.put_ramp("w.bin", CHUNK_BYTES)
        state = rig.cache.open(obj, 0)
        prefetcher.opened(state)
        await rig.cache.read(state, ByteRange(0, CHUNK_BYTES))
        prefetcher.closed(state)
        rig.cache.close(state)
        passthrough.linger(0x100, 1)
        await until(lambda: whole.sealed_count == 1, "the object is sealed")
        with trio.fail_after(30):
            while await _next_deadline_s() < _SOON_S:
                await trio.sleep(0.1)
        assert not passthrough.resume(0x100)
        nursery.cancel_scope.cancel()


async def _next_deadline_s() -> float:
    await trio.testing.wait_all_tasks_blocked()  # who is about to go on has no deadline
    return trio.lowlevel.current_statistics().seconds_to_next_deadline

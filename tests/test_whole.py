"""Whole files by themselves; what readers see of them is in `tests/mount/test_whole.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mfs.cache.sealing import open_sealed
from mfs.types import ObjectId
from mfs.whole import WholeFiles
from tests.workers.rig import running_rig


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_file_found_damaged_while_it_is_opened_is_given_to_nobody(tmp_path: Path, is_lost: bool) -> None:
    async with running_rig(tmp_path) as rig:

        def opened(obj: ObjectId) -> int | None:
            found = open_sealed(rig.ssd, obj)
            if is_lost:
                trio.from_thread.run_sync(whole_files.lost_object, obj.cache_id)
            return found

        whole_files = WholeFiles(rig.cache, rig.pool, opened)
        obj = rig.put_ramp("w.bin", (5 << 20) + 17)
        state = rig.cache.open(obj, 0)
        for index in range(obj.chunks_count):
            await rig.cache.bring(state, index, to_ssd=True)
        assert await whole_files.seal(state)
        file = await whole_files.open(state)
        if is_lost:
            assert file is None
        else:
            assert file is not None
            with file:
                assert file.readall() == rig.contents[obj]
        rig.cache.close(state)

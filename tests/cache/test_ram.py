"""Slots: bounded budgets, memory that cannot be shrunk under us, and a refusal of page locking that says what to do."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mfs.cache.ram import SLOTS_COUNT_MIN, RamConfig, SlotMemory, memory_available_bytes
from mfs.errors import ConfigError
from mfs.types import CHUNK_BYTES


async def test_slots_come_as_they_are_touched_and_hold_what_is_written() -> None:
    memory = SlotMemory(RamConfig(20 * CHUNK_BYTES + 1, page_lock=False))
    assert memory.slots_count == 20
    assert not memory.free
    await memory.populate(SLOTS_COUNT_MIN)
    assert sorted(memory.free) == list(range(SLOTS_COUNT_MIN))
    await memory.populate()
    assert sorted(memory.free) == list(range(20))
    assert memory.locked_bytes == 0
    for slot in range(20):
        memory.view(slot)[:] = bytes([slot]) * CHUNK_BYTES
    with mmap.mmap(memory.fd, memory.size_bytes) as peer:
        for slot in range(20):
            assert peer[slot * CHUNK_BYTES] == peer[(slot + 1) * CHUNK_BYTES - 1] == slot
    assert len(memory.view(3, 10)) == 10
    memory.close()


@pytest.mark.parametrize("budget_bytes", [0, CHUNK_BYTES, SLOTS_COUNT_MIN * CHUNK_BYTES - 1])
def test_a_budget_too_small_is_refused(budget_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"expected at least {SLOTS_COUNT_MIN * CHUNK_BYTES} bytes.*--ram-size"):
        SlotMemory(RamConfig(budget_bytes))


@pytest.mark.parametrize("budget_bytes", [memory_available_bytes() + (64 << 30), 1 << 62], ids=["machine", "any"])
def test_a_budget_beyond_the_machine_is_refused(budget_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"does not fit.*--ram-size"):
        SlotMemory(RamConfig(budget_bytes))


_LOCKER = """
import os, resource, trio
from mfs.cache.ram import *
from mfs.types import CHUNK_BYTES
limit = {limit}
if limit is not None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
memory = SlotMemory(RamConfig(17 * CHUNK_BYTES))
trio.run(memory.populate)
print(len(memory.free), memory.locked_bytes, memory.note, sep="|")
memory.view(16)[:] = b"x" * CHUNK_BYTES
"""


def lock_in_a_child(limit: int | None) -> tuple[int, int, str]:
    if os.getuid():
        pytest.skip("only root can take its own rights away here")
    if limit is not None and limit > resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]:
        pytest.skip("the limit here is lower already")
    done = subprocess.run(
        [sys.executable, "-c", _LOCKER.format(limit=limit)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    count, locked, note = done.stdout.strip().split("|")
    return int(count), int(locked), note


def test_locked_pages_are_locked() -> None:
    assert lock_in_a_child(None) == (17, 17 * CHUNK_BYTES, "")


@pytest.mark.parametrize("limit", [0, 65536, CHUNK_BYTES])
def test_a_refused_lock_says_what_to_do_and_serves_on(limit: int) -> None:
    count, locked, note = lock_in_a_child(limit)
    assert count == 17
    assert locked <= limit
    for words in (f"RLIMIT_MEMLOCK is {limit} bytes", "ulimit -l", "LimitMEMLOCK", "CAP_IPC_LOCK"):
        assert words in note


_SHRINKER = """
import os
from mfs.cache.ram import *
os.setgroups([]); os.setgid(65534); os.setuid(65534)
memory = SlotMemory(RamConfig(SLOTS_COUNT_MIN * 4194304, page_lock=False))
assert not memory.huge_pages
for size in (0, 4194304, 2 * memory.size_bytes):
    try:
        os.ftruncate(memory.fd, size)
    except PermissionError:
        continue
    raise SystemExit(f"truncated to {size}")
"""


def test_a_memfd_of_slots_cannot_be_shrunk_under_us() -> None:
    """Huge pages come from a tmpfs, where files have no seals: its descriptor must not be handed out writable."""
    if os.getuid():
        pytest.skip("only root can take its own rights away here")
    done = subprocess.run(
        [sys.executable, "-c", _SHRINKER], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert not done.returncode, done.stderr

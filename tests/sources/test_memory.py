"""The suite holds for the source in memory, so that tests may lean on it."""

from __future__ import annotations

import threading
import time

import pytest

from mfs.errors import IntegrityError, TransientStoreError
from mfs.testing import Fault, FaultySource, MemorySource, ramp
from mfs.testing.suite import SourceSuite, read


class MemoryOrigin:
    def __init__(self) -> None:
        self._source = MemorySource()
        self.put, self.delete = self._source.put, self._source.delete

    def source(self) -> MemorySource:
        return _Unclosed(self._source)


class _Unclosed(MemorySource):
    """Another view of the same files, closed on its own."""

    def __init__(self, owner: MemorySource) -> None:
        super().__init__(identity=owner.identity)
        self._files = owner._files


class TestMemory(SourceSuite):
    @pytest.fixture
    def origin(self) -> MemoryOrigin:
        return MemoryOrigin()


def test_ramp_is_i_mod_251() -> None:
    assert ramp(600) == bytes(i % 251 for i in range(600))
    assert ramp(300, 1000) == bytes(i % 251 for i in range(1000, 1300))
    assert ramp(0, 5) == b""


def test_a_faulty_source_fails_as_often_as_told_and_remembers_what_was_read() -> None:
    memory = MemorySource({"a": ramp(100), "b": ramp(100)})
    source = FaultySource(memory)
    source.faults = [
        Fault(matches=lambda obj, span: obj.path == "b", flips_byte=True),
        Fault(count=2, matches=lambda obj, span: obj.path == "a", error=IntegrityError("as told")),
    ]
    a, b = memory.object_id("a"), memory.object_id("b")
    for _ in range(2):
        with pytest.raises(IntegrityError, match="as told"):
            read(source, a)
    assert read(source, a) == ramp(100)
    corrupt = read(source, b)
    assert [i for i in range(100) if corrupt[i] != ramp(100)[i]] == [50]
    assert read(source, b) == ramp(100)
    assert [path for path, _ in source.reads] == ["a", "a", "a", "b", "b"]


def test_a_gate_holds_an_answer_until_it_opens_or_the_deadline_passes() -> None:
    memory = MemorySource({"a": b"12"})
    source = FaultySource(memory)
    gate = threading.Event()
    source.faults = [Fault(count=-1, gate=gate)]
    with pytest.raises(TransientStoreError, match="stalled"):
        read(source, memory.object_id("a"), deadline_s=time.monotonic() + 0.01)
    gate.set()
    assert read(source, memory.object_id("a")) == b"12"

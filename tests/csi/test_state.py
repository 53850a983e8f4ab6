"""What the driver knows: kept where the disk fails, read by other releases, bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.csi import state as module
from mfs.csi.node import Node
from mfs.csi.state import Published, Served, State
from mfs.errors import StoreError

VOLUME = Published("a", "/pods/a", "k" * 32, "told")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state")
    yield state
    state.close()


def test_what_cannot_be_read_is_not_said_to_be_gone(state: State) -> None:
    state.put(VOLUME)
    state.put_served("key", Served("{}", False, ""))
    [record] = (state.directory / "volumes").iterdir()
    for file in (record, state.directory / "daemons" / "key.json"):
        file.unlink()
        file.mkdir()  # for root, a file that fails
    for asked in (lambda: state.volume("a", "/pods/a"), lambda: list(state.volumes()), lambda: state.served("key")):
        with pytest.raises(StoreError, match="Is a directory"):
            asked()
    assert record.exists()


def test_what_has_no_meaning_is_nothing(state: State) -> None:
    state.put(VOLUME)
    [record] = (state.directory / "volumes").iterdir()
    for text in ("", "[]", "{}", "{"):
        record.write_text(text)
        assert state.volume("a", "/pods/a") is None
        assert list(state.volumes()) == []
        assert not record.exists()


def test_other_releases_read_it(state: State) -> None:
    state.put(VOLUME)
    [record] = (state.directory / "volumes").iterdir()
    noted = json.loads(record.read_text())
    record.write_text(json.dumps({**noted, "later": 1}))
    assert list(state.volumes()) == [VOLUME]
    del noted["secrets"]  # as before it was there
    record.write_text(json.dumps(noted))
    assert state.volume("a", "/pods/a") == VOLUME


def test_a_long_log_is_cut_to_its_end(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOG_BYTES_MAX", 1000)
    monkeypatch.setattr(module, "_LOG_KEPT_BYTES", 95)
    file = state.log_file("key")
    with file.open("ab", buffering=0) as daemon:
        for number in range(100):
            daemon.write(b"line %04d\n" % number)
        state.cut_logs()
        assert len(file.read_bytes()) == 1000
        daemon.write(b"line 0100\n")
        state.cut_logs()
        daemon.write(b"line 0101\n")
    assert file.read_text().split("\n") == [f"line {number:04d}" for number in range(92, 102)] + [""]


def test_a_setting_that_means_nothing_keeps_no_other_volumes_cache(state: State) -> None:
    """Of another release, say: that volume is refused when it is next asked for, and housekeeping goes on."""
    node = Node.__new__(Node)
    node._state = state
    state.put_served("a", Served(json.dumps({"cache_dir": "/cache/one", "sources": [], "unheard_of": 1}), False, ""))
    assert node._is_used(Path("/cache/one"))
    assert not node._is_used(Path("/cache/two"))
    state.put_served("b", Served("not even JSON", False, ""))
    assert node._is_used(Path("/cache/two")), "which may be the one that it has"

"""A mounted folder against a dict of bytes, under generated sequences of everything that can happen to it."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, precondition, rule

from mfs import holder
from mfs.cache.chunks import full_mask
from mfs.cache.ssd import SsdConfig, SsdTier, Standing
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import touching
from tests.mount.origins import FolderOrigin

SIZES = (0, 1, 131_072, 131_073, 1_000_003, 4 << 20, (4 << 20) + 1, (9 << 20) + 5)
NAMES = ("a.bin", "m/b.safetensors", "m/c.bin", "m/n/d")


def is_complete(found: Standing) -> bool:
    return all(mask == full_mask(found.header.chunk_bytes(index)) for index, mask in enumerate(found.masks))


class MountMachine(RuleBasedStateMachine):
    """`origin` is what the folder holds, `published` what the tree shows since the last refresh. A file that changed
    after it was published may be read as it was (cached) or not at all (ESTALE), or as it is now if the mount has
    looked again by itself (what it fetches ahead may meet the change before a reader does), but never otherwise."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self._base = tempfile.TemporaryDirectory(prefix="mfs-model-")
        base = Path(self._base.name)
        self.folder = FolderOrigin(base / "registry")
        self.mount = TestMount(base, str(self.folder.root), workers_count=1, timeout_s=20.0)
        self.origin: dict[str, bytes] = {}
        self.published: dict[str, bytes] = {}
        self.open: dict[str, bytes] = {}
        """Handle -> the bytes of the version it was opened on."""
        self.serial = 0
        self.crashes = 0

    @initialize()
    def begin(self) -> None:
        for name in NAMES:
            self._put(name, SIZES[-1])
        self._start()

    def _start(self) -> None:
        self.mount.start()
        self.published = dict(self.origin)
        self.list_all()  # a folder is looked at when somebody looks into it

    def _put(self, name: str, size: int) -> None:
        self.serial += 1
        self.origin[name] = ramp(size, self.serial * 37)
        self.folder.put(name, self.origin[name])

    def _path(self, name: str) -> str:
        return str(self.mount.path / name)

    def _is_current(self, name: str) -> bool:
        return self.published.get(name) is self.origin.get(name)

    # -- readers

    @rule(name=st.sampled_from(NAMES), offset=st.integers(0, 10 << 20), length=st.integers(1, 3 << 20))
    def read(self, name: str, offset: int, length: int) -> None:
        got = self.mount.call(touching.read_outcome, self._path(name), offset, length)
        self._judge(name, got, lambda content: content[offset : offset + length])

    @rule(name=st.sampled_from(NAMES))
    def map_whole(self, name: str) -> None:
        if self._is_current(name) and self.published.get(name):
            assert self.mount.call(touching.map_file, self._path(name), "shared") == self.published[name]

    def _judge(self, name: str, got: bytes | str, cut: Any) -> None:
        if name not in self.published:
            assert got == "ENOENT"
        elif got == "ESTALE" and not self._is_current(name):
            self.refresh()  # the mount looks again by itself now, some time soon: make it sure
        elif not self._is_current(name) and got == (cut(self.origin[name]) if name in self.origin else "ENOENT"):
            self.refresh()
        else:
            assert got == cut(self.published[name])

    @rule(target=handles, name=st.sampled_from(NAMES))
    def hold(self, name: str) -> Any:
        if name not in self.published or len(self.open) > 4:
            return multiple()
        if not self._is_current(name):
            self.refresh()  # else nobody knows which version is opened
            if name not in self.published:
                return multiple()
        self.serial += 1
        handle = f"h{self.serial}"
        self.mount.call(touching.hold, handle, self._path(name))
        self.open[handle] = self.published[name]
        return handle

    @rule(handle=handles, offset=st.integers(0, 10 << 20))
    def read_held(self, handle: str, offset: int) -> None:
        if handle not in self.open:
            return
        got = self.mount.call(touching.held_outcome, handle, offset, 100_000)
        content = self.open[handle]
        if got == "ESTALE":
            assert not any(content is now for now in self.origin.values())
            self.refresh()
        else:
            assert got == content[offset : offset + 100_000]

    @rule(handle=handles)
    def let_go(self, handle: str) -> None:
        if self.open.pop(handle, None) is not None:
            self.mount.call(touching.release, handle)

    @rule()
    def list_all(self) -> None:
        shown, before = self._shown(), self.published
        if shown != {n: len(c) for n, c in self.published.items()}:
            self.refresh()
            assert set(shown.items()) <= {(n, len(c)) for n, c in [*before.items(), *self.origin.items()]}

    # -- the origin

    @rule(name=st.sampled_from(NAMES), size=st.sampled_from(SIZES))
    def replace(self, name: str, size: int) -> None:
        self._put(name, size)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if self.origin.pop(name, None) is not None:
            (self.folder.root / name).unlink()

    @rule()
    def refresh(self) -> None:
        assert self.mount.client.refresh()["errors"] == []
        self.published = dict(self.origin)
        # The kernel is told from a thread: until it has been, it may believe an old name.
        expected = {n: len(c) for n, c in self.published.items()}
        assert self.mount.wait_for(lambda: self._shown() == expected)

    def _shown(self) -> dict[str, int]:
        return self.mount.call(touching.tree, str(self.mount.path))

    # -- the cache and the processes

    @rule(tier=st.sampled_from(["ram", "ssd", "all"]), name=st.sampled_from(["", "m", *NAMES]))
    def evict(self, tier: Any, name: str) -> None:
        if not name or any(n == name or n.startswith(f"{name}/") for n in self.published):
            self.mount.client.evict([name], tier)

    @rule()
    def forget_pages(self) -> None:
        for name in self.published:
            self.mount.call(touching.drop_pages_if_there, self._path(name))

    @rule(name=st.sampled_from(["", "m", *NAMES]), tier=st.sampled_from(["ram", "ssd"]))
    def bring(self, name: str, tier: Any) -> None:
        """To SSD, where it is sealed then, or to RAM: from both the kernel may read it by itself."""
        if not name or any(n == name or n.startswith(f"{name}/") for n in self.published):
            list(self.mount.client.prefetch([name], tier, wait=True))

    @precondition(lambda self: not self.open)
    @rule(seed=st.integers(0, 1000))
    def corrupt(self, seed: int) -> None:
        """Damage that a reader finds, or sealing; where the file is sealed, or written to afterwards, `mfs verify`."""
        chance, is_hidden = random.Random(seed), False
        tier = SsdTier(SsdConfig(self.mount.folder / "cache"))
        for file in sorted((self.mount.folder / "cache/v2/objects").rglob("*")):
            if file.is_file() and chance.random() < 0.5:
                found = tier.standing(file.stem)
                is_hidden = is_hidden or found is None or found.header.sealed is not None or not is_complete(found)
                size = file.stat().st_size
                if chance.random() < 0.3:
                    os.truncate(file, chance.randrange(size))
                else:
                    with file.open("r+b") as opened:
                        opened.seek(chance.randrange(size))
                        opened.write(b"\xa5\x5a")
        if is_hidden:
            list(self.mount.client.verify([""]))

    @rule()
    def verify(self) -> None:
        list(self.mount.client.verify([""]))
        assert list(self.mount.client.verify([""]))[-1]["bad"] == []

    @rule()
    def kill_worker(self) -> None:
        before = set(self.mount.worker_pids)
        for pid in before:
            os.kill(pid, 9)
        assert self.mount.wait_for(lambda: bool(self.mount.worker_pids) and not before & set(self.mount.worker_pids))

    @precondition(lambda self: self.crashes < holder.CRASHES_MAX)
    @rule()
    def crash(self) -> None:
        """Whoever has something open waits for the next daemon."""
        self.crashes += 1
        killed = self.mount.crash()
        self.list_all()
        self.mount.wait_successor(killed)
        self.refresh()  # the successor looks again by itself now, some time soon: make it sure

    @rule()
    def hand_over(self) -> None:
        self.mount.hand_over()

    @precondition(lambda self: not self.open)
    @rule(kill=st.booleans())
    def mount_again(self, kill: bool) -> None:
        if kill:
            self.mount.kill()
            self.mount.close_outsiders()
        else:
            self.mount.stop()
        self._start()

    def teardown(self) -> None:
        try:
            if self.mount.is_running:
                self.mount.stop()
        finally:
            self.mount.clean_up()
            self._base.cleanup()


TestMountMachine = MountMachine.TestCase
TestMountMachine.settings = settings(
    max_examples=5, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)

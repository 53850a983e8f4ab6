"""What `mfs top` and the page ask of a real mount: what is where of which model, what is brought, and who waits."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from mfs.config import SourceConfig
from mfs.control.api import Json
from mfs.control.rows import ORDERS
from mfs.overview import Overview
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.tree.models import ModelSize
from mfs.types import BLOCK_BYTES, CHUNK_BYTES
from mfs.workers.shares import Group
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.liar import LiarServer, Lie

MIB = 1 << 20
FILES = {
    "alpha/one.bin": ramp(9 * MIB + 1), "alpha/deep/two.bin": ramp(2 * MIB, 31), "beta/three.bin": ramp(5 * MIB, 7),
    "notes.txt": b"about the models",
}  # fmt: skip


def models(mount: TestMount, **options: object) -> dict[str, Json]:
    return {row["path"]: row for row in mount.client.overview(**options)["models"]["rows"]}  # type: ignore[arg-type]


class TestModels:
    def test_sizes_and_tiers_are_added_up(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        mount.call(touching.tree, str(mount.path))
        rows = models(mount)
        assert {path: (row["is_model"], row["size"], row["files_count"]) for path, row in rows.items()} == {
            "alpha": (True, 11 * MIB + 1, 2), "beta": (True, 5 * MIB, 1), "": (False, 16, 1),
        }  # fmt: skip
        list(mount.client.prefetch(["alpha"], "ssd", wait=True))
        list(mount.client.prefetch(["beta"], "ram", wait=True))
        mount.client.pin(["alpha/one.bin"])
        assert mount.wait_for(lambda: models(mount)["alpha"]["ssd_bytes"] == 11 * MIB + 1)
        rows = models(mount)
        assert (rows["alpha"]["pinned_count"], rows["alpha"]["origin_bytes"]) == (1, 11 * MIB + 1)
        assert rows["alpha"]["last_used_at"] > 0
        assert rows["beta"]["ram_bytes"] == 5 * MIB
        assert list(models(mount, sort="size")) == ["alpha", "beta", ""]
        assert list(models(mount, sort="name")) == ["", "alpha", "beta"]
        assert list(models(mount, match="BET")) == ["beta"]

    def test_what_is_read_comes_first(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        mount.call(touching.hold, "h", str(mount.path / "beta/three.bin"))
        rows = models(mount)
        assert next(iter(rows)) == "beta"
        assert rows["beta"]["open_count"] == 1
        mount.call(touching.release, "h")
        assert mount.wait_for(lambda: models(mount)["beta"]["open_count"] == 0)

    def test_several_sources_and_no_ssd_tier(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all({"m/a.bin": b"1", "n/b.bin": b"22"})
        sources = [SourceConfig(folder.url, name="x"), SourceConfig(folder.url, name="y")]
        mount = mounted("", sources=sources, cache_dir=None)
        mount.call(touching.tree, str(mount.path))
        assert list(models(mount, sort="name")) == ["x/m", "x/n", "y/m", "y/n"]
        assert models(mount)["y/n"]["size"] == 2

    def test_a_model_that_is_new_or_gone(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all({"m/a.bin": b"1", "n/b.bin": b"22"})
        mount = mounted(folder)
        assert set(models(mount)) == {"m", "n"}
        folder.put_all({"n/b.bin": b"22", "o/c.bin": b"333"})
        folder.remove_empty_folders()
        mount.client.refresh()
        assert mount.wait_for(lambda: set(models(mount)) == {"n", "o"})


@pytest.mark.parametrize("sort", ORDERS)
async def test_what_goes_on_is_sorted_into_an_order_that_stands(sort: str) -> None:
    models = [ModelSize(0, f"m{number * 7 % 40:02}", number % 5, 1) for number in range(40)]
    columns = dict[str, Counter[Group]](ram=Counter(), open=Counter(), origin=Counter())

    async def look() -> list[ModelSize]:
        await trio.lowlevel.checkpoint()
        return models

    async def ram_bytes_by_group() -> Counter[Group]:
        await trio.lowlevel.checkpoint()
        return columns["ram"]

    mount: Any = SimpleNamespace(
        config=SimpleNamespace(sources=[SimpleNamespace(name="")], cache_dir=None), namespace=None,
        pool=SimpleNamespace(identities=(), under_way=list), arrived=columns["origin"],
        prefetcher=SimpleNamespace(handles_by_group=lambda: columns["open"]),
        cache=SimpleNamespace(ram_bytes_by_group=ram_bytes_by_group, waits=SimpleNamespace(listeners=[])),
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        seen = Overview(mount, nursery)
        seen._sizes = SimpleNamespace(look=look)  # type: ignore[assignment]
        for number in range(6):
            for column, step in zip(columns.values(), (3, 5, 11), strict=True):
                column.clear()
                column.update({(0, f"m{number * step % 40:02}"): 1 + number % 2, (0, "m39"): 1, (0, "gone"): 1})
            whole = await seen.models(sort=sort, match="", count=100)
            assert whole["rows"] == sorted(whole["rows"], key=ORDERS[sort])
            assert sum(row["ram_bytes"] for row in whole["rows"]) == columns["ram"].total() - 1
            some = await seen.models(sort=sort, match="M1", count=3)
            matching = [row for row in whole["rows"] if row["path"].startswith("m1")]
            assert some == {"count": 40, "matched_count": 10, "rows": matching[:3]}
            if number == 3:
                seen._renew_after_s = 0
        nursery.cancel_scope.cancel()


class TestHeat:
    def test_the_parts_that_were_read_are_where_they_stand_in_the_file(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put_all({"m/big.bin": ramp(12 * MIB)})
        mount = mounted(folder)
        mount.call(touching.pread, str(mount.path / "m/big.bin"), 100, 2 * CHUNK_BYTES)
        [file] = mount.client.heat("m")["files"]
        assert (file["path"], file["size"], len(file["ram"])) == ("m/big.bin", 12 * MIB, 12 * MIB // BLOCK_BYTES)
        assert file["ram"].index("9") == 2 * CHUNK_BYTES // BLOCK_BYTES
        assert file["ram"][: 2 * CHUNK_BYTES // BLOCK_BYTES].strip("0") == ""
        assert mount.wait_for(lambda: mount.client.heat("m")["files"][0]["ssd"] == file["ram"])
        list(mount.client.prefetch(["m"], "ssd", wait=True))
        [file] = mount.client.heat("m/big.bin")["files"]
        assert set(file["ssd"]) == {"9"}


class TestWhatGoesOn:
    def test_a_fetch_is_named_while_it_lasts_and_its_wait_once_it_has_ended(
        self, liar: LiarServer, mounted: Mounted
    ) -> None:
        (liar.files / "m").mkdir()
        (liar.files / "m/held.bin").write_bytes(ramp(9 * MIB))
        mount = mounted(liar.url)
        mount.client.overview()  # from now on somebody looks
        liar.lie(Lie.SILENCE, pattern="/m/held.bin")
        reader = mount.outside()
        reader.start(touching.pread, str(mount.path / "m/held.bin"), 100, 5 * MIB)

        def waited_for() -> list[Json]:
            return [row for row in mount.client.overview()["fetches"]["rows"] if not row["ahead"]]

        assert mount.wait_for(lambda: bool(waited_for()))
        row = waited_for()[0]
        assert (row["path"], row["from"]) == ("m/held.bin", "origin")
        assert row["start"] <= 5 * MIB < row["stop"] <= 8 * MIB
        seen = mount.client.overview()
        assert seen["models"]["rows"][0]["fetching_count"] >= 1
        liar.tell_truth()
        assert reader.finish() == ramp(9 * MIB)[5 * MIB :][:100]
        seen = mount.client.overview()
        assert seen["waits"]["origin"]["count"] >= 1
        assert seen["models"]["rows"][0]["waited_s"] > 0
        assert mount.wait_for(lambda: mount.client.overview()["fetches"] == {"count": 0, "queued_count": 0, "rows": []})

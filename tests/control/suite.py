"""What every implementation of DaemonApi must do, asked through the real client and server.

A test module subclasses ControlSuite and gives two fixtures: `client`, of a daemon nobody else uses, and `expected`.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from mfs.control.client import Client
from mfs.errors import NotFoundError, UsageError


@dataclass(frozen=True)
class Expected:
    """What the daemon under test serves. Budgets must hold all of it in either tier."""

    files: dict[str, int]
    """Path -> size in bytes, all files; at least two in `directory`, none empty."""
    directory: str
    """A directory at the top with files directly in it."""
    source_urls: tuple[str, ...]


STATUS_SHAPE = {
    "version": str, "pid": int, "mountpoint": str, "started_at": float, "uptime_s": float, "sources": list,
    "ssd": dict, "ram": dict, "origin": dict, "reads": dict, "open_files": int, "passthrough": dict,
    "prefetch": dict, "workers": list, "kernel": dict, "warnings": list,
}  # fmt: skip
STATUS_NUMBERS = {
    "ssd": {"used_bytes", "budget_bytes", "free_disk_bytes", "objects_count", "hits_bytes"},
    "ram": {"used_bytes", "budget_bytes", "slots_count", "slots_free", "slots_leased", "hits_bytes"},
    "origin": {"fetched_bytes", "shared_bytes", "requests_count", "errors_count", "inflight"},
    "reads": {"count", "bytes", "errors_count", "waiting"},
    "prefetch": {"queued_bytes", "active_objects"},
}


class ControlSuite:
    """Subclass me; see the module's docstring."""

    def test_status_has_its_shape(self, client: Client, expected: Expected) -> None:
        status = client.status()
        for key, kind in STATUS_SHAPE.items():
            assert isinstance(status[key], kind), key
        for key, numbers in STATUS_NUMBERS.items():
            assert {name for name in numbers if isinstance(status[key].get(name), int)} == numbers
        assert [source["url"] for source in status["sources"]] == list(expected.source_urls)
        assert status["warnings"] == []

    def test_ls_of_the_root_lists_top_names_once(self, client: Client, expected: Expected) -> None:
        rows = client.ls("")
        tops = {path.partition("/")[0] for path in expected.files}
        assert sorted(row["name"] for row in rows) == sorted(tops)
        assert {row["name"] for row in rows if row["kind"] == "directory"} >= {expected.directory}

    def test_ls_of_a_directory_gives_sizes(self, client: Client, expected: Expected) -> None:
        prefix = expected.directory + "/"
        here = {path.removeprefix(prefix): size for path, size in expected.files.items() if path.startswith(prefix)}
        rows = {row["name"]: row for row in client.ls(expected.directory)}
        for name, size in here.items():
            if "/" not in name:
                assert (rows[name]["kind"], rows[name]["size"]) == ("file", size)
                assert set(rows[name]) >= {"mtime", "ssd_bytes", "ram_bytes", "pinned"}

    def test_ls_of_a_file_gives_that_file(self, client: Client, expected: Expected) -> None:
        path, size = next(iter(expected.files.items()))
        (row,) = client.ls(path)
        assert (row["name"], row["size"]) == (path.rpartition("/")[2], size)

    def test_one_path_has_one_meaning_however_it_is_written(self, client: Client, expected: Expected) -> None:
        names = [row["name"] for row in client.ls(expected.directory)]
        for spelling in (f"/{expected.directory}/", f"./{expected.directory}", f"//{expected.directory}/."):
            assert [row["name"] for row in client.ls(spelling)] == names

    @pytest.mark.parametrize("path", ["..", "a/../b", "a\0b"])
    def test_paths_that_leave_the_mount_are_refused(self, client: Client, path: str) -> None:
        with pytest.raises(UsageError):
            client.stat(path)
        with pytest.raises(UsageError):
            client.pin([path])

    @pytest.mark.parametrize("path", ["no-such-name", "no/such/name", "mißt", "a&b=c?d#e%41", "x" * 255])
    def test_a_missing_path_is_not_found(self, client: Client, path: str) -> None:
        with pytest.raises(NotFoundError):
            client.ls(path)
        with pytest.raises(NotFoundError):
            client.stat(path)
        with pytest.raises(NotFoundError):
            list(client.prefetch([path], "ssd", wait=True))
        with pytest.raises(NotFoundError):
            client.pin([path])

    def test_stat_tells_file_from_directory(self, client: Client, expected: Expected) -> None:
        path, size = next(iter(expected.files.items()))
        file, directory = client.stat(path), client.stat(expected.directory)
        assert (file["path"], file["kind"], file["size"]) == (path, "file", size)
        assert file["revision"]
        assert directory["kind"] == "directory"
        assert file["inode"] != directory["inode"]

    def test_overview_adds_models_up(self, client: Client, expected: Expected) -> None:
        list(client.prefetch([expected.directory], "ssd", wait=True))
        seen = client.overview(sort="name", match=expected.directory[:3].upper(), count=1)
        assert seen["status"]["pid"] == client.status()["pid"]
        assert seen["models"]["count"] >= 1
        [row] = seen["models"]["rows"]
        assert expected.directory[:3] in row["path"]
        assert set(row) == {
            "path", "is_model", "size", "files_count", "ssd_bytes", "ram_bytes", "origin_bytes", "pinned_count",
            "open_count", "fetching_count", "last_used_at", "waited_s",
        }  # fmt: skip
        assert set(seen["fetches"]) == {"count", "queued_count", "rows"}
        assert client.overview(match="no such model")["models"]["rows"] == []
        assert client.overview(count=0)["models"]["rows"] == []

    def test_heat_says_which_parts_are_where(self, client: Client, expected: Expected) -> None:
        list(client.prefetch([expected.directory], "ssd", wait=True))
        found = client.heat(expected.directory)
        prefix = f"{expected.directory}/"
        assert {file["path"]: file["size"] for file in found["files"]} == {
            path: size for path, size in expected.files.items() if path.startswith(prefix)
        }
        for file in found["files"]:
            assert file["ssd_bytes"] == file["size"]
            assert set(file["ssd"]) == {"9"}
        assert found["left_out"] == 0
        with pytest.raises(NotFoundError):
            client.heat("no/such/name")

    def test_prefetch_brings_files_into_the_tier(self, client: Client, expected: Expected) -> None:
        client.evict([""], "all")
        updates = list(client.prefetch([expected.directory], "ssd", wait=True))
        prefix = expected.directory + "/"
        wanted = {path: size for path, size in expected.files.items() if path.startswith(prefix)}
        last = updates[-1]
        assert last["done"] is True
        assert (last["failed"], last["files_count"]) == ([], len(wanted))
        assert last["total_bytes"] == last["done_bytes"] == sum(wanted.values())
        assert [u["done_bytes"] for u in updates] == sorted(u["done_bytes"] for u in updates)
        for path, size in wanted.items():
            assert client.stat(path)["ssd_bytes"] == size

    def test_a_directory_says_what_is_below_it(self, client: Client, expected: Expected) -> None:
        list(client.prefetch([expected.directory], "ssd", wait=True))
        below = sum(size for path, size in expected.files.items() if path.startswith(f"{expected.directory}/"))
        [row] = [row for row in client.ls("") if row["name"] == expected.directory]
        for found in (row, client.stat(expected.directory)):
            assert (found["size"], found["ssd_bytes"], found["pinned"]) == (below, below, False)
        client.pin([expected.directory])
        assert client.stat(expected.directory)["pinned"]
        client.unpin([expected.directory])

    def test_prefetch_into_ram(self, client: Client, expected: Expected) -> None:
        path, size = next(iter(expected.files.items()))
        assert list(client.prefetch([path], "ram", wait=True))[-1]["failed"] == []
        assert client.stat(path)["ram_bytes"] == size

    def test_prefetch_without_waiting_says_how_much(self, client: Client, expected: Expected) -> None:
        path, size = next(iter(expected.files.items()))
        assert next(client.prefetch([path], "ssd", wait=False))["total_bytes"] == size

    def test_paths_that_overlap_count_once(self, client: Client, expected: Expected) -> None:
        last = list(client.prefetch([expected.directory, expected.directory, ""], "ssd", wait=True))[-1]
        assert last["files_count"] == len(expected.files)

    def test_evict_drops_and_pins_protect(self, client: Client, expected: Expected) -> None:
        path, size = next(iter(expected.files.items()))
        list(client.prefetch([path], "ssd", wait=True))
        assert client.pin([path]) == {"files_count": 1, "bytes": size}
        kept = client.evict([path], "ssd")
        assert (kept["ssd_bytes"], kept["kept_pinned_count"]) == (0, 1)
        assert client.stat(path)["ssd_bytes"] == size
        assert client.stat(path)["pinned"] is True
        client.unpin([path])
        dropped = client.evict([path], "all")
        assert (dropped["ssd_bytes"], dropped["kept_pinned_count"]) == (size, 0)
        after = client.stat(path)
        assert (after["ssd_bytes"], after["ram_bytes"], after["pinned"]) == (0, 0, False)

    def test_verify_of_good_bytes_finds_nothing(self, client: Client, expected: Expected) -> None:
        client.unpin([""])
        client.evict([""], "all")
        list(client.prefetch([expected.directory], "ssd", wait=True))
        last = list(client.verify([""]))[-1]
        prefix = expected.directory + "/"
        resident_bytes = sum(size for path, size in expected.files.items() if path.startswith(prefix))
        assert (last["done"], last["bad"]) == (True, [])
        # Small files elsewhere in the tree may come by themselves meanwhile.
        assert resident_bytes <= last["checked_bytes"] <= sum(expected.files.values())

    def test_refresh_of_an_unchanged_source_changes_nothing(self, client: Client) -> None:
        assert client.refresh() == {"changed_count": 0, "added_count": 0, "removed_count": 0, "errors": []}

    def test_config_shows_no_secret(self, client: Client) -> None:
        settings = client.config()
        assert json.dumps(settings)
        assert all(source.get("token") in (None, "***") for source in settings.get("sources", []))

    def test_many_clients_at_once(self, client: Client, expected: Expected) -> None:
        paths = list(expected.files) * 8
        with ThreadPoolExecutor(16) as pool:
            assert [row["path"] for row in pool.map(client.stat, paths)] == paths

    def test_watching_begins_at_once_and_ends_with_the_client(self, client: Client) -> None:
        for _ in range(2):
            with contextlib.closing(client.watch()) as items:
                first, second = next(items), next(items)
            assert (first["records"], first["dropped_count"]) == ([], 0)
            assert second["at_s"] > first["at_s"]
        assert client.status()["pid"]

    def test_a_broken_off_prefetch_leaves_the_daemon_serving(self, client: Client, expected: Expected) -> None:
        updates = client.prefetch([""], "ssd", wait=True)
        next(updates)
        updates.close()  # type: ignore[attr-defined]
        assert client.status()["pid"]
        list(client.prefetch([""], "ssd", wait=True))
        assert all(client.stat(path)["ssd_bytes"] == size for path, size in expected.files.items())

"""The cache directory: made, recognised, and refused where others decide what stands in it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.cache import directory
from mfs.cache.directory import check_directory, open_directory
from mfs.cache.residency import ResidencyTables
from mfs.errors import ConfigError, StoreError
from tests.cache.objectfiles import make_object, make_tier, write_chunk

SOMEBODY = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize(
    "marker", ['{"format": 3}', '{"format": true}', '{"format": "1"}', "{}", "[]", "null", "", "\0\0"]
)
def test_a_cache_of_another_version_is_refused(tmp_path: Path, marker: str) -> None:
    (tmp_path / "mfs-cache.json").write_text(marker)
    with pytest.raises(ConfigError, match="--cache-dir"):
        open_directory(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mfs-cache.json"]


def test_a_cache_of_chunk_files_is_refused_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mfs-cache.json").write_text('{"format": 1}')
    (tmp_path / "v1" / "chunks").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        open_directory(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"cache directory {tmp_path} has format 1, expected 2")
    assert "remove its v1/ and mfs-cache.json, or name another one with --cache-dir" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mfs-cache.json", "v1"]


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("\\documentclass")
    with pytest.raises(ConfigError, match="neither empty nor an mfs cache"):
        open_directory(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_or_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"is not a directory|cannot be written: Not a directory"):
            open_directory(place)


def test_a_new_file_system_and_a_killed_start_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "mfs-cache.1234.tmp").touch()
    open_directory(tmp_path)
    open_directory(tmp_path)


_OPENER = "import sys; from pathlib import Path; from mfs.cache.directory import open_directory\n" \
    "sys.stdin.read(1)\nfor n in range(200): open_directory(Path(sys.argv[1]) / str(n))"  # fmt: skip


def test_processes_that_start_together_all_get_the_directory(tmp_path: Path) -> None:
    openers = [
        subprocess.Popen([sys.executable, "-c", _OPENER, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write(b"g")
        opener.stdin.flush()
    assert [opener.communicate()[1].decode() for opener in openers] == [""] * 3


# -- whose it is


@needs_root
def test_another_users_directory_is_refused_unless_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, SOMEBODY, SOMEBODY)
    for refuse in (check_directory, open_directory):
        with pytest.raises(ConfigError, match=f"belongs to uid {SOMEBODY}.*--cache-shared"):
            refuse(cache)
    assert not list(cache.iterdir())
    open_directory(cache, shared=True)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_cache_that_others_can_write_to_is_refused_unless_shared(tmp_path: Path, mode: int) -> None:
    cache = tmp_path / "cache"
    open_directory(cache)
    cache.chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}"):
        open_directory(cache)
    open_directory(cache, shared=True)


def test_an_empty_directory_of_ours_is_closed_to_others(tmp_path: Path) -> None:
    """As mkdir makes it where groups are private and the umask is 002."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o775)
    open_directory(cache)
    assert cache.stat().st_mode & 0o777 == 0o755
    assert (cache / "v2").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_anyone_can_exchange_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "open"
    above.mkdir()
    above.chmod(0o777)
    with pytest.raises(ConfigError, match="can be replaced by anyone"):
        open_directory(above / "cache")
    above.chmod(0o1777)
    open_directory(above / "cache")


@needs_root
def test_a_directory_inside_another_users_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "home"
    above.mkdir()
    os.chown(above, SOMEBODY, SOMEBODY)
    with pytest.raises(ConfigError, match=f"can be replaced by uid {SOMEBODY}"):
        open_directory(above / "cache")


def _link(path: Path) -> None:
    aside = path.with_name(f"{path.name}-aside")
    path.rename(aside)
    path.symlink_to(aside)


def _give_away(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, SOMEBODY, SOMEBODY)


def _put_fifo(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}-aside"))
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [_link, _give_away, _put_fifo], ids=["link", "another user's", "fifo"])
@pytest.mark.parametrize(
    "place",
    ["mfs-cache.json", "v2", "v2/objects", "v2/index", "v2/index/lock", "v2/index/meta", "v2/index/chunks/data.ninja",
     "v2/pins", "v2/names.lock", "v2/tree.sqlite", "v2/evict.lock"],
)  # fmt: skip
def test_what_others_planted_inside_is_refused(tmp_path: Path, place: str, plant: Callable[[Path], None]) -> None:
    cache = tmp_path / "cache"
    tier = make_tier(cache)
    tables = ResidencyTables(cache, writable=True)
    tables.set_pinned(make_object(), True)
    write_chunk(tier, make_object(), 0, 1)
    for name in ("tree.sqlite", "evict.lock"):
        (cache / "v2" / name).touch()
    plant(cache / place)
    with pytest.raises(ConfigError, match=r"is a symbolic link|belongs to uid|neither (empty|file)|Not a directory"):
        open_directory(cache)


def test_links_that_come_while_it_is_open_are_not_followed(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    make_tier(cache)
    tables, obj = ResidencyTables(cache, writable=True), make_object()
    outside.write_text("not to be touched")
    (cache / "v2" / "pins").mkdir()
    (cache / "v2" / "pins" / f"{obj.cache_id}.{obj.size}").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="symbolic links"):
        tables.set_pinned(obj, True)
    assert not (tmp_path / "made").exists()
    (cache / "v2" / "index" / "lock").unlink()
    (cache / "v2" / "index" / "lock").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        tables.set_mask(obj, 0, 1)


# -- what a disk does


@pytest.mark.parametrize("marker", [None, "", '{"form', "\0" * 20])
def test_a_marker_that_is_lost_or_cut_off_is_made_again(tmp_path: Path, marker: str | None) -> None:
    write_chunk(make_tier(tmp_path), make_object(), 0, 1)
    ResidencyTables(tmp_path, writable=True)
    (tmp_path / "mfs-cache.json").unlink()
    if marker is not None:
        (tmp_path / "mfs-cache.json").write_text(marker)
    open_directory(tmp_path)
    assert json.loads((tmp_path / "mfs-cache.json").read_text()) == {"format": 2}


def test_a_directory_called_v2_is_not_enough_to_be_a_cache(tmp_path: Path) -> None:
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="neither empty nor an mfs cache"):
        open_directory(tmp_path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT])
def test_a_disk_that_may_recover_is_no_mistake_of_a_persons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(directory, "_mark", fail)
    with pytest.raises(StoreError, match="cannot be used now"):
        open_directory(tmp_path / "cache")


def test_nothing_is_made_in_place_of_a_disk_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_directory(tmp_path / "cache", create=False)
    assert not (tmp_path / "cache").exists()

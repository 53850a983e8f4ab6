"""A registry in a folder: modes for groups, no links followed, nothing half written, whatever the file system knows."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import MfsError, NotFoundError, StoreError
from mfs.registry import folder_store, tags
from mfs.registry.folder_store import FolderStore
from mfs.testing.store_suite import keys
from mfs.testing.suite import deadline

KEY = "tags/m/t/0000000001"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("root_mode", "folder_mode", "file_mode"),
    [(0o2775, 0o2775, 0o444), (0o755, 0o755, 0o444), (0o2770, 0o2770, 0o440), (0o700, 0o700, 0o400)],
)
def test_modes_come_from_the_root_whatever_the_umask(
    tmp_path: Path, root_mode: int, folder_mode: int, file_mode: int
) -> None:
    root = tmp_path / "reg"
    root.mkdir()
    root.chmod(root_mode)
    before = os.umask(0o077)
    try:
        FolderStore(str(root)).create(KEY, b"x", deadline_s=deadline())
        FolderStore(str(root)).write("work/push-1", b"x", deadline_s=deadline())
    finally:
        os.umask(before)
    assert {mode_of(path) for path in root.rglob("*") if path.is_dir()} == {folder_mode}
    assert {mode_of(path) for path in root.rglob("*") if path.is_file()} == {file_mode}


def test_no_link_is_followed_below_the_root(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "reg"
    (outside / "t").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (root / "tags").mkdir(parents=True)
    (root / "tags/m").symlink_to(outside)
    (root / "tags/secret").symlink_to(outside / "secret")
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    store = FolderStore(str(linked))
    assert keys(store) == []
    for act in (
        lambda: store.read("tags/secret", deadline_s=deadline()),
        lambda: store.read("tags/m/secret", deadline_s=deadline()),
        lambda: store.create("tags/m/t/1", b"x", deadline_s=deadline()),
        lambda: store.write("tags/m/secret", b"x", deadline_s=deadline()),
        lambda: store.delete(["tags/m/secret"], deadline_s=deadline()),
        lambda: keys(store, "tags/m/"),
    ):
        with pytest.raises(StoreError) as caught:
            act()
        assert "link" in str(caught.value)
    assert (outside / "secret").read_bytes() == b"secret"
    assert list((outside / "t").iterdir()) == []
    assert store.create("manifests/m/1", b"x", deadline_s=deadline())


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tags").mkdir()
    os.mkfifo(tmp_path / "tags/pipe")
    store = FolderStore(str(tmp_path))
    assert keys(store) == []
    with pytest.raises(NotFoundError):
        store.read("tags/pipe", deadline_s=deadline())


def test_others_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    for name in (".nfs0001", ".DS_Store", "a b", "-x"):
        (tmp_path / "chunks" / name).write_bytes(b"x")
    assert keys(FolderStore(str(tmp_path))) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(str(tmp_path))

    def no_room(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_room)
        for act in (store.create, store.write):
            with pytest.raises(StoreError) as caught:
                act(KEY, b"x", deadline_s=deadline())
            assert "mfs gc" in str(caught.value)
    assert keys(store) == []


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = FolderStore(str(tmp_path))
    assert store.create(KEY, b"first", deadline_s=deadline())
    assert not store.create(KEY, b"other", deadline_s=deadline())
    assert store.read(KEY, deadline_s=deadline()) == b"first"
    assert keys(store) == [KEY]


def test_a_file_system_that_lets_nothing_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As CIFS and some FUSE file systems: no links, renames that replace, no modes, no fsync of directories."""

    def refusing(real: Any, code: int, *, folders_alone: bool = False) -> Any:
        def refuse(target: Any, *args: Any, **options: Any) -> Any:
            if folders_alone and not stat.S_ISDIR(os.fstat(target).st_mode):
                return real(target, *args, **options)
            raise OSError(code, os.strerror(code))

        return refuse

    monkeypatch.setattr(os, "link", refusing(os.link, errno.EOPNOTSUPP))
    monkeypatch.setattr(folder_store, "_rename_noreplace", refusing(None, errno.EINVAL))
    monkeypatch.setattr(os, "chmod", refusing(os.chmod, errno.EPERM))
    monkeypatch.setattr(os, "fchmod", refusing(os.fchmod, errno.EPERM))
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EINVAL, folders_alone=True))
    store = FolderStore(str(tmp_path))
    assert not store.is_conditional(deadline_s=deadline())
    assert store.create(KEY, b"first", deadline_s=deadline())
    assert not store.create(KEY, b"other", deadline_s=deadline())
    assert store.read(KEY, deadline_s=deadline()) == b"first"
    store.write(KEY, b"third", deadline_s=deadline())
    tags.move(store, "llama", "prod", "1" * 64, how="tag", deadline_s=deadline())
    (moved,) = keys(store, "tags/llama/prod/")
    assert re.fullmatch(r"tags/llama/prod/0000000001\.[0-9a-f]{32}", moved)
    assert keys(store, "work/") == []
    assert len(caplog.records) == 1


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends a request again whose answer it lost, and then says that the name is taken."""
    real = os.link

    def twice(*args: Any, **options: Any) -> None:
        real(*args, **options)
        real(*args, **options)

    monkeypatch.setattr(os, "link", twice)
    assert FolderStore(str(tmp_path)).create(KEY, b"ours", deadline_s=deadline())
    assert not FolderStore(str(tmp_path)).create(KEY, b"other", deadline_s=deadline())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_who_may_not_write_is_told_so(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:  # another user, in a process of its own
        status = 1
        try:
            os.chdir("/")
            os.setgid(65534)
            os.setuid(65534)
            FolderStore("/usr").create(KEY, b"x", deadline_s=deadline())
        except MfsError as error:
            status = 0 if "check the modes" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

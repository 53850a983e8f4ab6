"""Modes none and explicit on the mount: load, unload and infer give the right numbers, whatever changes below."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.mount import origins, touching
from tests.servers import triton
from tests.servers.process import ServerError
from tests.servers.triton import TritonError, TritonServer
from tests.triton import models
from tests.triton.conftest import Repository, Serve, wait_for


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """A folder on a mount."""
    folder = tmp_path_factory.mktemp("repo")
    made = Repository(origins.FolderOrigin(folder / "registry"), folder / "m")
    made.publish(models.model("first", 1))
    with made.mount:
        yield made


def test_mode_none_serves_every_model_of_the_mount(repository: Repository, serve: Serve) -> None:
    """The root holds nothing but models: any other directory would end the server in this mode."""
    repository.publish({**models.model("first", 1), **models.model("none", 3)})
    server = serve(repository.path)
    assert set(server.index().items()) == {(("first", "1"), "READY"), (("none", "3"), "READY")}
    assert models.scale_of(server, "first") == 1
    assert models.scale_of(server, "none") == 3


def test_load_infer_unload(repository: Repository, server: TritonServer) -> None:
    repository.add(models.model("plain", 4))
    server.load("plain")
    assert models.scale_of(server, "plain") == 4
    assert models.total_of(server, "plain") == models.filler_sum(4)
    server.unload("plain")
    with pytest.raises(TritonError):
        models.total_of(server, "plain")


def test_a_load_of_what_did_not_change_does_nothing(repository: Repository, server: TritonServer) -> None:
    repository.add(models.model("same", 1))
    server.load("same")
    server.load("same")
    repository.mount.client.refresh()
    repository.add(models.model("elsewhere", 1))  # a change of another model
    server.load("same")
    assert server.loads("same") == 1


def test_the_only_write_triton_tries_is_refused_quietly(repository: Repository, server: TritonServer) -> None:
    """Python would keep its byte code beside model.py: no __pycache__ appears, so none causes a reload."""
    repository.add(models.model("pyc", 1))
    server.load("pyc")
    names = repository.look(touching.list_names, str(repository.path / "pyc" / "1"))
    assert names == ["model.py", "model.safetensors"]


class TestVersions:
    """Version policies follow the tree; rollback is taking the newest version away, or naming another."""

    @pytest.mark.parametrize(
        ("policy", "served"),
        [
            ("", ["3"]),
            ("version_policy: { latest { num_versions: 2 } }", ["2", "3"]),
            ("version_policy: { all { } }", ["1", "2", "3"]),
            ("version_policy: { specific { versions: [ 1, 3 ] } }", ["1", "3"]),
        ],
        ids=["latest", "latest-2", "all", "specific"],
    )
    def test_policy(self, repository: Repository, server: TritonServer, policy: str, served: list[str]) -> None:
        name = f"policy{len(served)}{'s' if 'specific' in policy else ''}"
        repository.add(models.model(name, 1, 2, 3, extra=policy))
        server.load(name)
        assert server.versions(name) == served
        for version in served:
            assert models.scale_of(server, name, int(version)) == int(version)

    def test_a_new_version_serves_beside_the_others(self, repository: Repository, server: TritonServer) -> None:
        """Triton 2.51 starts the others anew too, on a local disk as here: the model's own directory has changed."""
        repository.add(models.model("grow", 1, extra="version_policy: { all { } }"))
        server.load("grow")
        repository.add(models.version("grow", 2))
        server.load("grow")
        assert server.versions("grow") == ["1", "2"]
        assert models.scale_of(server, "grow", 1) == 1
        assert models.scale_of(server, "grow", 2) == 2

    def test_rollback_by_taking_the_newest_version_away(self, repository: Repository, server: TritonServer) -> None:
        repository.add(models.model("back", 1, 2))
        server.load("back")
        assert models.scale_of(server, "back") == 2
        repository.remove("back/2/")
        server.load("back")
        wait_for(lambda: server.versions("back") == ["1"], "the unloading of the other")
        assert models.scale_of(server, "back") == 1

    def test_what_a_refresh_has_published_the_next_load_sees(
        self, repository: Repository, server: TritonServer
    ) -> None:
        """`mfs refresh` returns when the kernel knows: Triton would not look again by itself."""
        repository.add(models.model("often", 1))
        for _ in range(6):
            repository.add(models.version("often", 2))
            server.load("often")
            assert server.is_model_ready("often", 2)
            repository.remove("often/2/")
            server.load("often")
            wait_for(lambda: not server.is_model_ready("often", 2), "the rollback")
            assert models.scale_of(server, "often") == 1

    def test_rollback_by_policy_moves_only_the_configuration(
        self, repository: Repository, server: TritonServer
    ) -> None:
        repository.add(models.model("pinned", 1, 2))
        server.load("pinned")
        config = models.config(extra="version_policy: { specific { versions: [ 1 ] } }")
        repository.add({"pinned/config.pbtxt": config})
        server.load("pinned")
        wait_for(lambda: server.versions("pinned") == ["1"], "the unloading of the other")
        assert models.scale_of(server, "pinned") == 1

    def test_a_renamed_version(self, repository: Repository, server: TritonServer) -> None:
        repository.add(models.model("renamed", 1))
        server.load("renamed")
        files = {name: content for name, content in repository.files.items() if not name.startswith("renamed/1/")}
        repository.publish({**files, **models.version("renamed", 5, scale=1)})
        server.load("renamed")
        wait_for(lambda: server.versions("renamed") == ["5"], "the unloading of the other")
        assert models.scale_of(server, "renamed") == 1

    def test_retrained_weights_of_the_same_size_and_an_older_date_are_served(
        self, repository: Repository, server: TritonServer
    ) -> None:
        assert isinstance(repository.origin, origins.FolderOrigin)
        repository.add(models.model("retrained", 1))
        server.load("retrained")
        assert models.scale_of(server, "retrained") == 1
        repository.add(models.version("retrained", 1, scale=9))
        file = repository.origin.root / "retrained/1/model.safetensors"
        os.utime(file, (1_000_000_000, 1_000_000_000))  # 2001
        repository.mount.client.refresh()
        server.load("retrained")
        assert models.scale_of(server, "retrained") == 9
        assert models.total_of(server, "retrained") == models.filler_sum(9)


def test_a_version_without_its_weights_is_a_failed_load_and_the_one_before_serves_on(
    repository: Repository, server: TritonServer
) -> None:
    """The error says which file is missing, and the next load, once it is there, succeeds."""
    repository.add(models.model("half", 1))
    server.load("half")
    incomplete = models.version("half", 2)
    del incomplete["half/2/model.safetensors"]
    repository.add(incomplete)
    with pytest.raises(TritonError, match=r"model\.safetensors"):
        server.load("half")
    assert models.scale_of(server, "half", 1) == 1
    repository.add(models.version("half", 2))
    server.load("half")
    assert models.scale_of(server, "half") == 2


def test_a_remount_reloads_nothing(tmp_path: Path, serve: Serve) -> None:
    """Directory times are the next mount's too. (Triton must not poll meanwhile: an unmounted repository is empty.)"""
    repository = Repository(origins.FolderOrigin(tmp_path / "registry"), tmp_path / "m")
    repository.publish(models.model("stays", 1))
    paths = ["", "stays", "stays/1", "stays/2", "stays/2/model.safetensors"]
    with repository.mount:
        server = serve(repository.path, "--model-control-mode=explicit")
        repository.add(models.version("stays", 2))  # so that times have moved since the mount began
        server.load("stays")
        before = times(repository, paths)
    with repository.mount:
        assert times(repository, paths) == before
        server.load("stays")
        assert server.loads("stays") == 1
        assert models.scale_of(server, "stays") == 2


def times(repository: Repository, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """What Triton compares."""
    found = {path: repository.look(touching.stat, str(repository.path / path)) for path in paths}
    return {path: (stat["st_mtime_ns"], stat["st_ctime_ns"]) for path, stat in found.items()}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="mfs-triton-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_server_of_another_user_reads_a_mount_that_allows_others(open_folder: Path) -> None:
    """And only such a one: without --allow-other it finds no repository."""
    for folder in (open_folder, triton.ROOT):
        if not all(place.stat().st_mode & 0o001 for place in folder.parents):
            pytest.skip(f"other users cannot reach {folder}")
    # The capability is for Python, whose folder may be root's; FUSE does not ask for it.
    capabilities = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    other = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *capabilities, "--pdeathsig=KILL", "--")
    for allow_other in (True, False):
        place = open_folder / str(allow_other)
        repository = Repository(origins.FolderOrigin(place / "registry"), place / "m", allow_other=allow_other)
        repository.publish(models.model("theirs", 1))
        server = TritonServer(place / "t", repository.path, argv_before=other)
        with repository.mount:
            stat = repository.look(touching.stat, str(repository.path / "theirs/1/model.safetensors"))
            assert stat["st_mode"] & 0o7777 == 0o444
            if allow_other:
                with server:
                    assert Path(f"/proc/{server.pid}").stat().st_uid == 65534
                    assert models.scale_of(server, "theirs") == 1
            else:
                with pytest.raises(ServerError):
                    server.start()

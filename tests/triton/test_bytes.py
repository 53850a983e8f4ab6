"""What loads move from the store: the bytes of the version that is loaded, once, and of tensors only those touched."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import origins
from tests.servers.nginx import NginxServer
from tests.servers.triton import PYTHON, TritonServer
from tests.triton import models
from tests.triton.conftest import Repository, Serve

FILLER_BYTES = 24 << 20


@pytest.fixture(scope="module")
def repository(nginx: NginxServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """A web folder: nginx itself counts what it sends."""
    made = Repository(origins.WebOrigin(nginx), tmp_path_factory.mktemp("repo"), ram_bytes=256 << 20)
    made.publish(models.model("first", 1))
    with made.mount:
        yield made


@pytest.fixture
def sent(repository: Repository, nginx: NginxServer) -> Sent:
    """Counts from here on."""
    assert isinstance(repository.origin, origins.WebOrigin)
    return Sent(repository, nginx, repository.origin.root.name)


class Sent:
    """What nginx sent of the files of a module's repository."""

    def __init__(self, repository: Repository, nginx: NginxServer, root: str) -> None:
        self._repository, self._nginx, self._root = repository, nginx, root

    def bytes(self, path: str = "") -> int:
        """Of files whose path begins so, once nothing is under way."""
        self._repository.mount.wait_quiet()
        prefix = f"/{self._root}/{path}"
        return sum(
            request.sent_bytes
            for request in self._nginx.requests()
            if request.path.startswith(prefix) and request.range
        )

    def requests(self) -> list[str]:
        """Paths asked for."""
        return [request.path for request in self._nginx.requests() if request.path.startswith(f"/{self._root}/")]

    def forget(self) -> None:
        """Count anew."""
        self._repository.mount.wait_quiet()
        self._nginx.forget_requests()


def test_two_tensors_of_one_of_two_versions_move_kilobytes(
    repository: Repository, server: TritonServer, sent: Sent
) -> None:
    """Where Triton's own s3:// copies both versions whole."""
    sent.forget()
    repository.add(models.model("part", 1, 2, reads="two", filler_bytes=FILLER_BYTES))
    server.load("part")
    assert models.scale_of(server, "part") == 2
    assert sent.bytes("part/1/model.safetensors") == 0
    assert 0 < sent.bytes("part/") < 1 << 20


def test_a_whole_version_is_moved_once_and_the_other_not_at_all(
    repository: Repository, server: TritonServer, sent: Sent
) -> None:
    repository.add(models.model("whole", 1, 2, filler_bytes=FILLER_BYTES))
    sent.forget()
    server.load("whole")
    assert models.total_of(server, "whole") == models.filler_sum(2, FILLER_BYTES)
    size = len(repository.files["whole/2/model.safetensors"])
    assert sent.bytes("whole/1/model.safetensors") == 0
    assert sent.bytes("whole/2/model.safetensors") == size


def test_the_second_swap_moves_nothing(repository: Repository, server: TritonServer, sent: Sent) -> None:
    repository.add(
        {**models.model("ping", 1, filler_bytes=FILLER_BYTES), **models.model("pong", 2, filler_bytes=FILLER_BYTES)}
    )
    for name, number in (("ping", 1), ("pong", 2)):
        server.load(name)
        assert models.total_of(server, name) == models.filler_sum(number, FILLER_BYTES)
        server.unload(name)
    sent.forget()
    for name, number in (("ping", 1), ("pong", 2), ("ping", 1)):
        server.load(name)
        assert models.total_of(server, name) == models.filler_sum(number, FILLER_BYTES)
        server.unload(name)
    assert sent.requests() == []


def test_the_many_looks_for_files_that_are_not_there_cost_nothing(
    repository: Repository, server: TritonServer, sent: Sent
) -> None:
    """Triton looks for some twenty names that do not exist; a directory is listed once, and that answers all."""
    sent.forget()
    repository.add(models.model("walk", 1, 2))
    server.load("walk")
    assert models.scale_of(server, "walk") == 2
    repository.mount.wait_quiet()
    asked = Counter(path.rpartition("/walk/")[2] for path in sent.requests() if "/walk/" in path)
    folders = {"", "1/", "2/"}
    assert asked.keys() <= folders | {"config.pbtxt", "1/model.py", "2/model.py", "2/model.safetensors"}
    assert all(asked[folder] <= 1 for folder in folders)


def test_one_model_asked_for_at_start_touches_no_other(
    repository: Repository, nginx: NginxServer, sent: Sent, serve: Serve
) -> None:
    repository.add({**models.model("asked", 1), **models.model("other", 1)})
    sent.forget()
    server = serve(repository.path, "--model-control-mode=explicit", "--load-model=asked")
    assert models.scale_of(server, "asked") == 1
    assert server.versions("other") == []
    assert not [path for path in sent.requests() if "/other/" in path and path.endswith(".safetensors")]


def test_an_environment_on_the_mount_is_used_in_place(repository: Repository, server: TritonServer) -> None:
    """EXECUTION_ENV_PATH naming a directory: nothing is extracted, nothing copied."""
    environment = environment_files()
    repository.add({f"inplace/env/{name}": content for name, content in environment.items()})
    config = 'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{}" }} }}'
    path = repository.path / "inplace" / "env"
    repository.add(models.model("inplace", 1, extra=config.format(path)))
    before = set(Path("/tmp").glob("python_env_*"))
    server.load("inplace")
    assert models.scale_of(server, "inplace") == 1
    made = set(Path("/tmp").glob("python_env_*")) - before
    assert [name for folder in made for name in os.listdir(folder)] == []
    assert str(path) in server.log


def test_a_packed_environment_is_extracted_once(repository: Repository, server: TritonServer, packed_name: str) -> None:
    """Again only if its time differs: over three loads of an unchanged one, and a refresh between, it does not."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {**environment_files(), packed_name: b"x"}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    repository.add({"packed/env.tar.gz": packed.getvalue()})
    config = 'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{}" }} }}'
    repository.add(models.model("packed", 1, extra=config.format(repository.path / "packed" / "env.tar.gz")))
    for _ in range(3):
        server.load("packed")
        assert models.scale_of(server, "packed") == 1
        server.unload("packed")
        repository.mount.client.refresh()
    assert len(list(Path("/tmp").glob(f"python_env_*/*/{packed_name}"))) == 1


@pytest.fixture
def packed_name() -> Iterator[str]:
    """A file of the packed environment by which its extractions are known, and removed."""
    name = f"mfs-test-{uuid.uuid4().hex}"
    yield name
    for found in Path("/tmp").glob(f"python_env_*/*/{name}"):
        shutil.rmtree(found.parent)


def environment_files() -> dict[str, bytes]:
    """An environment as Triton takes it: a script that puts one more Python in front."""
    return {"bin/activate": f"export PATH={PYTHON.parent}:$PATH\n".encode(), "lib/nothing": b""}

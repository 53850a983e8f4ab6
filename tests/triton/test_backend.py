"""The backend "gpuload" in the real server: directories of safetensors and a configuration, one copy of the weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from gpuload.client.asking import ask
from gpuload.errors import AwayError
from mfs.testing import ramp
from mfs.triton import install_backend
from tests.mount import origins
from tests.servers.process import ServerProcess
from tests.servers.triton import PYTHON, TritonError, TritonServer
from tests.triton.conftest import Repository, wait_for

MIB = 1 << 20
NET_PY = b"""
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)

class Unfit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(4, 2)

def make(weights):
    # Several outputs by name, and one of a type that differs from the configuration's.
    def run(x, flag=None):
        y = x @ weights["layer.weight"].T + weights["layer.bias"]
        return {"y": y.double(), "sum": weights["filler"].sum(dtype=torch.int64)[None], "not_asked": y}
    return run

def echo(weights):
    return lambda text, flag: (text, ~flag)

def broken(weights):
    def run(x):
        raise ValueError("no good numbers")
    return run

def nothing(weights):
    return 3
"""
X = 'input { name: "x" data_type: TYPE_FP32 dims: [ 1, 4 ] }'
Y = 'output { name: "y" data_type: TYPE_FP32 dims: [ 1, 2 ] }'
SUM = 'output { name: "sum" data_type: TYPE_INT64 dims: [ 1 ] }'


def config(computes: str | None, *blocks: str) -> bytes:
    model = f'parameters {{ key: "model" value {{ string_value: "{computes}" }} }}' if computes is not None else ""
    return "\n".join(['backend: "gpuload"', "max_batch_size: 0", *(blocks or (X, Y)), model, ""]).encode()


def weights(scale: float, *, filler_bytes: int = 0, filler_seed: int = 0) -> bytes:
    """A linear layer whose answer to (1, 1, 1, 1) is (4 * scale, 8 * scale) + scale."""
    tensors = {
        "layer.weight": np.array([[scale] * 4, [2 * scale] * 4], np.float32),
        "layer.bias": np.full(2, scale, np.float32),
    }
    if filler_bytes:
        tensors["filler"] = np.frombuffer(ramp(filler_bytes, filler_seed), np.uint8)
    content: bytes = save(tensors)
    return content


def answer(server: TritonServer, name: str, version: int | None = None) -> dict[str, list[Any]]:
    return server.infer(name, {"x": ("FP32", [1, 4], [1, 1, 1, 1])}, version=version)


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the weight server of these tests listens when it runs."""
    return tmp_path_factory.mktemp("g") / "s"


@pytest.fixture
def weight_server(socket_path: Path) -> Iterator[ServerProcess]:
    """`gpuload serve` with 64 MiB of host memory."""
    argv = [str(PYTHON), "-m", "gpuload", "serve", "--arena", "cpu=64MiB", "--socket", str(socket_path)]
    process = ServerProcess("gpuload serve", argv, log=socket_path.parent / "serve.log")

    def answers() -> bool:
        with contextlib.suppress(AwayError):
            ask({"op": "ping"}, socket_path=str(socket_path))
            return True
        return False

    try:
        process.wait_until(answers)
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    folder = tmp_path_factory.mktemp("repo")
    made = Repository(origins.FolderOrigin(folder / "registry"), folder / "m")
    made.publish(
        {"net/config.pbtxt": config("net.py:Net"), "net/net.py": NET_PY, "net/1/model.safetensors": weights(1)}
    )
    with made.mount:
        yield made


@pytest.fixture(scope="module")
def server(
    repository: Repository, socket_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """With the backend installed as its command installs it."""
    folder = tmp_path_factory.mktemp("triton")
    installed = install_backend(folder)
    with TritonServer(
        folder, repository.path, "--model-control-mode=explicit", backends={"gpuload": installed.parent},
        env={"GPULOAD_SOCKET": str(socket_path)},
    ) as made:  # fmt: skip
        yield made


def add(repository: Repository, name: str, computes: str | None, *blocks: str, **versions: bytes) -> None:
    """Publish a model; versions: v1=…, v2=…"""
    files = {f"{name}/config.pbtxt": config(computes, *blocks)}
    repository.add(files | {f"{name}/{key[1:]}/model.safetensors": content for key, content in versions.items()})


def test_a_module_class_computes_with_the_weights_of_each_version(repository: Repository, server: TritonServer) -> None:
    """The file lies in the model's directory, for all versions; nothing but safetensors in theirs."""
    server.load("net")
    assert answer(server, "net")["y"] == [5, 9]
    repository.add({"net/2/model.safetensors": weights(10)})
    server.load("net")
    assert answer(server, "net")["y"] == [50, 90]


def test_a_function_of_the_weights_gives_outputs_by_name(repository: Repository, server: TritonServer) -> None:
    """Taken as the configuration says: its names, its types; others are left out."""
    add(repository, "named", "net.py:make", X, Y, SUM, v1=weights(2, filler_bytes=1000))
    repository.add({"named/1/net.py": NET_PY})  # beside the weights
    server.load("named")
    assert answer(server, "named") == {"y": [10, 18], "sum": [sum(ramp(1000))]}


def test_strings_and_booleans(repository: Repository, server: TritonServer) -> None:
    blocks = [
        f'{kind} {{ name: "{name}" data_type: TYPE_{data} dims: [ 2 ] }}'
        for kind, name, data in (
            ("input", "text", "STRING"), ("input", "flag", "BOOL"), ("output", "again", "STRING"),
            ("output", "not", "BOOL"),
        )
    ]  # fmt: skip
    add(repository, "echo", "net.py:echo", *blocks, v1=weights(1))
    repository.add({"echo/net.py": NET_PY})
    server.load("echo")
    got = server.infer("echo", {"text": ("BYTES", [2], ["a", "ß"]), "flag": ("BOOL", [2], [True, False])})
    assert got == {"again": ["a", "ß"], "not": [False, True]}


def test_a_transformers_model_answers_as_the_library_itself(
    repository: Repository, server: TritonServer, minilm_dir: Path, tmp_path: Path
) -> None:
    """The real all-MiniLM-L6-v2, made a repository by `mfs triton init`."""
    import torch
    from transformers import AutoModel

    from mfs.triton import Interface, write_repository

    interface = Interface(computes=None, inputs=(), outputs=(), max_batch_size=0)
    write_repository(minilm_dir, tmp_path / "r", name="minilm", version=1, interface=interface, link=True)
    found = {str(path.relative_to(tmp_path / "r")): path.read_bytes() for path in (tmp_path / "r").rglob("*.*")}
    repository.add(found)
    server.load("minilm")
    tokens, mask = [101, 7592, 2088, 102, 101, 2204, 102, 0], [1, 1, 1, 1, 1, 1, 1, 0]
    got = server.infer(
        "minilm",
        {"input_ids": ("INT64", [2, 4], tokens), "attention_mask": ("INT64", [2, 4], mask)},
    )
    with torch.inference_mode():
        model = AutoModel.from_pretrained(minilm_dir)
        expected = model(torch.tensor(tokens).view(2, 4), torch.tensor(mask).view(2, 4)).last_hidden_state
    answered = np.array(got["last_hidden_state"], np.float32).reshape(expected.shape)
    np.testing.assert_allclose(answered, expected.numpy(), atol=1e-5)


class TestRefusals:
    """Each is a failed load with one line that says what to do; a request that fails is answered with its error."""

    @pytest.mark.parametrize(
        ("computes", "said"),
        [
            (None, r"parameter \\\"model\\\" is ''"),
            ("net.py", "expected what computes"),
            ("net.py:Gone", "has no 'Gone'"),
            ("gone.py:Net", "no gone.py in"),
            ("../net.py:Net", "must lie in the model's directory"),
            ("no_such_module:Net", "no module 'no_such_module'"),
            ("net.py:Unfit", "do not fit: 2 of its tensors are not in the file"),
            ("net.py:nothing", "returned int, expected something to call"),
        ],
    )
    def test_what_computes(self, repository: Repository, server: TritonServer, computes: str | None, said: str) -> None:
        add(repository, "refused", computes, v1=weights(1))
        repository.add({"refused/net.py": NET_PY})
        with pytest.raises(TritonError) as caught:
            server.load("refused")
        assert said.replace("\\", "") in caught.value.message.replace("\\", "")

    def test_a_damaged_file(self, repository: Repository, server: TritonServer) -> None:
        """Bytes missing at the end: refused at load, not met by an inference."""
        add(repository, "damaged", "net.py:Net", v1=weights(1)[:-4])
        repository.add({"damaged/net.py": NET_PY})
        with pytest.raises(TritonError, match="damaged version 1"):
            server.load("damaged")

    def test_no_weights(self, repository: Repository, server: TritonServer) -> None:
        repository.add({"empty/config.pbtxt": config("net.py:Net"), "empty/net.py": NET_PY, "empty/1/note.txt": b"x"})
        with pytest.raises(TritonError, match=r"no \.safetensors file"):
            server.load("empty")

    def test_a_request(self, repository: Repository, server: TritonServer) -> None:
        add(repository, "broken", "net.py:broken", v1=weights(1))
        repository.add({"broken/net.py": NET_PY})
        server.load("broken")
        with pytest.raises(TritonError, match="no good numbers"):
            answer(server, "broken")
        assert server.is_model_ready("broken")


class TestSharing:
    FILLER = 20 * MIB
    """A tensor from 16 MiB on has memory of its own, which all that hold its content share."""

    def held(self, socket_path: Path) -> Mapping[str, Any]:
        (device,) = ask({"op": "status"}, socket_path=str(socket_path))["devices"]
        return {**device, "used_bytes": device["arena_bytes"] - device["arena_free_bytes"]}

    def test_instances_and_versions_share_one_copy(
        self, repository: Repository, weight_server: ServerProcess, server: TritonServer, socket_path: Path
    ) -> None:
        """Two instances of two versions that differ in one small layer: a little more memory than one file."""
        blocks = (X, Y, SUM, "version_policy: { all { } }", "instance_group [ { count: 2 } ]")
        add(
            repository, "twins", "net.py:make", *blocks,
            v1=weights(1, filler_bytes=self.FILLER), v2=weights(2, filler_bytes=self.FILLER),
        )  # fmt: skip
        repository.add({"twins/net.py": NET_PY})
        server.load("twins")
        total = int(np.frombuffer(ramp(self.FILLER), np.uint8).sum(dtype=np.int64))
        for version in (1, 2):
            assert answer(server, "twins", version) == {"y": [5 * version, 9 * version], "sum": [total]}
        held = self.held(socket_path)
        assert sum(model["leases"] for model in held["models"]) == 4
        assert self.FILLER < held["used_bytes"] < self.FILLER * 1.5
        server.unload("twins")
        wait_for(lambda: sum(m["leases"] for m in self.held(socket_path)["models"]) == 0, "the leases' end")

    def test_a_swap_back_moves_nothing_and_weights_outlive_the_model(
        self, repository: Repository, weight_server: ServerProcess, server: TritonServer, socket_path: Path
    ) -> None:
        add(repository, "again", "net.py:make", X, Y, SUM, v1=weights(3, filler_bytes=self.FILLER))
        repository.add({"again/net.py": NET_PY})
        for _ in range(2):
            server.load("again")
            assert answer(server, "again")["y"] == [15, 27]
            server.unload("again")
        assert len(self.held(socket_path)["models"]) == 1

    def test_without_a_server_each_instance_loads_its_own_and_says_so(
        self, repository: Repository, server: TritonServer
    ) -> None:
        add(repository, "alone", "net.py:Net", v1=weights(4))
        repository.add({"alone/net.py": NET_PY})
        server.load("alone")
        assert answer(server, "alone")["y"] == [20, 36]
        assert "this instance's own (no gpuload server)" in server.log

    def test_a_model_too_large_for_the_server_is_loaded_without_it(
        self, repository: Repository, weight_server: ServerProcess, server: TritonServer
    ) -> None:
        add(repository, "large", "net.py:make", X, Y, SUM, v1=weights(1, filler_bytes=66 * MIB))
        repository.add({"large/net.py": NET_PY})
        server.load("large")
        assert answer(server, "large")["y"] == [5, 9]
        assert "not shared: " in server.log
        server.unload("large")


def test_the_command_says_what_is_missing_in_tritons_python(tmp_path: Path) -> None:
    """The installed file in a Python without gpuload: one error that names the Python and what to install."""
    import subprocess
    import sys

    path = install_backend(tmp_path)
    done = subprocess.run([sys.executable, "-I", "-S", str(path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "backend gpuload: no module 'gpuload' in the Python that Triton runs" in done.stderr
    assert json.dumps(sys.prefix)[1:-1] in done.stderr or sys.base_prefix in done.stderr

"""`mfs triton backend` and `mfs triton init`: what they write, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.conftest import Mfs
from tests.servers.triton import TritonServer
from tests.triton.conftest import Serve

SCORER = "def make(weights):\n    return lambda x: x * weights['w']\n"
INTERFACE = ("--model", "net.py:make", "--input", "x:FP32:2", "--output", "y:FP32:2")


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    """A folder with weights and the code that computes with them."""
    folder = tmp_path / "scorer"
    folder.mkdir()
    save_file({"w": np.array([2, 3], np.float32)}, str(folder / "model.safetensors"))
    (folder / "net.py").write_text(SCORER)
    return folder


def test_both_commands_and_the_server_make_a_served_model(mfs: Mfs, scorer: Path, tmp_path: Path, serve: Serve) -> None:
    """From a folder to checked numbers, by the commands alone; then a second version beside the first."""
    (tmp_path / "backends").mkdir()
    installed = mfs.json("triton", "backend", tmp_path / "backends")
    assert installed == {"backend": "gpuload", "path": f"{tmp_path}/backends/gpuload/model.py"}
    made = mfs.json("triton", "init", scorer, tmp_path / "repo", *INTERFACE)
    assert made["files"] == [f"{tmp_path}/repo/scorer/1/{name}" for name in ("model.safetensors", "net.py")]
    assert made["config_written"]
    server: TritonServer = serve(
        tmp_path / "repo", "--model-control-mode=explicit", "--load-model=scorer",
        backends={"gpuload": Path(installed["path"]).parent},
    )  # fmt: skip
    assert server.infer("scorer", {"x": ("FP32", [2], [10, 10])}) == {"y": [20, 30]}
    save_file({"w": np.array([4, 5], np.float32)}, str(scorer / "model.safetensors"))
    made = mfs.json("triton", "init", scorer, tmp_path / "repo", "--version", "2")
    assert not made["config_written"]
    server.load("scorer")
    assert server.infer("scorer", {"x": ("FP32", [2], [10, 10])}) == {"y": [40, 50]}
    assert sorted(path.name for path in (tmp_path / "repo").iterdir()) == ["scorer"]
    assert sorted(path.name for path in (tmp_path / "repo/scorer").iterdir()) == ["1", "2", "config.pbtxt"]


def test_links_instead_of_copies(mfs: Mfs, scorer: Path, tmp_path: Path) -> None:
    mfs("triton", "init", scorer, tmp_path / "repo", "--link", *INTERFACE)
    link = tmp_path / "repo/scorer/1/model.safetensors"
    assert link.is_symlink()
    assert link.resolve() == scorer / "model.safetensors"


@pytest.mark.parametrize(
    ("architecture", "batch", "dims"),
    [
        ("BertModel", 0, "[ -1, -1, 8 ]"),
        ("BertModel", 4, "[ -1, 8 ]"),
        ("BertForSequenceClassification", 0, "[ -1, 3 ]"),
        ("LlamaForCausalLM", 0, "[ -1, -1, 99 ]"),
    ],
)
def test_a_transformers_folder_says_its_interface_itself(
    mfs: Mfs, scorer: Path, tmp_path: Path, architecture: str, batch: int, dims: str
) -> None:
    described = {"architectures": [architecture], "hidden_size": 8, "vocab_size": 99, "id2label": {0: 0, 1: 1, 2: 2}}
    (scorer / "config.json").write_text(json.dumps(described))
    made = mfs.json("triton", "init", scorer, tmp_path / "repo", "--max-batch-size", batch)
    text = Path(made["config"]).read_text()
    assert f'"transformers:{architecture}"' in text
    assert f"TYPE_FP32 dims: {dims}" in text
    assert f"{tmp_path}/repo/scorer/1/config.json" in made["files"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "give --model, --input and --output"),
            (
                ("--model", "net.py", "--input", "x:FP32:2", "--output", "y:FP32:2"),
                "expected module:name or file.py:name",
            ),
            (("--model", "gone.py:make", *INTERFACE[2:]), "no file gone.py in"),
            ((*INTERFACE, "--input", "x:FP33:2"), "expected NAME:TYPE:DIMS"),
            ((*INTERFACE, "--input", "x:FP32:0"), "expected NAME:TYPE:DIMS"),
            ((*INTERFACE, "--name", "../up"), "model name '../up'"),
            ((*INTERFACE, "--name", ".."), "model name '..'"),
        ],
    )
    def test_usage(self, mfs: Mfs, scorer: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
        assert said in mfs.error("triton", "init", scorer, tmp_path / "repo", *words, status=2)
        assert not (tmp_path / "repo" / "scorer").exists()

    def test_a_version_that_exists_is_left_alone(self, mfs: Mfs, scorer: Path, tmp_path: Path) -> None:
        mfs("triton", "init", scorer, tmp_path / "repo", *INTERFACE)
        assert "exists: choose another --version" in mfs.error(
            "triton", "init", scorer, tmp_path / "repo", *INTERFACE, status=2
        )

    def test_folders_that_cannot_be(self, mfs: Mfs, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "holds no .safetensors file" in mfs.error("triton", "init", tmp_path / "empty", tmp_path / "repo")
        assert "is no directory" in mfs.error("triton", "init", tmp_path / "gone", tmp_path / "repo")
        assert "is no directory" in mfs.error("triton", "backend", tmp_path / "gone", status=2)

    def test_another_backend_in_the_place_is_left_alone(self, mfs: Mfs, tmp_path: Path) -> None:
        (tmp_path / "gpuload").mkdir()
        (tmp_path / "gpuload" / "model.py").write_text("# mine\n")
        assert "is another's backend" in mfs.error("triton", "backend", tmp_path, status=2)
        assert (tmp_path / "gpuload" / "model.py").read_text() == "# mine\n"

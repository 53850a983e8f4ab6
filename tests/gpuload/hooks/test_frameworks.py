"""Unmodified frameworks as installed, in hooked processes: the same bits, and every one of them from us."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuload.testing import ServerThread, random_tensors, write
from tests.gpuload.hooks.conftest import Outcome, run_program, warmed

Plainly = Callable[..., Any]
Program = Callable[..., Outcome]

FRAMEWORKS = ("torch", "transformers", "accelerate", "sentence_transformers", "diffusers")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """`run_program`, hooked, where the frameworks are imported already."""
    names = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None]
    with warmed(tmp_path_factory.mktemp("warm"), *names, values=["1"]) as run:
        yield functools.partial(run_program, run=run)


def assert_served(outcome: Any, expected: Any) -> None:
    """Equal findings, and not one tensor that the library read itself."""
    assert outcome.found == expected
    assert outcome.counts["served"] > 0
    assert outcome.counts["left"] == 0, outcome.stderr
    assert "gpuload" not in outcome.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Several types, shapes and alignments."""
    return write(
        tmp_path / "a.safetensors",
        {
            **random_tensors(1, {"matrix": (64, 200), "small": (3,), "other": (5, 2)}),
            **random_tensors(2, {"float": (9, 31), "scalar": (), "empty": (0, 4)}, "F32"),
            **random_tensors(3, {"bytes": (1001,)}, "U8"),
            **random_tensors(4, {"eight": (16, 3)}, "F8_E4M3"),
        },
    )


@pytest.fixture
def transformers() -> Any:
    """The library, which the other frameworks import too; it refuses a safetensors that is too old for it."""
    return pytest.importorskip("transformers", exc_type=ImportError)


@pytest.fixture
def bert(tmp_path: Path, transformers: Any) -> Path:
    """A small BERT in several shards."""
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert", max_shard_size="20KB")
    assert len(list((tmp_path / "bert").glob("*.safetensors"))) > 2
    return tmp_path / "bert"


def test_every_door_of_safetensors(program: Program, resident: ServerThread, file: Path, plainly: Plainly) -> None:
    outcome = program("safetensors_all", file, socket_path=resident.socket_path)
    assert_served(outcome, plainly("safetensors_all", file))
    assert resident.gauges()["models"] == 1


def test_what_was_loaded_is_written_again_whole_and_alone(
    program: Program, resident: ServerThread, file: Path, tmp_path: Path, plainly: Plainly
) -> None:
    """Each tensor has a storage of its own: save_file takes them, and torch.save of one does not write them all."""
    outcome = program(
        "safetensors_written_again", file, tmp_path / "copy1.safetensors", socket_path=resident.socket_path
    )
    assert_served(outcome, plainly("safetensors_written_again", file, tmp_path / "copy2.safetensors"))
    assert outcome.found["same"]


def test_transformers_from_shards(program: Program, resident: ServerThread, bert: Path, plainly: Plainly) -> None:
    outcome = program("transformers_model", bert, socket_path=resident.socket_path)
    assert_served(outcome, plainly("transformers_model", bert))
    assert resident.gauges()["models"] == len(list(bert.glob("*.safetensors")))


@pytest.mark.usefixtures("transformers")
def test_diffusers_pipeline(program: Program, resident: ServerThread, tmp_path: Path, plainly: Plainly) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    outcome = program("diffusers_pipeline", tmp_path / "pipeline", socket_path=resident.socket_path)
    assert_served(outcome, plainly("diffusers_pipeline", tmp_path / "pipeline"))


def test_accelerate_loads_dispatches_and_offloads(
    program: Program, resident: ServerThread, bert: Path, tmp_path: Path, plainly: Plainly
) -> None:
    pytest.importorskip("accelerate")
    outcome = program("accelerate_checkpoint", bert, tmp_path / "o1", socket_path=resident.socket_path)
    assert_served(outcome, plainly("accelerate_checkpoint", bert, tmp_path / "o2"))
    assert len({digest for _, _, digest in outcome.found["out"].values()}) == 1, "all three models say the same"


@pytest.mark.usefixtures("transformers")
def test_sentence_transformers_embeds_the_same(
    program: Program, resident: ServerThread, minilm_dir: Path, plainly: Plainly
) -> None:
    pytest.importorskip("sentence_transformers")
    outcome = program("sentence_embedding", minilm_dir, socket_path=resident.socket_path)
    assert_served(outcome, plainly("sentence_embedding", minilm_dir))


def test_dataloader_workers_forked_from_a_hooked_process(
    program: Program, resident: ServerThread, file: Path, plainly: Plainly
) -> None:
    outcome = program("forked", file, socket_path=resident.socket_path)
    assert_served(outcome, plainly("forked", file))


def test_spawned_children_are_hooked_too(
    program: Program, resident: ServerThread, file: Path, plainly: Plainly
) -> None:
    outcome = program("spawned", file, socket_path=resident.socket_path)
    expected = plainly("spawned", file)
    assert outcome.found == expected
    assert outcome.found["child"] == 0
    assert resident.gauges()["models"] == 1


def test_threads_load_side_by_side(program: Program, resident: ServerThread, file: Path, plainly: Plainly) -> None:
    outcome = program("threads", file, socket_path=resident.socket_path)
    assert_served(outcome, plainly("threads", file))

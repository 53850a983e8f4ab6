"""Small checkpoints in every format that the frameworks' tests read, made by the frameworks themselves.

Run as a program (`python -m tests.frameworks.models FOLDER MINILM`), so that none of them is imported into pytest,
where a warning of theirs would be an error.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def sharded(folder: Path, minilm: Path) -> None:
    """The real all-MiniLM-L6-v2 in shards; its word embeddings alone are 47 MB."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(minilm).save_pretrained(folder, max_shard_size="12MB")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 4


def diffusers_pipeline(folder: Path) -> None:
    """A DiT pipeline of two weight files and a scheduler, a few MB."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=8)
    DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler()).save_pretrained(folder)


def onnx_external(folder: Path) -> None:
    """A chain of matrix products whose weights stand in a file of their own, 16 MB."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(2)
    width, depth = 1024, 4
    weights = [
        numpy_helper.from_array(random.normal(0, 0.03, (width, width)).astype(np.float32), f"w{i}")
        for i in range(depth)
    ]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(depth)]
    shape = [1, width]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{depth}", TensorProto.FLOAT, shape)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0)


def gguf(folder: Path) -> None:
    """A GGUF file as llama.cpp's converters write them: metadata, then aligned tensors; 17 MB."""
    import numpy as np
    from gguf import GGUFWriter

    random = np.random.default_rng(3)
    folder.mkdir()
    writer = GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(1024)
    writer.add_token_list([f"token {i}" for i in range(3000)])
    for i in range(8):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", random.normal(size=(512, 1024)).astype(np.float32))
    writer.add_tensor("output.weight", random.normal(size=(123, 1024)).astype(np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def numpy_arrays(folder: Path) -> None:
    """An .npy of 24 MB and the same bytes without a header."""
    import numpy as np

    folder.mkdir()
    rows = np.random.default_rng(4).normal(size=(3000, 1024)).astype(np.float64)
    np.save(folder / "rows.npy", rows)
    rows.tofile(folder / "rows.raw")


def torch_file(folder: Path) -> None:
    """A state dict as `torch.save` writes it (a zip of storages), 16 MB."""
    import torch

    torch.manual_seed(5)
    folder.mkdir()
    torch.save({f"layer.{i}.weight": torch.randn(1024, 512) for i in range(8)}, folder / "model.pt")


def dispatched(folder: Path) -> None:
    """Two shards and an index of a plain module, for accelerate's big-model dispatch; 17 MB."""
    import json

    import torch
    from safetensors.torch import save_file

    torch.manual_seed(6)
    folder.mkdir()
    index = {}
    for shard in range(2):
        name = f"model-{shard + 1:05d}-of-00002.safetensors"
        tensors = {}
        for layer in range(shard * 2, shard * 2 + 2):
            tensors[f"{layer}.weight"] = torch.randn(1024, 1024) / 32
            tensors[f"{layer}.bias"] = torch.randn(1024)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main(folder: Path, minilm: Path) -> None:
    shutil.copytree(minilm, folder / "minilm", ignore=shutil.ignore_patterns("__pycache__"))
    sharded(folder / "sharded", minilm)
    for make in (diffusers_pipeline, onnx_external, gguf, numpy_arrays, torch_file, dispatched):
        make(folder / make.__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

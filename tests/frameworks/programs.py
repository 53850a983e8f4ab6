"""What users' programs do with a model folder, each as its framework's own documentation shows it.

`python -m tests.frameworks.programs NAME FOLDER...` runs one of them on each folder and prints one JSON value a line:
what it computed, digests of every tensor it read. The tests run it on the mount and on local disk and compare.
Anything imported here at the top would be imported by all; each program imports its own framework.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
"""Set before a framework is imported. Always one thread, or sums come out in another order."""
TEXTS = ["weights where they run", "a lazy mount"]


def _digest(arrays: Iterable[tuple[str, Any]]) -> str:
    """Of names, types, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _torch_digest(tensors: dict[str, Any]) -> str:
    import torch

    return _digest((name, value.detach().contiguous().view(torch.uint8).numpy()) for name, value in tensors.items())


# -- safetensors


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def safetensors_safe_open(folder: Path) -> Any:
    """`safe_open`, tensor by tensor, through its mapping."""
    from safetensors import safe_open

    found = {}
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return _torch_digest(found)


def safetensors_shuffled(folder: Path) -> Any:
    """All shards open, tensors taken in an order that has nothing to do with the files', as some loaders do."""
    from contextlib import ExitStack

    from safetensors import safe_open

    found = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(shard, framework="pt")) for shard in _shards(folder)]
        places = [(name, file) for file in files for name in file.keys()]  # noqa: SIM118
        random.Random(8).shuffle(places)
        for name, file in places:
            found[name] = file.get_tensor(name).clone()
    return _torch_digest(found)


def safetensors_load_file(folder: Path) -> Any:
    from safetensors.torch import load_file

    return _torch_digest({name: tensor for shard in _shards(folder) for name, tensor in load_file(shard).items()})


def safetensors_pread(folder: Path) -> Any:
    """The backend that reads instead of mapping."""
    from safetensors.torch import load_file

    shards = [load_file(shard, backend="pread") for shard in _shards(folder)]
    return _torch_digest({name: tensor for shard in shards for name, tensor in shard.items()})


def safetensors_numpy(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return [_digest(load_file(shard).items()) for shard in _shards(folder)]


def safetensors_slices(folder: Path) -> Any:
    """A tensor-parallel rank's share: a quarter of the rows of each matrix, and nothing else."""
    from safetensors import safe_open

    taken = {}
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if len(part.get_shape()) == 2:
                    rows = part.get_shape()[0]
                    taken[name] = part[rows // 4 : rows // 2]
    return _torch_digest(taken)


def safetensors_header_sweep(folder: Path) -> Any:
    """All names and shapes of all shards, no tensor: what planners and loaders do first."""
    from safetensors import safe_open

    found = {}
    for shard in _shards(folder):
        with safe_open(shard, framework="numpy") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


# -- Hugging Face


def _embed(tokenizer: Any, model: Any) -> Any:
    import torch

    words = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        embedding = model.eval()(**words).last_hidden_state.mean(dim=1)
    return {"embedding": _digest([("embedding", embedding.numpy())]), "weights": _torch_digest(model.state_dict())}


def transformers_from_pretrained(folder: Path | str) -> Any:
    from transformers import AutoModel, AutoTokenizer

    return _embed(AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder))


def transformers_hub_cache(folder: Path) -> Any:
    """By its name on the Hub, found in the cache tree `folder` that HF_HOME or HF_HUB_CACHE names."""
    assert str(folder) in (os.environ.get("HF_HOME"), os.environ.get("HF_HUB_CACHE"))
    return transformers_from_pretrained("sentence-transformers/all-MiniLM-L6-v2")


def sentence_transformers(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return _digest([("embedding", SentenceTransformer(str(folder), device="cpu").encode(TEXTS))])


def diffusers_pipeline(folder: Path) -> Any:
    import torch
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline([1], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
    weights = {f"transformer.{k}": v for k, v in pipeline.transformer.state_dict().items()}
    weights |= {f"vae.{k}": v for k, v in pipeline.vae.state_dict().items()}
    return {"image": _digest([("image", image)]), "weights": _torch_digest(weights)}


def accelerate_dispatch(folder: Path) -> Any:
    """Big-model dispatch: half of the layers in memory, half left on disk until they are needed."""
    import tempfile

    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
    device_map = {"0": "cpu", "1": "disk", "2": "cpu", "3": "disk"}
    with tempfile.TemporaryDirectory() as offload, torch.no_grad():
        model = load_checkpoint_and_dispatch(model, str(folder), device_map=device_map, offload_folder=offload)
        return [_digest([("out", model(torch.full((2, 1024), fill)).numpy())]) for fill in (1.0, 2.0)]


# -- others


def onnx_external_data(folder: Path) -> Any:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x0": np.ones((1, 1024), np.float32)})
    return _digest([("out", out)])


def gguf_reader(folder: Path) -> Any:
    """The `gguf` package: a numpy memmap and views into it."""
    from gguf import GGUFReader

    reader = GGUFReader(folder / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"]
    words = [bytes(tokens.parts[index]).decode() for index in tokens.data]
    return {"tokens": words[:3] + words[-3:], "tensors": _digest((t.name, t.data) for t in reader.tensors)}


def llama_cpp_mapping(folder: Path) -> Any:
    """As llama.cpp maps a model: the head by plain reads, then the whole file shared, populated and wanted at once."""
    with open(folder / "model.gguf", "rb") as file:
        head = file.read(4096)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    with mapped:
        mapped.madvise(mmap.MADV_WILLNEED)
        assert mapped[:4096] == head
        return hashlib.sha256(mapped).hexdigest()


def numpy_memmap(folder: Path) -> Any:
    """Rows in an order that has none, and then all of them."""
    import numpy as np

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    raw = np.memmap(folder / "rows.raw", np.float64, mode="r").reshape(rows.shape)
    order = np.random.default_rng(7).permutation(len(rows))[:200]
    assert np.array_equal(rows[order], raw[order])
    return [_digest([("some", rows[order])]), _digest([("all", np.ascontiguousarray(raw))])]


def torch_load_mmap(folder: Path) -> Any:
    import torch

    return _torch_digest(torch.load(folder / "model.pt", mmap=True, weights_only=True))


def torch_load(folder: Path) -> Any:
    import torch

    return _torch_digest(torch.load(folder / "model.pt", weights_only=True))


# -- loaders that replace safetensors' own


def fastsafetensors_nogds(folder: Path) -> Any:
    """Its reader without GPUDirect: threads that pread 16 MiB blocks, O_DIRECT where the file system takes it."""
    from fastsafetensors import SafeTensorsFileLoader

    files = [str(file) for file in _shards(folder)]
    loader = SafeTensorsFileLoader(None, "cpu", nogds=True, framework="pytorch")
    try:
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        try:
            return _torch_digest({name: buffers.get_tensor(name) for name in loader.get_keys()})
        finally:
            buffers.close()
    finally:
        loader.close()


def instanttensor_cuda(folder: Path) -> Any:
    """Its ring of page-locked buffers, filled by io_uring or AIO with O_DIRECT in 8 MiB reads. Needs a GPU."""
    from instanttensor import safe_open

    files = [str(file) for file in _shards(folder)]
    with safe_open(files, framework="pt", device="cuda:0") as opened:
        return _torch_digest({name: tensor.cpu() for name, tensor in opened.tensors()})


_ALL = (
    safetensors_safe_open, safetensors_shuffled, safetensors_load_file, safetensors_pread, safetensors_numpy,
    safetensors_slices, safetensors_header_sweep, transformers_from_pretrained, transformers_hub_cache,
    sentence_transformers, diffusers_pipeline, accelerate_dispatch, onnx_external_data, gguf_reader, llama_cpp_mapping,
    numpy_memmap, torch_load_mmap, torch_load, fastsafetensors_nogds, instanttensor_cuda,
)  # fmt: skip
PROGRAMS: dict[str, Callable[[Path], Any]] = {program.__name__: program for program in _ALL}


def main(name: str, folders: list[str]) -> None:
    os.environ |= ENVIRONMENT
    warnings.simplefilter("ignore")  # theirs to mend
    for folder in folders:
        print("result:" + json.dumps(PROGRAMS[name](Path(folder))), flush=True)
    os._exit(0)  # to take torch apart takes 0.4 s, and tells nothing of the mount


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

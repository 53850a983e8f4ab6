"""Programs that know nothing of gpuload, as functions: the tests run each once as it is and once in a hooked process.

`main NAME ARGUMENT...` runs one and prints what it found and the hooks' counts as JSON; NAME may be MODULE:NAME, for
programs in a module beside this one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def digests(tensors: Mapping[str, Any]) -> Found:
    """name -> type, shape, length of its storage and hash of its bits."""
    import torch

    found = {}
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().contiguous().flatten()
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        found[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]
    return found


def safetensors_all(path: str) -> Found:
    """Every door of safetensors.torch."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    found: Found = {"load_file": digests(load_file(path))}
    with safe_open(path, framework="pt", device="cpu") as opened:
        names = list(opened.keys())
        found["get_tensor"] = digests({name: opened.get_tensor(name) for name in names})
        found["metadata"] = opened.metadata()
        if hasattr(opened, "get_tensors"):
            found["get_tensors"] = digests(opened.get_tensors())
        for name in names:
            piece = opened.get_slice(name)
            found["slices " + name] = [piece.get_shape(), piece.get_dtype()]
            if len(piece.get_shape()) == 2:
                found["slices " + name] += [
                    digests({"": piece[1:3]}),
                    digests({"": piece[:, 1:]}),
                    digests({"": piece[:2, :1]}),
                ]
    found["storages"] = {name: tensor.untyped_storage().nbytes() for name, tensor in load_file(path).items()}
    return found


def safetensors_written_again(path: str, copy: str) -> Found:
    """What is loaded can be written: by save_file, which refuses shared memory, and by torch.save, one tensor alone."""
    import torch
    from safetensors.torch import load_file, save_file

    loaded = load_file(path)
    save_file(loaded, copy)
    one = Path(copy + ".pt")
    torch.save(loaded["small"], one)
    return {"same": digests(load_file(copy)) == digests(loaded), "bytes": one.stat().st_size}


def transformers_model(folder: str) -> list[Found]:
    """from_pretrained in several ways, and what the model says to the same question."""
    import torch
    from transformers import AutoModel

    found = []
    ways: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"device_map": "cpu"}]
    for way in ways:
        model = AutoModel.from_pretrained(folder, **way)
        with torch.no_grad():
            out = model(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state
        found.append(digests(dict(model.state_dict()) | {"out": out}))
    return found


def diffusers_pipeline(folder: str) -> Found:
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(folder)
    return digests(dict(pipeline.unet.state_dict()))


def accelerate_checkpoint(folder: str, offload: str) -> Found:
    """A sharded checkpoint into an empty model: whole, dispatched by a map, and with a part left on the disk."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from accelerate.utils import load_checkpoint_in_model
    from transformers import AutoConfig, AutoModel

    def empty() -> Any:
        with init_empty_weights():
            return AutoModel.from_config(AutoConfig.from_pretrained(folder))

    whole = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    load_checkpoint_in_model(whole, folder)
    found: Found = {"in_model": digests(dict(whole.state_dict()))}
    dispatched = load_checkpoint_and_dispatch(empty(), folder, device_map={"": "cpu"})
    found["dispatch"] = digests(dict(dispatched.state_dict()))
    split = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    offloaded = load_checkpoint_and_dispatch(empty(), folder, device_map=split, offload_folder=offload)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        found["out"] = digests(
            {str(i): m.eval()(input_ids=ids).last_hidden_state for i, m in enumerate((whole, dispatched, offloaded))}
        )
    return found


def sentence_embedding(folder: str) -> Found:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    model = SentenceTransformer(folder, device="cpu")
    return digests({"embedding": model.encode(["weights where they run"], convert_to_tensor=True)})


def forked(path: str) -> Found:
    """DataLoader workers forked from a process that has the file open, and one that sends loaded tensors home."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader, Dataset

    opened = safe_open(path, framework="pt")
    mine = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    names = sorted(mine)

    class Files(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(names)

        def __getitem__(self, index: int) -> Any:
            name = names[index]
            return {
                "inherited tensor": mine[name],
                "inherited file": opened.get_tensor(name),
                "opened anew": load_file(path)[name],
            }

    def alone(items: list[Any]) -> Any:
        return items[0]

    loader = DataLoader(Files(), batch_size=1, num_workers=2, collate_fn=alone, multiprocessing_context="fork")
    return {name: [digests({k: t})[k] for k, t in item.items()] for name, item in zip(names, loader, strict=True)} | {
        "threads": torch.get_num_threads() > 0
    }


def spawned(path: str) -> Found:
    """A child that starts from nothing loads, and its tensors come back over a queue."""
    import multiprocessing

    import torch.multiprocessing as torch_processes

    context = torch_processes.get_context("spawn")
    queue: multiprocessing.Queue[Any] = context.Queue()
    done = context.Event()
    child = context.Process(target=_send, args=(path, queue, done))
    child.start()
    got, how = queue.get(timeout=120)
    found = {"tensors": digests(got), "child": how}
    done.set()
    child.join(60)
    return found | {"exit": child.exitcode}


def _send(path: str, queue: Any, done: Any) -> None:
    from safetensors.torch import load_file

    from gpuload.hooks.counts import counts

    loaded = load_file(path)
    queue.put((loaded, counts.left))
    done.wait(120)


def threads(path: str) -> Found:
    """Eight threads open, slice and load the same file over and over."""
    from concurrent.futures import ThreadPoolExecutor

    from safetensors import safe_open
    from safetensors.torch import load_file

    def work(turn: int) -> Found:
        with safe_open(path, framework="pt") as opened:
            sliced = {name: opened.get_slice(name)[...] for name in opened.keys()}  # noqa: SIM118
        return digests(sliced if turn % 2 else load_file(path))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(64)))
    assert all(result == results[0] for result in results)
    return results[0]


def main() -> None:
    name, *arguments = sys.argv[1:]
    place, _, name = f"programs:{name}".rpartition(":")
    module = importlib.import_module(f"{__package__}.{place.rpartition(':')[2]}")
    program: Callable[..., Any] = getattr(module, name)
    found = program(*arguments)
    from gpuload.hooks.counts import counts

    tally = {"served": counts.served, "streamed": counts.streamed, "left": counts.left}
    print(json.dumps({"found": found, "counts": tally}))


if __name__ == "__main__":
    main()

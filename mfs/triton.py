"""Files for Triton: its backend for plain safetensors, and minimal model repositories. No network, no torch.

The backend itself is `gpuload.hooks.triton`; what is installed only imports it, so that an upgrade of the package is
one of the backend.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfs.errors import AccessError, IntegrityError, NotFoundError, UsageError

BACKEND = "gpuload"
_MARK = "# Installed by `mfs triton backend`."
_BACKEND_MODEL = f"""\
{_MARK} Serves safetensors through gpuload; see `mfs triton backend --help`.
import sys

try:
    from gpuload.hooks.triton import TritonPythonModel  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"backend gpuload: no module {{error.name!r}} in the Python that Triton runs, {{sys.version.split()[0]}} in "
        f"{{sys.prefix}}: install mfs with the extra 'gpuload' there, or put another python3 first on the server's PATH"
    ) from None
"""

_TYPES = frozenset(
    [f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
    + ["BOOL", "FP16", "FP32", "FP64", "BF16", "STRING"]
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_CONFIG_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Interface:
    """What a configuration must say of a model; None and () leave it to the model's own config.json."""

    computes: str | None
    """The backend's parameter "model"."""
    inputs: Sequence[str]
    """Each 'NAME:TYPE:DIMS'."""
    outputs: Sequence[str]
    max_batch_size: int


@dataclass(frozen=True)
class Written:
    """What `write_repository` made."""

    model: str
    path: Path
    """The version's directory."""
    config: Path
    is_config_new: bool
    files: list[Path]
    """Of the version."""
    bytes: int
    """Of those files."""


def install_backend(directory: Path) -> Path:
    """Put the backend into Triton's backend directory and return its file.

    Raises: UsageError if that is no directory, or another's file stands there; AccessError.
    """
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is no directory: expected Triton's backend directory, such as /opt/tritonserver/backends"
        )
    target = directory / BACKEND / "model.py"
    try:
        if target.exists() and not target.read_text(errors="replace").startswith(_MARK):
            raise UsageError(f"{target} is another's backend: remove it first, or choose another directory")
        target.parent.mkdir(exist_ok=True)
        draft = target.with_name(f".model.py.{os.getpid()}")
        draft.write_text(_BACKEND_MODEL)
        draft.replace(target)
    except OSError as error:
        raise AccessError(f"cannot write {target}: {error.strerror}") from None
    return target


def write_repository(
    model_dir: Path, repository: Path, *, name: str | None, version: int, interface: Interface, link: bool
) -> Written:
    """Copy (or link) a model folder into a repository as one version, with a configuration if it has none yet.

    Raises: UsageError, NotFoundError if the folder holds no safetensors, IntegrityError for a config.json that is none,
        AccessError.
    """
    if not model_dir.is_dir():
        raise NotFoundError(f"{model_dir} is no directory: expected a folder with .safetensors files")
    name = name or model_dir.resolve().name
    if not _NAME.fullmatch(name):
        raise UsageError(f"model name {name!r}: expected letters, digits, '_', '.', '-'; choose one with --name")
    model, target = repository / name, repository / name / str(version)
    if target.exists():
        raise UsageError(f"{target} exists: choose another --version, or remove it")
    sources = _sources(model_dir, interface.computes)
    config = model / "config.pbtxt"
    is_config_new = not config.exists()
    text = _config_text(model_dir, interface) if is_config_new else ""
    try:
        repository.mkdir(parents=True, exist_ok=True)
        _publish(sources, model, target, text, link=link)
    except OSError as error:
        raise AccessError(f"cannot write {error.filename or target}: {error.strerror}") from None
    files = [target / source.name for source in sources]
    return Written(name, target, config, is_config_new, files, sum(source.stat().st_size for source in sources))


def _publish(sources: Sequence[Path], model: Path, target: Path, config: str, *, link: bool) -> None:
    """Make everything beside the repository and rename it into place: Triton may be polling."""
    # Not in the repository: every directory there is a model; not in the model: every entry there is looked at.
    repository = model.parent.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{repository.name}-", dir=repository.parent) as draft:
        version = Path(draft) / model.name / target.name
        version.mkdir(parents=True)
        for source in sources:
            if link:
                (version / source.name).symlink_to(source.resolve())
            else:
                shutil.copy(source, version / source.name)
        if config:
            (version.parent / "config.pbtxt").write_text(config)
        if not model.exists():
            version.parent.rename(model)
            return
        if config:
            (version.parent / "config.pbtxt").rename(model / "config.pbtxt")
        version.rename(target)


def _sources(model_dir: Path, computes: str | None) -> list[Path]:
    """The files a version needs."""
    found = sorted(model_dir.glob("*.safetensors"))
    if not found:
        raise NotFoundError(f"{model_dir} holds no .safetensors file")
    found += sorted(model_dir.glob("*.safetensors.index.json"))
    found += [path for path in (model_dir / "config.json", *sorted(model_dir.glob("*.py"))) if path.is_file()]
    place = (computes or "").rpartition(":")[0]
    if place.endswith(".py") and model_dir / place not in found:
        raise UsageError(f"--model {computes}: no file {place} in {model_dir}")
    return found


def _config_text(model_dir: Path, interface: Interface) -> str:
    computes, inputs, outputs = interface.computes, list(interface.inputs), list(interface.outputs)
    if computes is None or not inputs or not outputs:
        known = _transformers_interface(model_dir, batched=interface.max_batch_size > 0)
        if known is None:
            raise UsageError(
                f"{model_dir} does not say what computes with its weights (no config.json with known 'architectures'): "
                "give --model, --input and --output"
            )
        computes, inputs, outputs = computes or known[0], inputs or known[1], outputs or known[2]
    if not all(computes.rpartition(":")[::2]):
        raise UsageError(f"--model {computes!r}: expected module:name or file.py:name")
    blocks = [_block("input", text) for text in inputs] + [_block("output", text) for text in outputs]
    return "\n".join(
        [
            f'backend: "{BACKEND}"', f"max_batch_size: {interface.max_batch_size}", *blocks,
            f'parameters {{ key: "model" value {{ string_value: {json.dumps(computes)} }} }}', "",
        ]
    )  # fmt: skip


def _block(kind: str, text: str) -> str:
    name, _, rest = text.partition(":")
    data_type, _, dims = rest.partition(":")
    lengths = dims.split(",")
    if (
        not _NAME.fullmatch(name)
        or data_type not in _TYPES
        or not all(re.fullmatch(r"-1|[1-9]\d*", n) for n in lengths)
    ):
        raise UsageError(
            f"--{kind} {text!r}: expected NAME:TYPE:DIMS such as x:FP32:16 (types: {', '.join(sorted(_TYPES))})"
        )
    return f'{kind} {{ name: "{name}" data_type: TYPE_{data_type} dims: [ {", ".join(lengths)} ] }}'


def _transformers_interface(model_dir: Path, *, batched: bool) -> tuple[str, list[str], list[str]] | None:
    """What computes, its inputs and outputs, of a transformers model whose kind is known."""
    path = model_dir / "config.json"
    if not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_bytes()[:_CONFIG_BYTES_MAX])
        architecture = str(config["architectures"][0])
    except (KeyError, IndexError, TypeError):
        return None
    except ValueError as error:
        raise IntegrityError(f"{path} is no JSON: {error}") from None
    labels = config.get("num_labels") or len(config.get("id2label") or ()) or 2
    hidden, words = config.get("hidden_size"), config.get("vocab_size")
    kinds: list[tuple[str, str, list[int]]] = []
    for ending, output, lengths in (
        ("ForSequenceClassification", "logits", [labels]),
        ("ForTokenClassification", "logits", [-1, labels]),
        ("ForMaskedLM", "logits", [-1, words]),
        ("ForCausalLM", "logits", [-1, words]),
        ("Model", "last_hidden_state", [-1, hidden]),
    ):
        if architecture.endswith(ending) and all(isinstance(length, int) for length in lengths):
            kinds.append((ending, output, lengths))
    if not kinds or not architecture.isidentifier():
        return None
    _, output, lengths = kinds[0]
    any_length = [] if batched else [-1]
    tokens = ",".join(map(str, [*any_length, -1]))
    dims = ",".join(map(str, [*any_length, *lengths]))
    inputs = [f"{name}:INT64:{tokens}" for name in ("input_ids", "attention_mask")]
    return f"transformers:{architecture}", inputs, [f"{output}:FP32:{dims}"]

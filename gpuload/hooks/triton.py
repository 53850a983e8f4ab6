"""Triton's backend "gpuload": a model directory holds safetensors and a configuration, no code and no other format.

`mfs triton backend` installs the few lines that import this; it runs in the stub process of Triton's python backend,
one per instance. The weights are whole in memory when `initialize` returns, so that a fault is a failed load and not a
model that says READY; where a `gpuload serve` answers, they are its memory: one copy for all instances, and of large
tensors one for all versions and models that have them.

The configuration's parameter "model" names what computes, as 'module:name' or 'file.py:name' (beside the weights, else
in the model's directory). The name is one of:
    a class with `from_pretrained` (transformers)   built from config.json beside the weights
    a subclass of torch.nn.Module                   built without arguments, its state is the weights
    any other callable                              called with {name: tensor}; returns what is called for each request
What comes out is called with the inputs by name, as tensors on the instance's device (strings as numpy arrays), and
returns a mapping by output name, a sequence in the configuration's order, or the one output.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's stub has it
from torch.utils.dlpack import from_dlpack

from gpuload.client.load import load_model
from gpuload.errors import AwayError, BusyError, FitError, first_error
from gpuload.moving.model_files import find_shards, left_out
from mfs.errors import AccessError, MfsError, NotFoundError, UsageError

PARAMETER = "model"

_DTYPES = {
    "TYPE_BOOL": torch.bool, "TYPE_UINT8": torch.uint8, "TYPE_INT8": torch.int8, "TYPE_INT16": torch.int16,
    "TYPE_INT32": torch.int32, "TYPE_INT64": torch.int64, "TYPE_FP16": torch.float16, "TYPE_FP32": torch.float32,
    "TYPE_FP64": torch.float64, "TYPE_BF16": torch.bfloat16,
}  # fmt: skip

_THROUGH_NUMPY = {"TYPE_STRING", "TYPE_BOOL"}
"""Types that Triton's DLPack does not know, or calls by another name."""

# Byte code written beside a model's file would change the directory, which Triton takes for a new model.
sys.dont_write_bytecode = True


class TritonPythonModel:
    """What Triton's python backend makes for each instance of each version."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load and build. Raises: TritonModelException with one line that says what is wrong."""
        self._config: dict[str, Any] = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        self._device = "cpu" if args["model_instance_kind"] == "CPU" else f"cuda:{args['model_instance_device_id']}"
        name = f"{args['model_name']} version {args['model_version']}"
        start_s = time.monotonic()
        try:
            found = resolve(self._config, folder / args["model_version"], folder)
            weights, where = load_weights(folder / args["model_version"], self._device)
            self._call = build(found, weights, folder / args["model_version"], self._device)
        except Exception as error:
            if not isinstance(error, MfsError):
                pb_utils.Logger.log_error(f"gpuload: {name}: {type(error).__name__}")
            raise pb_utils.TritonModelException(f"{name}: {_said(error)}") from error
        self._inputs = {given["name"]: given["data_type"] for given in self._config["input"]}
        self._outputs = {given["name"]: given["data_type"] for given in self._config["output"]}
        size = sum(tensor.nbytes for tensor in weights.values())
        took_s = time.monotonic() - start_s
        pb_utils.Logger.log_info(
            f"gpuload: {name}: {len(weights)} tensors, {size} bytes on {self._device}, {where}, {took_s:.3f} s"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Each request by itself; one that fails is answered with its error, and the others go on."""
        answers = []
        for request in requests:
            try:
                with torch.inference_mode():
                    given = {tensor.name(): self._taken(tensor) for tensor in request.inputs()}
                    outputs = self._named(self._call(**given))
                    answers.append(pb_utils.InferenceResponse([self._given(n, v) for n, v in outputs.items()]))
            except Exception as error:
                answers.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(_said(error))))
        return answers

    def finalize(self) -> None:
        """Let go of the weights; the server keeps its copy for the next load as long as there is room."""
        self._call = _unloaded

    def _taken(self, tensor: Any) -> Any:
        kind = self._inputs[tensor.name()]
        if kind == "TYPE_STRING":
            return tensor.as_numpy()
        taken = torch.from_numpy(tensor.as_numpy()) if kind in _THROUGH_NUMPY else from_dlpack(tensor.to_dlpack())
        return taken.to(self._device)

    def _named(self, result: Any) -> dict[str, Any]:
        if isinstance(result, Mapping):
            if missing := [name for name in self._outputs if name not in result]:
                raise UsageError(f"the model gave {sorted(map(str, result))}, not {missing[0]!r} of the configuration")
            return {name: result[name] for name in self._outputs}
        values = list(result) if isinstance(result, tuple | list) else [result]
        if len(values) != len(self._outputs):
            raise UsageError(f"the model gave {len(values)} outputs, the configuration has {len(self._outputs)}")
        return dict(zip(self._outputs, values, strict=True))

    def _given(self, name: str, value: Any) -> Any:
        kind = self._outputs[name]
        if not isinstance(value, torch.Tensor):
            return pb_utils.Tensor(name, numpy.asarray(value))
        value = value.to(_DTYPES.get(kind, value.dtype)).contiguous()
        if kind in _THROUGH_NUMPY:
            return pb_utils.Tensor(name, value.cpu().numpy())
        return pb_utils.Tensor.from_dlpack(name, value)


def resolve(config: Mapping[str, Any], version: Path, folder: Path) -> Any:
    """What the parameter "model" names. Raises: UsageError."""
    given = config.get("parameters", {}).get(PARAMETER, {}).get("string_value", "")
    place, _, name = given.rpartition(":")
    if not place or not name:
        raise UsageError(
            f'parameter "{PARAMETER}" is {given!r}: expected what computes, as "module:name" or "file.py:name"'
        )
    module = _file_module(place, version, folder) if place.endswith(".py") else _module(place)
    try:
        return getattr(module, name)
    except AttributeError:
        raise UsageError(f'parameter "{PARAMETER}": {place} has no {name!r}') from None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something it imports is not
        raise UsageError(
            f'parameter "{PARAMETER}": no module {name!r} in the Python that Triton runs ({sys.prefix})'
        ) from None


def _file_module(name: str, version: Path, folder: Path) -> Any:
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UsageError(f'parameter "{PARAMETER}": {name!r} must lie in the model\'s directory')
    path = next((place / name for place in (version, folder) if (place / name).is_file()), None)
    if path is None:
        raise UsageError(f'parameter "{PARAMETER}": no {name} in {version} nor in {folder}')
    spec = importlib.util.spec_from_file_location(f"gpuload_triton_{Path(name).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_weights(version: Path, device: str) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of a version, whole in memory, and in words where they are.

    The server's memory where one answers and has room; else this process's own. Raises: MfsError if a file is missing,
    wrong, or cannot be read.
    """
    try:
        return dict(_shared(version, device)), "shared by the gpuload server"
    except AwayError:
        reason = "no gpuload server"
    except (AccessError, BusyError, FitError, NotFoundError) as error:
        reason = f"not shared: {first_error(error)}"
    return load_model(version, device), f"this instance's own ({reason})"


def _shared(version: Path, device: str) -> Mapping[str, torch.Tensor]:
    from gpuload.client.attached import open_resident

    found = find_shards(version)
    paths, out = found.paths, left_out(found)
    fds: list[int] = []
    try:
        fds.extend(os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths)
        return open_resident(fds, [str(path) for path in paths], device, left_out=out)
    except OSError as error:
        raise AccessError(f"{error.filename}: {error.strerror}") from None  # and the plain load says it in full
    finally:
        for fd in fds:
            os.close(fd)


def build(found: Any, weights: dict[str, torch.Tensor], version: Path, device: str) -> Callable[..., Any]:
    """What is called for each request. Raises: UsageError where weights and model do not fit."""
    if hasattr(found, "from_pretrained"):
        made = _from_pretrained(found, weights, version)
    elif isinstance(found, type) and issubclass(found, torch.nn.Module):
        made = _with_state(found, weights)
    else:
        made = found(weights)
    if isinstance(made, torch.nn.Module):
        made = made.eval().requires_grad_(False).to(device)
    if not callable(made):
        raise UsageError(f'parameter "{PARAMETER}": it returned {type(made).__name__}, expected something to call')
    called: Callable[..., Any] = made
    return called


def _from_pretrained(found: Any, weights: Mapping[str, torch.Tensor], version: Path) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(version, local_files_only=True)
    return found.from_pretrained(None, config=config, state_dict=dict(weights))


def _with_state(found: type[torch.nn.Module], weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    with torch.device("meta"):
        made = found()
    # assign: the parameters are the loaded tensors themselves, shared ones included.
    wrong = made.load_state_dict(weights, strict=False, assign=True)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise UsageError(
            f"{found.__name__} and the weights do not fit: {len(wrong.missing_keys)} of its tensors are not in the "
            f"file ({', '.join(wrong.missing_keys[:3])}), {len(wrong.unexpected_keys)} of the file's not in it "
            f"({', '.join(wrong.unexpected_keys[:3])})"
        )
    left = [name for name, tensor in (*made.named_parameters(), *made.named_buffers()) if tensor.is_meta]
    if left:
        raise UsageError(f"{found.__name__}: {left[0]!r} is in no state_dict: name a function that makes it instead")
    return made


def _unloaded(**_: Any) -> Any:
    raise UsageError("the model was unloaded")


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, MfsError) else f"{type(error).__name__}: {error}"

"""A model whose answers tell which weights it has: y = x * scale + bias, and if x[0] is set its filler's sum.

The same `model.py` for all; the parameter `reads` of its configuration says how it takes its weights:
    all    all tensors, read when it is loaded
    two    scale and bias only
    lazy   a mapping of the whole file; the filler is first touched when it is asked for
"""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save

from mfs.testing import ramp
from tests.servers.triton import TritonServer

MODEL_PY = """\
import json, numpy, safetensors, safetensors.numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.reads = json.loads(args["model_config"])["parameters"]["reads"]["string_value"]
        path = f"{args['model_repository']}/{args['model_version']}/model.safetensors"
        if self.reads == "all":
            self.weights = safetensors.numpy.load_file(path)
        else:
            self.file = safetensors.safe_open(path, "np")
            self.weights = {name: self.file.get_tensor(name) for name in ("scale", "bias")}
        if self.reads == "lazy":
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                first = json.loads(file.read(header))["filler"]["data_offsets"][0]
            self.weights["filler"] = numpy.memmap(path, numpy.uint8, "r", 8 + header + first)

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            y = x * self.weights["scale"] + self.weights["bias"]
            filler = self.weights["filler"] if x[0] else numpy.zeros(1)
            total = numpy.array([filler.sum(dtype=numpy.int64)])
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y), pb_utils.Tensor("sum", total)]))
        return answers
"""


def config(reads: str = "all", *, extra: str = "") -> bytes:
    """A config.pbtxt without a name: the directory's counts."""
    return f"""\
backend: "python"
max_batch_size: 0
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }} ]
output [
  {{ name: "y" data_type: TYPE_FP32 dims: [ 4 ] }},
  {{ name: "sum" data_type: TYPE_INT64 dims: [ 1 ] }}
]
parameters {{ key: "reads" value {{ string_value: "{reads}" }} }}
{extra}
""".encode()


def weights(number: int, *, filler_bytes: int = 300_000) -> bytes:
    """The file of a version whose scale is `number`. Equal sizes for all numbers."""
    content: bytes = save(
        {
            "scale": np.full(4, number, np.float32),
            "bias": np.full(4, number / 2, np.float32),
            "filler": np.frombuffer(ramp(filler_bytes, number), np.uint8),
        }
    )
    return content


def model(
    name: str, *numbers: int, reads: str = "all", extra: str = "", filler_bytes: int = 300_000
) -> dict[str, bytes]:
    """The files of a model: version N's scale is N."""
    files = {f"{name}/config.pbtxt": config(reads, extra=extra)}
    for number in numbers:
        files |= version(name, number, filler_bytes=filler_bytes)
    return files


def version(name: str, number: int, *, scale: int | None = None, filler_bytes: int = 300_000) -> dict[str, bytes]:
    """The files of one version; its scale is its number unless said otherwise."""
    return {
        f"{name}/{number}/model.py": MODEL_PY.encode(),
        f"{name}/{number}/model.safetensors": weights(scale or number, filler_bytes=filler_bytes),
    }


def scale_of(server: TritonServer, name: str, version: int | None = None, *, timeout_s: float = 30.0) -> float:
    """Ask the model, check that all numbers of the answer fit together, and return the scale they were made with.

    The filler is not touched.
    """
    x = (0.0, 1.0, 2.0, 3.0)
    answer = server.infer(name, {"x": ("FP32", [4], x)}, version=version, timeout_s=timeout_s)
    scale = answer["y"][1] - answer["y"][0]
    assert answer["y"] == [value * scale + scale / 2 for value in x]
    return float(scale)


def total_of(server: TritonServer, name: str, version: int | None = None, *, timeout_s: float = 30.0) -> int:
    """The sum of all bytes of the model's filler, as the model finds it."""
    answer = server.infer(name, {"x": ("FP32", [4], [1, 1, 1, 1])}, version=version, timeout_s=timeout_s)
    return int(answer["sum"][0])


def filler_sum(number: int, filler_bytes: int = 300_000) -> int:
    """What `total_of` must give for a version whose scale is `number`."""
    return int(np.frombuffer(ramp(filler_bytes, number), np.uint8).sum(dtype=np.int64))

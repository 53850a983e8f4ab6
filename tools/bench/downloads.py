"""The systems that do not mount: a boto3 download that is then loaded, and Run:ai's streamer. Children print JSON.

python -m tools.bench.downloads boto3 BUCKET KEY FILE        AWS_* in the environment
python -m tools.bench.downloads runai BUCKET KEY DIGEST
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tools.bench.origin import BUCKET, Origin
from tools.bench.processes import BenchError, run
from tools.bench.reader import pretouch
from tools.bench.workload import Model


def boto3_gb_s(origin: Origin, name: str, model: Model, folder: Path) -> float:
    """GB/s of `download_file` to the disk and a shuffled load of it: how it is done without a mount."""
    folder.mkdir(exist_ok=True)
    file = folder / "downloaded.safetensors"
    try:
        return _child(["boto3", BUCKET, origin.key(name), file], origin.environ, model)
    finally:
        file.unlink(missing_ok=True)


def runai_gb_s(origin: Origin, name: str, model: Model) -> float:
    """GB/s of Run:ai's SafetensorsStreamer from S3 into CPU tensors, cloned."""
    env = {
        **origin.environ, "RUNAI_STREAMER_S3_ENDPOINT": origin.endpoint,
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "RUNAI_STREAMER_CONCURRENCY": "16",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    return _child(["runai", BUCKET, origin.key(name)], env, model)


def _child(words: list[object], env: Mapping[str, str], model: Model) -> float:
    argv = [sys.executable, "-m", "tools.bench.downloads", *words, "--", int(model.size_bytes * 1.5)]
    result = json.loads(run(argv, env=env, timeout_s=300).splitlines()[-1])
    if result["digest"] != model.digest:
        raise BenchError(f"{words[0]} did not deliver the bytes of {model.path}: wrong tensors, so no figures")
    rate: float = result["bytes"] / result["seconds"] / 1e9
    return rate


def _boto3(bucket: str, key: str, file: str, pretouch_bytes: int) -> dict[str, object]:
    import boto3
    import torch  # noqa: F401
    from boto3.s3.transfer import TransferConfig
    from safetensors import safe_open

    from tools.bench.reader import digest

    pretouch(pretouch_bytes)
    start, size = time.perf_counter(), 0
    config = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=16)
    boto3.client("s3").download_file(bucket, key, file, Config=config)
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        random.Random(7).shuffle(names)
        for name in names:
            size += opened.get_tensor(name).clone().nbytes
        seconds = time.perf_counter() - start
        return {"bytes": size, "seconds": seconds, "digest": digest(opened)}


def _runai(bucket: str, key: str, pretouch_bytes: int) -> dict[str, object]:
    import torch
    import xxhash
    from runai_model_streamer import SafetensorsStreamer

    pretouch(2 * pretouch_bytes)
    start, size, kept = time.perf_counter(), 0, {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(f"s3://{bucket}/{key}")
        for name, tensor in streamer.get_tensors():
            kept[name] = tensor.clone()  # the streamer reuses its buffer
            size += tensor.nbytes
        seconds = time.perf_counter() - start
    total = xxhash.xxh3_128()
    for name in sorted(kept):
        total.update(name.encode())
        total.update(memoryview(kept[name].contiguous().view(torch.uint8).numpy()).cast("B"))
    return {"bytes": size, "seconds": seconds, "digest": total.hexdigest()}


if __name__ == "__main__":
    way, *words = sys.argv[1:]
    words, size_text = words[:-2], words[-1]
    child = _boto3 if way == "boto3" else _runai
    print(json.dumps(child(*words, int(size_text))))

"""The systems that do not mount: a boto3 download that is then loaded, and Run:ai's streamer. Children print JSON.

python -m tools.bench.downloads boto3|runai BUCKET FOLDER PRETOUCH_BYTES KEY...        AWS_* in the environment
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.bench.origin import BUCKET, Origin
from tools.bench.processes import BenchError, run
from tools.bench.reader import Task, digest, pretouch, tensors
from tools.bench.workload import Model


def boto3_gb_s(origin: Origin, name: str, model: Model, folder: Path) -> float:
    """GB/s of `download_file` to the disk and a shuffled load of it: how it is done without a mount."""
    folder.mkdir(exist_ok=True)
    try:
        return _child("boto3", origin.environ, origin, name, model, folder)
    finally:
        shutil.rmtree(folder)


def runai_gb_s(origin: Origin, name: str, model: Model, folder: Path) -> float:
    """GB/s of Run:ai's SafetensorsStreamer from S3 into CPU tensors, cloned."""
    env = {
        **origin.environ, "RUNAI_STREAMER_S3_ENDPOINT": origin.endpoint,
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "RUNAI_STREAMER_CONCURRENCY": "16",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    return _child("runai", env, origin, name, model, folder)


def _child(way: str, env: Mapping[str, str], origin: Origin, name: str, model: Model, folder: Path) -> float:
    words = [way, BUCKET, folder, int(model.size_bytes * 1.5), *origin.keys(name)]
    argv = [sys.executable, "-m", "tools.bench.downloads", *words]
    result = json.loads(run(argv, env=env, timeout_s=300).splitlines()[-1])
    if result["digest"] != model.digest:
        raise BenchError(f"{way} did not deliver the bytes of {model.folder}: wrong tensors, so no figures")
    rate: float = result["bytes"] / result["seconds"] / 1e9
    return rate


def _boto3(bucket: str, folder: Path, pretouch_bytes: int, keys: Sequence[str]) -> dict[str, object]:
    import boto3
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=16)
    pretouch(pretouch_bytes)
    start, client = time.perf_counter(), boto3.client("s3")
    for key in keys:
        client.download_file(bucket, key, str(folder / Path(key).name), Config=config)
    seconds = time.perf_counter() - start
    loaded = tensors(Task(folder, seed=7, pretouch_bytes=0, truth=folder), name="shuffled")
    seconds += loaded.bytes / loaded.figures[0][1] / 1e9
    return {"bytes": loaded.bytes, "seconds": seconds, "digest": loaded.digest}


def _runai(bucket: str, folder: Path, pretouch_bytes: int, keys: Sequence[str]) -> dict[str, object]:
    import torch
    from runai_model_streamer import SafetensorsStreamer

    pretouch(2 * pretouch_bytes)
    start, size, kept = time.perf_counter(), 0, {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([f"s3://{bucket}/{key}" for key in keys])
        for name, tensor in streamer.get_tensors():
            kept[name] = tensor.clone()  # the streamer reuses its buffer
            size += tensor.nbytes
        seconds = time.perf_counter() - start
    found = (memoryview(kept[name].contiguous().view(torch.uint8).numpy()).cast("B") for name in sorted(kept))
    return {"bytes": size, "seconds": seconds, "digest": digest(found)}


if __name__ == "__main__":
    way, bucket, folder, pretouch_bytes, *keys = sys.argv[1:]
    child = _boto3 if way == "boto3" else _runai
    print(json.dumps(child(bucket, Path(folder), int(pretouch_bytes), keys)))

"""The main job: the real all-MiniLM-L6-v2 on a real S3 server, loaded through the mount by unmodified libraries."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tests.mount import origins
from tests.mount.conftest import Mounted
from tests.servers.swift import SwiftServer

_EMBED = """
import hashlib, json, sys
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

torch.manual_seed(0)
torch.set_num_threads(1)
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
words = tokenizer(["weights where they run", "a lazy mount"], padding=True, return_tensors="pt")
with torch.no_grad():
    embedding = model(**words).last_hidden_state.mean(dim=1)
digest = hashlib.sha256()
with safe_open(folder + "/model.safetensors", framework="pt") as file:
    for name in sorted(file.keys()):
        digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
print(json.dumps({"embedding": embedding.numpy().tobytes().hex(), "shape": list(embedding.shape),
                  "tensors": digest.hexdigest()}))
"""


def test_transformers_gives_the_same_embedding_as_from_local_disk(
    swift: SwiftServer, s3_bucket: str, mounted: Mounted, minilm_dir: Path
) -> None:
    origin = origins.S3Origin(swift, s3_bucket, "prod")
    for file in sorted(minilm_dir.rglob("*")):
        relative = file.relative_to(minilm_dir)
        if file.is_file() and "__pycache__" not in relative.parts:
            origin.client.upload_file(str(file), s3_bucket, f"prod/all-MiniLM-L6-v2/{relative}")
    mount = mounted(origin)
    folder = mount.path / "all-MiniLM-L6-v2"
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

    def embed(model: Path) -> dict[str, object]:
        out = mount.run(sys.executable, "-W", "ignore", "-c", _EMBED, model, timeout_s=120, env=offline)
        found: dict[str, object] = json.loads(out.splitlines()[-1])
        return found

    through_mount, local = embed(folder), embed(minilm_dir)
    assert through_mount == local
    assert through_mount["shape"] == [2, 384]
    weights = minilm_dir / "model.safetensors"
    [row] = [row for row in mount.client.ls("all-MiniLM-L6-v2") if row["name"] == "model.safetensors"]
    assert row["size"] == weights.stat().st_size
    assert (
        mount.run("sha256sum", folder / "model.safetensors").split()[0]
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    # Each byte crossed the network at most once, though it was read three times.
    assert mount.origin_bytes <= sum(file.stat().st_size for file in minilm_dir.rglob("*") if file.is_file())

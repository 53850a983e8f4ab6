"""`gpuload plan`: room for key-value caches, cards of any size, and several models whose equal tensors stand once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuload.cli.digesting import digest_model
from gpuload.cli.planning import examine
from gpuload.cli.together import blocks_of, examine_all
from gpuload.client.asking import ask, load_resident
from gpuload.device.host import HostDevice
from gpuload.fit import CONTEXT_BYTES, Block, Fit, together_bytes
from gpuload.kv_cache import ITEM_BYTES, kv_cache_bytes, tokens_that_fit
from gpuload.server.daemon import ServerConfig
from gpuload.server.digest_files import DigestFiles
from gpuload.server.digests import DigestCache
from gpuload.testing import random_tensors, running_server, write
from tests.gpuload.cli.test_cli import gpuload

LLAMA = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MLA = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
WINDOW = LLAMA | {"sliding_window": 4096, "use_sliding_window": True}
GIB = 1 << 30


# -- room for a key-value cache


@pytest.mark.parametrize(
    ("config", "world", "item_bytes", "per_token"),
    [
        (LLAMA, 1, None, 32 * 2 * 8 * 128 * 2),
        (LLAMA, 4, None, 32 * 2 * 2 * 128 * 2),  # heads are spread
        (LLAMA, 16, None, 32 * 2 * 1 * 128 * 2),  # one at least
        (LLAMA, 1, ITEM_BYTES["fp8"], 32 * 2 * 8 * 128),
        (LLAMA, 1, ITEM_BYTES["fp32"], 32 * 2 * 8 * 128 * 4),
        (LLAMA | {"torch_dtype": "float32"}, 1, ITEM_BYTES["bf16"], 32 * 2 * 8 * 128 * 2),
        (MLA, 8, None, 61 * 576 * 2),  # one latent for all heads, on every rank
    ],
)
def test_tokens_in_a_gibibyte(config: dict[str, Any], world: int, item_bytes: int | None, per_token: int) -> None:
    assert tokens_that_fit(config, GIB, world, item_bytes) == GIB // per_token
    assert tokens_that_fit(config, per_token - 1, world, item_bytes) == 0
    assert kv_cache_bytes(config, 3, world, item_bytes) == 3 * per_token


def test_a_window_lets_a_cache_end() -> None:
    whole = kv_cache_bytes(WINDOW, 1 << 30)
    assert whole == 32 * 4096 * 2 * 8 * 128 * 2
    assert tokens_that_fit(WINDOW, whole) is None, "more tokens need no more"
    assert tokens_that_fit(WINDOW, whole - 1) == 4095


def test_the_room_of_a_sum() -> None:
    fit = Fit(weights_bytes=100, kv_cache_bytes=20, context_bytes=5, staging_bytes=3, resident_bytes=40,
              others_bytes=30, device_bytes=200)  # fmt: skip
    assert fit.room_bytes == 22
    assert Fit(300, 20, 0, 0, 0, 0, 200).room_bytes == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    folder.mkdir()
    write(folder / "model.safetensors", random_tensors(1, {"a.q_proj.weight": (1000, 1000), "b": (1000, 500)}))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def test_a_card_of_any_size(model: Path, tmp_path: Path) -> None:
    found = examine(str(model), 1000, None, {}, {}, str(tmp_path / "no.sock"), memory_bytes=2 * GIB)
    (target,) = found["targets"]
    assert (target["target"], target["fits"], target["tensor_parallel"]) == ("a card of 2.0 G", True, 1)
    assert target["kv_room_bytes"] == 2 * GIB - CONTEXT_BYTES - 3_000_000
    assert target["kv_room_tokens"] == target["kv_room_bytes"] // (128 << 10)
    eight = examine(str(model), 1000, None, {}, {}, str(tmp_path / "no.sock"), memory_bytes=2 * GIB, item_bytes=1)
    assert eight["kv_cache_bytes"] * 2 == found["kv_cache_bytes"]
    tight = examine(str(model), 0, None, {}, {}, str(tmp_path / "no.sock"), memory_bytes=CONTEXT_BYTES + 2_500_000)
    assert (tight["targets"][0]["fits"], tight["targets"][0]["tensor_parallel"]) == (False, 2)
    assert tight["targets"][0]["kv_room_bytes"] == 500_000, "of each of the two ranks"


def test_a_model_without_a_config_has_room_in_bytes(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    target = examine(str(model), 0, None, {}, {}, str(tmp_path / "no.sock"), memory_bytes=2 * GIB)["targets"][0]
    assert target["kv_room_bytes"] > GIB
    assert target["kv_room_tokens"] is None
    (model / "config.json").write_text('{"model_type": "of tomorrow"}')
    assert examine(str(model), 0, None, {}, {}, str(tmp_path / "no.sock"))["targets"][0]["kv_room_tokens"] is None


# -- several models


def test_blocks_that_are_known_to_be_equal_count_once() -> None:
    a, b, c = (Block(name, size) for name, size in ((b"a", 10), (b"b", 20), (b"c", 30)))
    unknown = Block(None, 5)
    assert together_bytes([[a, b], [b, c]]) == 60
    assert together_bytes([[a, unknown], [a, unknown]]) == 20
    assert together_bytes([]) == together_bytes([[]]) == 0


SHAPES = {"large": (33 << 20,), "b": (33 << 20,), "small": (1000,)}  # bf16: 66 MiB are 9 granules of a card


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    """Two versions that share one large tensor, and differ in another."""
    first = random_tensors(1, SHAPES)
    second = {**first, "b": random_tensors(2, {"b": SHAPES["b"]})["b"]}
    found = []
    for name, tensors in (("v1", first), ("v2", second)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
        found.append(str(tmp_path / name))
    return found


def test_versions_that_share_tensors(versions: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "digests"

    def plan() -> dict[str, Any]:
        return examine_all(
            versions, 1000, {}, str(tmp_path / "no.sock"), memory_bytes=GIB + CONTEXT_BYTES, item_bytes=None,
            digests=str(kept),
        )  # fmt: skip

    before = plan()
    assert before["shared_bytes"] == 0
    assert all(one["unknown_bytes"] == one["arena_bytes"] for one in before["models"])
    hashed = [digest_model(where, folder=kept) for where in versions]
    if hashed[0]["files"][0]["reason"]:
        pytest.skip(hashed[0]["files"][0]["reason"])
    found = plan()
    granule = 8 << 20
    large = 9 * granule
    assert [one["arena_bytes"] for one in found["models"]] == [2 * large + granule] * 2
    assert [one["unknown_bytes"] for one in found["models"]] == [0, 0]
    assert found["shared_bytes"] == large + granule, "the equal tensor, and the small one"
    assert found["arena_bytes"] == 3 * large + granule
    assert found["kv_cache_bytes"] == 2 * kv_cache_bytes(LLAMA, 1000)
    (target,) = found["targets"]
    assert target["needed_bytes"] == found["arena_bytes"] + found["kv_cache_bytes"] + CONTEXT_BYTES
    assert target["fits"]
    assert target["kv_room_bytes"] == GIB - found["arena_bytes"]


def test_a_server_takes_what_was_said(tmp_path: Path, config: ServerConfig) -> None:
    """Both versions in one arena: its use is the sum that was planned."""
    first = random_tensors(1, {"a": (40, 4096), "b": (40, 4096), "c": (100,)})
    second = {**first, "b": random_tensors(2, {"b": (40, 4096)})["b"]}
    paths = [write(tmp_path / "v1.safetensors", first), write(tmp_path / "v2.safetensors", second)]
    kept = tmp_path / "digests"
    if any(digest_model(path, folder=kept)["files"][0]["reason"] for path in paths):
        pytest.skip("nothing can be remembered of files here")
    known = DigestCache(DigestFiles(kept))
    from gpuload.device.host import HostDevice

    granule = 4096
    blocks = [blocks_of(str(path), known, granule_bytes=granule) for path in paths]
    with running_server(config, lambda _: HostDevice(granule_bytes=granule)) as server:
        for path in paths:
            load_resident(str(path), path.stem, None, is_swap=False, options={}, socket_path=server.socket_path)
        site = server.sites["cpu"]
        used = server.gauges()["granules_used"] * granule
        assert used == together_bytes(blocks)
        assert used < sum(together_bytes([own]) for own in blocks)
        for model in list(site.catalog.models.values()):
            server.on_loop(model.retire)


def test_the_command(versions: list[str], tmp_path: Path) -> None:
    kept = ["--digests", str(tmp_path / "d")]
    text = gpuload("plan", *versions, "--device-memory", "80G", "--kv-cache", "1000", *kept)
    assert "run `gpuload digest MODEL` first" in text
    lines = text.splitlines()
    assert lines[0].split() == ["model", "bytes", "in", "an", "arena", "KV", "cache", "not", "hashed"]
    assert lines[0].index("bytes") + 5 == lines[1].index("132 M") + 5 == lines[2].index("132 M") + 5, "aligned"
    assert "fits" in lines[-1]
    found = json.loads(gpuload("plan", versions[0], "--device-memory", "80G", "--kv-dtype", "fp8", "--json"))
    assert found["targets"][0]["kv_room_tokens"] > 1_000_000
    assert "tokens" in gpuload("plan", versions[0])
    assert "for several say --device-memory" in gpuload("plan", *versions, "--device", "cpu", status=2)
    assert "Missing argument" in gpuload("plan", status=2)


# -- an arena that takes memory when it is needed


def test_an_arena_has_what_its_device_has(config: ServerConfig, tmp_path: Path) -> None:
    """A server that took nothing yet: its budget is free, but the device may not have so much."""
    path = write(tmp_path / "m.safetensors", random_tensors(1, {"w": (1 << 20,)}))
    free = HostDevice().memory().total_bytes
    with running_server(replace(config, arena_bytes={"cpu": free // (2 << 20) * (2 << 20)})) as server:
        arena = examine(str(path), 0, "cpu", {}, {}, server.socket_path)["targets"][-1]
        assert arena["fits"]
        assert arena["others_bytes"] > 0, "this machine has not all of its memory free"
        assert arena["resident_bytes"] == 0
        load_resident(path, "m", "cpu", socket_path=server.socket_path, options={"pinned": True})
        ask({"op": "resize", "device": "cpu", "bytes": 4 << 20}, socket_path=server.socket_path)
        arena = examine(str(path), 0, "cpu", {}, {}, server.socket_path)["targets"][-1]
        assert (arena["resident_bytes"], arena["device_bytes"], arena["shortfall_bytes"]) == (2 << 20, 4 << 20, 0)
        ask({"op": "resize", "device": "cpu", "bytes": 2 << 20}, socket_path=server.socket_path)
        arena = examine(str(path), 0, "cpu", {}, {}, server.socket_path)["targets"][-1]
        assert arena["shortfall_bytes"] == 2 << 20

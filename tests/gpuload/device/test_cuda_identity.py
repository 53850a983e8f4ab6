"""A card is its UUID: processes that number cards in other ways get the weights of the card they mean, or a refusal.

On stand-in drivers: one for the server, one for the client, each with a CUDA_VISIBLE_DEVICES of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach, open_resident
from gpuload.device import card_of, identity_of
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.errors import DeviceError, ServerError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import NotFoundError
from tests.gpuload.device.conftest import Processes

CARDS = [f"GPU-5a5a5a5a-5a5a-5a5a-5a5a-5a5a5a5a5a{n:02x}" for n in range(3)]
WEIGHTS = [random_tensors(seed, {"w": (100, 100)}) for seed in range(2)]


@pytest.fixture
def server(process: Processes, config: ServerConfig, tmp_path: Path) -> Iterator[ServerThread]:
    """Another model on each of two cards, under one name: its cuda:0 is the machine's last, and one is not its own."""
    driver = process(STANDIN_DEVICES=3, CUDA_VISIBLE_DEVICES="2,1")
    config = replace(config, arena_bytes={"cuda:0": 16 << 20, "cuda:1": 16 << 20})
    with running_server(config, lambda name: CudaDevice(int(name[-1]), driver=driver)) as running:
        for index, weights in enumerate(WEIGHTS):
            file = write(tmp_path / f"{index}.safetensors", weights)
            load_resident(file, "m", f"cuda:{index}", socket_path=running.socket_path)
        yield running


@pytest.mark.parametrize("visible", ["2,1", "1,2", f"{CARDS[1]},{CARDS[2]}"])
def test_each_number_means_the_callers_card(
    server: ServerThread, process: Processes, be_client: Callable[[cu.Driver], None], visible: str
) -> None:
    be_client(process(STANDIN_DEVICES=3, CUDA_VISIBLE_DEVICES=visible))
    for index in range(2):
        held = attach("m", f"cuda:{index}", socket_path=server.socket_path)
        assert_same(held, WEIGHTS[[CARDS[2], CARDS[1]].index(identity_of(index))])
        assert (held.device, held.devices) == (f"cuda:{index}", (f"cuda:{index}",))
        del held


def test_a_pod_with_the_second_card_gets_that_cards_weights(
    server: ServerThread, process: Processes, be_client: Callable[[cu.Driver], None], tmp_path: Path
) -> None:
    be_client(process(STANDIN_DEVICES=3, CUDA_VISIBLE_DEVICES="1"))
    assert_same(attach("m", 0, socket_path=server.socket_path), WEIGHTS[1])
    with pytest.raises(DeviceError, match=f"{CARDS[2]} is not among the cards that this process sees: {CARDS[1]}"):
        attach("m", socket_path=server.socket_path)  # the first of the server's is not ours
    with open(tmp_path / "1.safetensors", "rb") as file:
        held = open_resident([file.fileno()], ["x"], "cuda:0", socket_path=server.socket_path)
    assert_same(held, WEIGHTS[1])
    assert held.report is not None
    assert held.report["bytes_copied"] == 0, "loaded again, on another card"


def test_a_card_without_an_arena_is_refused_by_its_uuid(
    server: ServerThread, process: Processes, be_client: Callable[[cu.Driver], None]
) -> None:
    be_client(process(STANDIN_DEVICES=3, CUDA_VISIBLE_DEVICES="0"))
    with pytest.raises(NotFoundError, match=rf"no arena on {CARDS[0]}; it has: cuda:0 \({CARDS[2]}\), cuda:1"):
        attach("m", "cuda:0", socket_path=server.socket_path)
    with pytest.raises(DeviceError, match="no cuda:1: this process sees 1 CUDA devices"):
        attach("m", "cuda:1", socket_path=server.socket_path)


def test_a_rank_needs_to_see_its_own_card_alone(
    server: ServerThread, process: Processes, be_client: Callable[[cu.Driver], None], tmp_path: Path
) -> None:
    want = random_tensors(9, {"a": (100, 10), "b": (50, 10)})
    file = write(tmp_path / "both.safetensors", want)
    options = {"device_map": {"a": "cuda:0", "b": "cuda:1"}}
    load_resident(file, "both", None, options=options, socket_path=server.socket_path)
    be_client(process(STANDIN_DEVICES=3, CUDA_VISIBLE_DEVICES="1"))
    held = attach("both", 0, socket_path=server.socket_path)
    assert_same(held, {"b": want["b"]})
    assert held.devices == (CARDS[2], "cuda:0")


def test_the_operator_may_say_either_name(server: ServerThread) -> None:
    seen = ask({"op": "status"}, socket_path=server.socket_path)["devices"]
    assert [(d["device"], d["identity"]) for d in seen] == [("cuda:0", CARDS[2]), ("cuda:1", CARDS[1])]
    for device in ("cuda:1", CARDS[1], CARDS[1].replace("GPU", "MIG").upper()):
        answer = ask({"op": "pin", "model": "m", "device": device}, socket_path=server.socket_path)
        assert answer["pinned"], device
    assert card_of("MIG-x") is None


def test_a_server_that_names_a_number_is_not_believed(
    server: ServerThread,
    process: Processes,
    be_client: Callable[[cu.Driver], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As servers did before: that number is another card here."""
    be_client(process(STANDIN_DEVICES=3, CUDA_VISIBLE_DEVICES="1,2"))
    for site in server.sites.values():
        monkeypatch.setattr(site.device, "identity", site.name)
    with pytest.raises(ServerError, match="older than this program"):
        attach("m", socket_path=server.socket_path)

"""`gpuload doctor`, without a GPU and with the stand-in driver; NO GPU is involved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpuload.cli import doctor, doctor_cuda
from gpuload.cli.app import cli
from gpuload.cli.doctor_cuda import Compatibility, Wheel
from gpuload.device import cards, nodes
from gpuload.device import driver as cu
from gpuload.device.cards import Bus, Card, Managed
from gpuload.device.host import HostDevice
from gpuload.errors import DeviceError
from mfs.findings import Finding

SOURCE = Path(__file__).parents[1] / "device" / "standin" / "libcuda.c"


def run(*args: str, status: int | None = None, **env: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpuload", "doctor", *args, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env, check=False)
    assert "Traceback" not in done.stderr
    assert status is None or done.returncode == status, f"{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"by": {one["what"]: one for one in found["findings"]}}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here: the stand-in driver cannot be built")
    out = tmp_path_factory.mktemp("standin") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", out, SOURCE], check=True)
    return out


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> cu.Driver:
    loaded = cu.Driver(str(library))
    monkeypatch.setattr(cu, "load_driver", lambda: loaded)
    return loaded


@dataclass
class Machine:
    """What is said of it."""

    findings: list[Finding]
    table: Compatibility

    def __getitem__(self, what: str) -> Finding:
        return next(one for one in self.findings if one.what == what)

    def __contains__(self, what: str) -> bool:
        return any(one.what == what for one in self.findings)


def examine(monkeypatch: pytest.MonkeyPatch, cuda: str = "12.4", archs: str = "sm_80 sm_90", *wanted: str) -> Machine:
    monkeypatch.setattr(doctor_cuda, "wheel", lambda: Wheel("2.9.0", cuda, archs.split()))
    monkeypatch.setattr(doctor_cuda, "COPY_BYTES", 1 << 20)
    table = Compatibility()
    return Machine(list(doctor_cuda.examine(table, wanted)), table)


# -- a machine without a GPU


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
def test_without_a_gpu_the_rest_is_looked_at() -> None:
    found = run(status=0, CUDA_VISIBLE_DEVICES="")
    assert found["by"]["driver"]["level"] == "note"
    assert "no CUDA driver on this machine" in found["by"]["driver"]["value"]
    assert "device 'cpu' works" in found["by"]["driver"]["value"]
    assert {"torch", "shared memory", "cpu: copies", "page-locked memory", "descriptors", "server"} <= set(found["by"])
    assert found["compatibility"]["toolkits"] == []
    assert all(one["advice"] for one in found["findings"] if one["level"] in ("warning", "fault"))


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
def test_a_gpu_that_is_asked_for_and_is_not_there_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> cu.Driver:
        raise DeviceError("no CUDA driver on this machine")

    monkeypatch.setattr(cu, "load_driver", missing)
    found = examine(monkeypatch, "", "", "cuda:0")
    assert found["driver"].level == found["torch"].level == "fault"
    assert "--gpus all" in found["driver"].advice
    assert examine(monkeypatch, "", "", "cpu")["driver"].level == "note"


# -- the stand-in


def test_what_the_driver_can_run(driver: cu.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(monkeypatch, "12.1", "sm_80")
    assert found["driver"].value.startswith("CUDA 12.4")
    assert found["torch on this driver"].level == found["cuda:0: kernels of torch"].level == "ok"
    rows = {row["toolkit"]: row["verdict"] for row in found.table.toolkits}
    assert rows["11.8"] == rows["12.4"] == "runs"
    assert rows["12.6"] == "runs, but compiles no PTX"
    assert rows["13.0"] == "does not run"
    assert found.table.cards[0] == {
        "device": "cuda:0", "name": "stand-in", "capability": "8.0", "runs": True, "by": "sm_80", "reason": "",
    }  # fmt: skip
    assert " GB/s from page-locked memory" in found["cuda:0: copies"].value
    assert "as descriptors" in found["cuda:0: between processes"].value


@pytest.mark.parametrize(
    ("cuda", "archs", "what", "level", "advice"),
    [
        ("12.9", "sm_80", "torch on this driver", "note", "driver of CUDA 12.9"),
        (
            "13.0",
            "sm_80",
            "torch on this driver",
            "fault",
            "driver 580.65.06 or newer, or a torch built with CUDA 12.4",
        ),
        ("12.4", "sm_90", "cuda:0: kernels of torch", "fault", "built with CUDA 11.0 or newer"),
        ("12.4", "sm_70 compute_70", "cuda:0: kernels of torch", "note", "a torch built for this card"),
        ("12.9", "sm_70 compute_70", "cuda:0: kernels of torch", "fault", "built with CUDA 11.0 or newer"),
        ("", "", "torch", "ok", ""),
    ],
)
def test_wheels_that_do_not_fit(
    driver: cu.Driver, monkeypatch: pytest.MonkeyPatch, cuda: str, archs: str, what: str, level: str, advice: str
) -> None:
    found = examine(monkeypatch, cuda, archs)[what]
    assert found.level == level
    assert advice in found.advice


def test_a_card_that_no_wheel_is_for_any_more(driver: cu.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_CAPABILITY", "70")
    monkeypatch.setenv("STANDIN_CUDA", "13000")
    found = examine(monkeypatch, "13.0", "sm_75 sm_80")
    assert found["cuda:0"].value == "stand-in, compute capability 7.0, Volta (V100)"
    assert found["cuda:0: kernels of torch"].advice.endswith("CUDA 9.0 to 12.9")


@pytest.mark.parametrize(("mode", "word"), [("2", "prohibited"), ("3", "exclusive")])
def test_a_card_that_cannot_be_shared(driver: cu.Driver, monkeypatch: pytest.MonkeyPatch, mode: str, word: str) -> None:
    monkeypatch.setenv("STANDIN_COMPUTE_MODE", mode)
    found = examine(monkeypatch)
    assert found["cuda:0: compute mode"].level == "fault"
    assert found["cuda:0: compute mode"].value.startswith(word)
    assert found["cuda:0: compute mode"].advice == "as root: nvidia-smi -i 0 -c DEFAULT"
    assert ("cuda:0: copies" in found) == (mode == "3"), "nobody may use a card that is prohibited"


def test_cards_that_are_not_there(driver: cu.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(monkeypatch, "12.4", "sm_80", "cuda:0", "cuda:3")
    assert found["cards"].level == "fault"
    assert "no cuda:3" in found["cards"].value


def test_the_whole_command_with_a_driver(library: Path) -> None:
    """As users run it; torch here has no CUDA, or another than the stand-in's."""
    found = run("--device", "cuda:0", LD_LIBRARY_PATH=str(library.parent), STANDIN_CUDA="13000")
    assert found["compatibility"]["driver_cuda"] == "13.0"
    assert "cuda:0: copies" in found["by"]


def test_the_tables_for_people(driver: cu.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cuda, "wheel", lambda: Wheel("2.9.0", "12.6", ("sm_80",)))
    monkeypatch.setattr(doctor_cuda, "COPY_BYTES", 1 << 20)
    text = CliRunner().invoke(cli, ["doctor"]).output
    assert "\n\nWhat this driver (CUDA 12.4) can run; torch here was built with CUDA 12.6:" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["12.6"].rstrip().endswith("<- torch")
    assert "driver 580.65.06 or newer" in rows["13.0"]
    assert rows["cuda:0"].split() == ["cuda:0", "stand-in", "8.0", "yes", "sm_80"]


# -- bus, nodes, NVML


def card(**facts: Any) -> Card:
    return Card(**({
        "index": 0, "name": "x", "capability": (9, 0), "compute_mode": 0, "has_ecc": True,
        "exports_descriptors": True, "pci": "0000:65:00.0",
    } | facts))  # fmt: skip


def link(root: Path, speed: str, width: int, speed_max: str, width_max: int, node: int = 1) -> None:
    place = root / "sys/bus/pci/devices/0000:65:00.0"
    place.mkdir(parents=True)
    for name, value in (("current_link_speed", speed), ("current_link_width", width), ("max_link_speed", speed_max),
                        ("max_link_width", width_max), ("numa_node", node)):  # fmt: skip
        (place / name).write_text(f"{value}\n")


def test_the_bus_as_sysfs_has_it(tmp_path: Path) -> None:
    link(tmp_path, "2.5 GT/s PCIe", 16, "32.0 GT/s PCIe", 16)
    bus = cards.bus_of(card(), tmp_path)
    assert bus == Bus(1, 16, 5, 16)
    assert bus.gb_s == pytest.approx(63, rel=0.01)
    assert nodes.node_of(card().pci, tmp_path) == 1
    assert cards.bus_of(card(pci="0000:00:00.0"), tmp_path) is None
    assert nodes.node_of("0000:00:00.0", tmp_path) is None
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(said)
    assert cards.driver_release(tmp_path) == "580.65.06"
    assert cards.driver_release(tmp_path / "none") == ""


def test_a_bus_with_too_few_lanes_and_a_slow_copy(driver: cu.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "bus_of", lambda card: Bus(4, 4, 5, 16))
    found = examine(monkeypatch)
    assert found["cuda:0: PCIe"].level == "warning"
    assert found["cuda:0: PCIe"].value == "4.0 x4 now, 5.0 x16 at most"
    monkeypatch.setattr(cards, "bus_of", lambda card: Bus(5, 1 << 20, 5, 1 << 20))
    found = examine(monkeypatch)
    assert found["cuda:0: copies"].level == "warning"
    assert "its link can carry" in found["cuda:0: copies"].value


def test_a_process_on_another_memory_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, cpus in ((0, f"0-{os.cpu_count()}"), (1, "500-600,700")):
        place = tmp_path / f"sys/devices/system/node/node{number}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cpus}\n")
    assert nodes.process_nodes(tmp_path) == {0}
    monkeypatch.setattr(nodes, "node_of", lambda pci: 1)
    monkeypatch.setattr(nodes, "process_nodes", lambda: {0})
    found = doctor_cuda._node("cuda:0", card())
    assert found.level == "warning"
    assert found.advice.endswith("numactl --cpunodebind=1 --membind=1")
    monkeypatch.setattr(nodes, "process_nodes", lambda: {0, 1})
    assert doctor_cuda._node("cuda:0", card()).level == "ok"


def test_what_only_nvml_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "managed", lambda card: Managed(True, False, 7))
    found = {one.what: one for one in doctor_cuda._managed("cuda:0", card())}
    assert [found[f"cuda:0: {what}"].level for what in ("MIG", "persistence", "ECC")] == ["note", "note", "warning"]
    assert "nvidia-smi -i 0 -pm 1" in found["cuda:0: persistence"].advice
    monkeypatch.setattr(cards, "managed", lambda card: None)
    (asked,) = doctor_cuda._managed("cuda:0", card())
    assert "nvidia-ml-py" in asked.advice


# -- the rest


def test_copies_are_measured_on_any_device() -> None:
    assert doctor_cuda.copy_speed(HostDevice(), 4 << 20) > 0
    assert doctor_cuda.copy_speed(HostDevice(granule_bytes=4096), 4096) > 0


def test_a_server_that_is_asked_for_and_is_away(tmp_path: Path) -> None:
    found = doctor._server(str(tmp_path / "s.sock"))
    assert found.level == "fault"
    assert "gpuload serve" in found.advice

"""Every framework, as installed from its package, computes on a mount what it computes on local disk, bit for bit.

Each test is a user's program in a process of its own (`programs.py`), run on a mount that nobody has read before, with
an SSD cache and the smallest RAM tier, and then on the local copy. The frameworks are imported once for all: none reads
a model while it is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mfs.testing.mounting import TestMount
from tests.frameworks.conftest import HUB_CACHE, OFFLINE, SNAPSHOT, Registry, files_below
from tests.mount import origins
from tests.mount.conftest import Mounted
from tests.servers.warm import WarmPython

PROGRAM_S = 150.0  # an import of transformers alone takes ten seconds where others use the two cores as well


_RUN = "import sys; from tests.frameworks.programs import main; main(sys.argv[1], sys.argv[2:])"


def run_warm(python: WarmPython, mount: TestMount, program: str, *folders: Path) -> list[Any]:
    """What the program says of each folder, in one process."""
    env = os.environ | OFFLINE
    done = python.run(_RUN, program, *folders, env=env, timeout_s=PROGRAM_S, on_hang=mount.abort)
    assert done.returncode == 0, f"{program}: {done.stderr}\n{mount.log[-4000:]}"
    return results(done.stdout)


def command(program: str, *folders: Path) -> list[str]:
    return [sys.executable, "-m", "tests.frameworks.programs", program, *map(str, folders)]


def run(mount: TestMount, program: str, *folders: Path, env: dict[str, str]) -> list[Any]:
    """The same in a Python that is started for it, with this in its environment."""
    return results(mount.run(*command(program, *folders), timeout_s=PROGRAM_S, env=OFFLINE | env))


def results(out: str) -> list[Any]:
    return [json.loads(line.removeprefix("result:")) for line in out.splitlines() if line.startswith("result:")]


@pytest.fixture(scope="module")
def minilm_on_disk(warm: WarmPython, models: Path) -> list[Any]:
    """What transformers makes of the local copy."""
    env = os.environ | OFFLINE
    done = warm.run(_RUN, "transformers_from_pretrained", models / "minilm", env=env, timeout_s=PROGRAM_S)
    found = results(done.stdout)
    assert len(found) == 1
    return found


def same_as_local(warm: WarmPython, mount: TestMount, program: str, local: Path) -> None:
    """The mount first: nothing of its answers may come from having seen the local copy."""
    through_mount, on_disk = run_warm(warm, mount, program, mount.path, local)
    assert through_mount == on_disk
    assert through_mount, "the program computed nothing"


def size_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_below(folder))


@pytest.mark.timeout(300)
class TestOverS3:
    @pytest.mark.parametrize(
        ("program", "model"),
        [
            ("safetensors_safe_open", "minilm"),
            ("safetensors_load_file", "minilm"),
            ("safetensors_pread", "minilm"),
            ("safetensors_numpy", "minilm"),
            ("safetensors_slices", "sharded"),
            ("safetensors_shuffled", "sharded"),
            ("transformers_from_pretrained", "minilm"),
            ("transformers_from_pretrained", "sharded"),
            ("sentence_transformers", "minilm"),
            ("diffusers_pipeline", "diffusers_pipeline"),
            ("accelerate_dispatch", "dispatched"),
        ],
    )
    def test_same_as_from_local_disk(
        self, warm: WarmPython, registry: Registry, mounted: Mounted, program: str, model: str
    ) -> None:
        mount = mounted(registry.s3(model))
        local = registry.models / model
        same_as_local(warm, mount, program, local)
        mount.wait_quiet(prefetch=False)
        assert mount.origin_bytes <= size_below(local), "something crossed the network twice"

    def test_a_hub_cache_on_s3_serves_models_by_their_hub_name(
        self, registry: Registry, mounted: Mounted, minilm_on_disk: list[Any]
    ) -> None:
        mount = mounted(registry.s3_hub_cache())
        assert run(mount, "transformers_hub_cache", mount.path, env={"HF_HOME": str(mount.path)}) == minilm_on_disk


@pytest.mark.timeout(300)
class TestOverHttp:
    @pytest.mark.parametrize(
        ("program", "model"),
        [
            ("onnx_external_data", "onnx_external"),
            ("gguf_reader", "gguf"),
            ("llama_cpp_mapping", "gguf"),
            ("numpy_memmap", "numpy_arrays"),
            ("torch_load_mmap", "torch_file"),
            ("torch_load", "torch_file"),
        ],
    )
    def test_same_as_from_local_disk(
        self, warm: WarmPython, registry: Registry, mounted: Mounted, program: str, model: str
    ) -> None:
        mount = mounted(registry.web(model))
        local = registry.models / model
        same_as_local(warm, mount, program, local)
        mount.wait_quiet(prefetch=False)
        assert mount.origin_bytes <= size_below(local), "something crossed the network twice"


@pytest.mark.timeout(300)
def test_a_hub_cache_folder_with_its_links_works_as_hf_hub_cache(
    folder: origins.FolderOrigin, mounted: Mounted, models: Path, minilm_on_disk: list[Any]
) -> None:
    """As huggingface_hub lays it out: `blobs` by hash, and links to them under `snapshots`."""
    cache = folder.root / HUB_CACHE
    for part in ("blobs", "refs", f"snapshots/{SNAPSHOT}/1_Pooling"):
        (cache / part).mkdir(parents=True)
    (cache / "refs/main").write_text(SNAPSHOT)
    for number, file in enumerate(files_below(models / "minilm")):
        (cache / f"blobs/{number:040x}").hardlink_to(file)
        name = file.relative_to(models / "minilm")
        (cache / "snapshots" / SNAPSHOT / name).symlink_to("../" * (len(name.parts) + 1) + f"blobs/{number:040x}")
    mount = mounted(folder)
    hub = mount.path / "hub"
    assert run(mount, "transformers_hub_cache", hub, env={"HF_HUB_CACHE": str(hub)}) == minilm_on_disk

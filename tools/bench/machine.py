"""The machine: its description for the record, and its page cache, emptied before every cold pass."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "mfs",
    "pyfuse3",
    "trio",
    "safetensors",
    "torch",
    "boto3",
    "runai-model-streamer",
    "zstandard",
    "zipnn",
    "hf-xet",
)
_TOOLS = (("juicefs", "version"), ("rclone", "version"), ("s3fs", "--version"), ("radosgw", "--version"))


def describe(folder: Path) -> dict[str, Any]:
    """What a reader of the results must know. folder: where models and caches lie."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _first(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_total_kib() / 2**20, 1),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "disk": _disk(folder),
        "huge_pages_shmem": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": os.getloadavg(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "tools": {name: _output(name, flag).splitlines()[:1] for name, flag in _TOOLS if shutil.which(name)},
    }


def drop_page_cache() -> None:
    """Write dirty pages back, and have the kernel forget every clean one. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def memory_available_bytes() -> int:
    """MemAvailable."""
    text = Path("/proc/meminfo").read_text()
    return int(_first(r"MemAvailable:\s+(\d+)", text)) << 10


def _memory_total_kib() -> int:
    return int(_first(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()))


def _disk(folder: Path) -> dict[str, str]:
    """File system and block device below a folder."""
    fstype, _, source = _output("findmnt", "-n", "-o", "FSTYPE,SOURCE", "-T", str(folder)).partition(" ")
    source = source.strip()
    name = _output("lsblk", "-no", "NAME,ROTA,MODEL,TRAN", source).split("\n")[0] if source.startswith("/dev") else ""
    return {"file_system": fstype, "device": source, "name_rotational_model_transport": " ".join(name.split())}


def _chosen(path: str) -> str:
    try:
        return _first(r"\[(\w+)\]", Path(path).read_text())
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""

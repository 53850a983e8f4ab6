"""`mfs apply` on a real mount: what it fetches, pins and lets go is what the SSD tier then has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mfs.cache.residency import scan
from mfs.registry.folder_store import FolderStore
from mfs.testing.mounting import TestMount
from tests.mount import touching
from tests.mount.conftest import Mounted
from tests.mount.origins import FolderOrigin
from tests.registry.made import Registry

MIB = 1 << 20


def apply(mount: TestMount, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`mfs apply`, in the mount's own runtime directory."""
    file = mount.folder / "models.toml"
    file.write_text(text.replace("MOUNT", str(mount.path)))
    command = [sys.executable, "-m", "mfs", "apply", *options, str(file)]
    environment = os.environ | {"MFS_RUNTIME_DIR": str(mount.folder / "run")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def pinned(mount: TestMount) -> set[tuple[str, int]]:
    return {(item.path, item.ssd_bytes) for item in scan(mount.folder / "cache") if item.pinned}


def test_a_mount_comes_to_what_the_file_says(folder: FolderOrigin, mounted: Mounted) -> None:
    folder.put_all({"a/w.bin": os.urandom(5 * MIB), "a/c.json": b"{}", "b/w.bin": os.urandom(2 * MIB), "c/w": b"c"})
    mount = mounted(folder)
    mount.client.pin(["b"])
    mount.client.pin(["c"])
    list(mount.client.prefetch(["b", "c"], "ssd", wait=True))
    wanted = """
        [mounts."MOUNT".models]
        "a" = { tier = "ssd", pinned = true }
        "c" = { pinned = true }
    """
    check = apply(mount, wanted, "--check")
    assert (check.returncode, check.stdout.count("\n")) == (1, 2), check.stdout + check.stderr
    assert apply(mount, wanted).returncode == 0
    kept = {("a/w.bin", 5 * MIB), ("a/c.json", 2), ("c/w", 1)}
    assert pinned(mount) == kept | {("b/w.bin", 2 * MIB)}  # not named, so left alone
    before = mount.origin_bytes
    assert apply(mount, wanted, "--check").returncode == apply(mount, wanted).returncode == 0
    assert mount.origin_bytes == before

    wanted += '[mounts."MOUNT"]\nunpin = true\n'
    assert "b/w.bin: pinned in" in apply(mount, wanted, "--check").stdout
    assert apply(mount, wanted).returncode == 0
    assert pinned(mount) == kept
    assert apply(mount, wanted, "--check").returncode == 0


def test_a_version_that_left_the_tree_is_let_go(folder: FolderOrigin, mounted: Mounted) -> None:
    """Whoever pins what a tag means would otherwise fill the disk with what it meant before."""
    folder.put("m/w.bin", os.urandom(3 * MIB))
    mount = mounted(folder)
    wanted = '[mounts."MOUNT"]\nunpin = true\nmodels = { m = { tier = "ssd", pinned = true } }'
    assert apply(mount, wanted).returncode == 0
    folder.put("m/w.bin", os.urandom(2 * MIB))
    assert apply(mount, wanted).returncode == 0
    assert apply(mount, wanted, "--check").returncode == 0
    assert pinned(mount) == {("m/w.bin", 2 * MIB)}


def test_what_cannot_be_done_is_said(folder: FolderOrigin, mounted: Mounted) -> None:
    folder.put("m/w.bin", b"w")
    mount = mounted(folder, cache_dir=None)
    done = apply(mount, '[mounts."MOUNT".models]\n"m" = { tier = "ssd" }')
    assert (done.returncode, done.stdout) == (1, "")
    assert "mfs: this mount has no SSD cache" in done.stderr


def test_tags_move_and_the_mount_follows(tmp_path: Path, mounted: Mounted) -> None:
    root = tmp_path / "registry"
    registry = Registry(FolderStore(str(root)))
    v6 = registry.push("llama", "v6", {"same.json": b"{}", "w.bin": os.urandom(3 * MIB)})
    new = os.urandom(2 * MIB)
    v7 = registry.push("llama", "v7", {"same.json": b"{}", "w.bin": new})
    registry.move("llama", "prod", v6)
    mount = mounted(f"mfs+file://{root}")
    wanted = f"""
        [mounts."MOUNT".models]
        "llama/prod" = {{ tier = "ssd", pinned = true, revision = "sha256:{v7}" }}
        "llama/v7" = {{ pinned = false }}
        [registries."mfs+file://{root}"]
        tags = {{ "llama:prod" = "v7", "llama:stable" = "sha256:{v6}" }}
    """
    assert apply(mount, wanted.replace('"v7"', f'"sha256:{v6}"').replace(v7, v6)).returncode == 0
    check = apply(mount, wanted, "--check")
    assert check.returncode == 1
    assert check.stdout.splitlines() == [
        f"mfs+file://{root}/llama:prod: means sha256:{v6[:12]}, not sha256:{v7[:12]}",
        f"{mount.path}/llama/prod: shows revision sha256:{v6[:12]}, not sha256:{v7[:12]}",
    ]
    done = apply(mount, wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert mount.client.stat("llama/prod/same.json")["model_revision"] == f"llama@sha256:{v7}"
    assert mount.call(touching.read, f"{mount.path}/llama/prod/w.bin") == new
    assert apply(mount, wanted, "--check").returncode == 0
    missing = wanted.replace('"v7"', '"v9"').replace(f"sha256:{v6}", "sha256:" + "0" * 64)
    done = apply(mount, missing)
    assert (done.returncode, done.stdout) == (1, "")
    assert "llama@sha256:000000000000 is not there" in done.stderr
    assert "there is no such tag" in apply(mount, missing, "--check").stdout

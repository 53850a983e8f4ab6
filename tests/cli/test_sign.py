"""`mfs sign` and `mfs verify` of revisions, on a registry in a folder."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from mfs.registry import layout
from mfs.registry.folder_store import FolderStore
from tests.cli.conftest import Mfs
from tests.registry.keys import KeyPair, make_keys
from tests.registry.made import Registry

FILES = {"config.json": b"{}", "m.bin": random.Random(1).randbytes(3 << 20)}


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return make_keys(tmp_path, "team")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def pushed(root: Path) -> str:
    return Registry(FolderStore(str(root))).push("llama", "prod", FILES)


def test_sign_and_verify(mfs: Mfs, root: Path, pushed: str, keys: KeyPair, tmp_path: Path) -> None:
    url = f"mfs+file://{root}/llama:prod"
    assert "not signed" in mfs.error("verify", "--key", keys.public, url)
    text = mfs("sign", "--key", keys.private, url).stdout
    assert text.startswith(f"llama:prod, sha256:{pushed[:12]}: 2 files, 3.0 M signed by {keys.private} (")
    bundle = tmp_path / "llama.sig"
    done = mfs("verify", "--key", keys.public, "--bundle", bundle, f"mfs+file://{root}/llama@sha256:{pushed}")
    assert done.stdout == f"llama@sha256:{pushed[:12]}: 2 files, 3.0 M checked: all good; signed by {keys.public}\n"
    assert bundle.read_bytes().startswith(b'{"mediaType":')
    answer = mfs.json("verify", "--key", keys.public, url)
    assert answer == {
        "model": "llama", "manifest": f"sha256:{pushed}",
        "signed_by": mfs.json("sign", "--key", keys.private, url)["signed_by"],
        "checked_bytes": 2 + (3 << 20), "bad": [],
    }  # fmt: skip
    assert "whether it is signed was not asked" in mfs("verify", url).stdout


def test_what_is_bad_is_named(mfs: Mfs, root: Path, pushed: str, keys: KeyPair) -> None:
    url = f"mfs+file://{root}/llama:prod"
    mfs("sign", "--key", keys.private, url)
    chunks = sorted(path for path in (root / "chunks").rglob("*") if path.is_file() and path.stat().st_size > 1 << 19)
    content = bytearray(chunks[0].read_bytes())
    content[-1] ^= 1
    chunks[0].unlink()
    chunks[0].write_bytes(content)
    done = mfs("verify", "--key", keys.public, url, status=1)
    assert "checked: 1 fault found; signed by" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mfs: m.bin: chunk {chunks[0].name[:12]}: ")
    manifest = root / layout.manifest_key("llama", pushed)
    content = bytearray(manifest.read_bytes())
    manifest.unlink()
    manifest.write_bytes(content + b" ")
    assert "it was changed where it lies" in mfs.error("verify", url)
    assert "it was changed where it lies" in mfs.error("sign", "--key", keys.private, url)


def test_a_key_with_a_password(mfs: Mfs, root: Path, pushed: str, tmp_path: Path) -> None:
    pair = make_keys(tmp_path, "locked", password=b"hush")
    url = f"mfs+file://{root}/llama@sha256:{pushed}"
    assert "wants a password: set MFS_KEY_PASSWORD" in mfs.error("sign", "--key", pair.private, url)
    mfs("sign", "--key", pair.private, url, env=os.environ | {"MFS_KEY_PASSWORD": "hush"})
    mfs("verify", "--key", pair.public, url)


def test_what_is_no_revision(mfs: Mfs, root: Path, pushed: str, keys: KeyPair, tmp_path: Path) -> None:
    registry = f"mfs+file://{root}"
    for url in (registry, f"{registry}/llama"):
        assert "expected …/MODEL:TAG or …/MODEL@sha256:… of one revision" in mfs.error("verify", url, status=2)
    assert "no such tag" in mfs.error("sign", "--key", keys.private, f"{registry}/llama:none")
    assert "no registry" in mfs.error("verify", f"mfs+file://{tmp_path}/none/llama:prod")
    assert "one revision at a time" in mfs.error("verify", registry, "/mnt", status=2)
    assert "--bundle needs --key" in mfs.error("verify", "--bundle", "x", f"{registry}/llama:prod", status=2)
    assert "--key is for the URL" in mfs.error("verify", "--key", keys.public, tmp_path, status=2)
    assert "--endpoint-url is for the URL" in mfs.error("verify", "--endpoint-url", "http://x", tmp_path, status=2)


def test_push_signs_before_the_tag_moves(mfs: Mfs, root: Path, tmp_path: Path) -> None:
    pair = make_keys(tmp_path, "locked", password=b"hush")
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    url = f"mfs+file://{root}/llama:v1"
    assert "wants a password: set MFS_KEY_PASSWORD" in mfs.error("push", folder, url, "--sign", pair.private)
    assert not root.exists()  # said before anything was made
    mfs("push", folder, url, "--sign", pair.private, env=os.environ | {"MFS_KEY_PASSWORD": "hush"})
    assert mfs("verify", "--key", pair.public, url).stdout.endswith(f"all good; signed by {pair.public}\n")
    entries = [path.stat().st_mtime_ns for path in sorted((root / "tags").rglob("*")) if path.is_file()]
    signatures = [path.stat().st_mtime_ns for path in (root / "signatures").rglob("*.sig")]
    assert max(signatures) <= min(entries)

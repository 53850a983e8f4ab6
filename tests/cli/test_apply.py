"""`mfs apply`: what its file may say, and what it does with a mount; with a real one in tests/mount/test_apply.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfs.errors import ConfigError
from mfs.models_file import Wanted, WantedModel, WantedMount, WantedRegistry, read
from tests.cli.conftest import FakeMount, Mfs

ID = "sha256:" + "0123456789abcdef" * 4


def written(folder: Path, text: str) -> Path:
    file = folder / "models.toml"
    file.write_text(text)
    return file


def test_a_file_is_read(tmp_path: Path) -> None:
    text = f"""
        [mounts."/mnt/models"]
        unpin = true
        [mounts."/mnt/models".models]
        "llama-ft/prod" = {{ tier = "ssd", pinned = true, revision = "{ID}" }}
        "minilm/" = {{}}
        [mounts."/mnt/one/"]
        models = {{ "." = {{ tier = "ram" }} }}
        [registries."mfs+s3://models/registry"]
        profile = "publisher"
        tags = {{ "llama-ft:prod" = "v7", "llama:stable" = "{ID}" }}
    """
    assert read(written(tmp_path, text)) == Wanted(
        (
            WantedMount("/mnt/models", (WantedModel("llama-ft/prod", "ssd", True, ID), WantedModel("minilm")), True),
            WantedMount("/mnt/one", (WantedModel("", "ram"),)),
        ),
        (
            WantedRegistry(
                "mfs+s3://models/registry", {"llama-ft:prod": "v7", "llama:stable": ID}, {"profile": "publisher"}
            ),
        ),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mount = 1", "has no key 'mount': did you mean 'mounts'?"),
        ("mounts = 1", "expected tables named [mounts.NAME]"),
        ('[mounts."mnt"]', "[mounts.'mnt'] is no absolute path"),
        ('[mounts."/m"]\nmodel = {}', "has no key 'model': did you mean 'models'?"),
        ('[mounts."/m"]\nmodels = []', "expected a table of paths"),
        ('[mounts."/m"]\nunpin = 1', "unpin is 1: expected true or false"),
        ('[mounts."/m".models]\nllama = "ssd"', "expected a table such as"),
        ('[mounts."/m".models]\nllama = { pined = true }', "has no key 'pined': did you mean 'pinned'?"),
        ('[mounts."/m".models]\nllama = { tier = "vram" }', "tier is 'vram': expected \"ssd\" or \"ram\""),
        ('[mounts."/m".models]\nllama = { tier = ["ssd"] }', "tier is ['ssd']"),
        ('[mounts."/m".models]\nllama = { pinned = "yes" }', "pinned is 'yes': expected true or false"),
        ('[mounts."/m".models]\nllama = { revision = "v7" }', "revision is 'v7': expected \"sha256:\" and"),
        ('[mounts."/m".models]\n"/llama" = {}', "is no path inside the mount"),
        ('[mounts."/m".models]\n"a/../b" = {}', "is no path inside the mount"),
        ('[mounts."/m".models]\n"" = {}', "is no path inside the mount"),
        ('[mounts."/m".models]\n"a" = {}\n"a/b" = {}', "'a/b' lies in 'a', which is named too"),
        ('[mounts."/m".models]\n"." = {}\n"a" = {}', "'a' lies in '.', which is named too"),
        ('[registries."s3://b"]', "is no registry"),
        ('[registries."mfs+s3://b"]\ntag = {}', "has no key 'tag': did you mean 'tags'?"),
        ('[registries."mfs+s3://b"]\ntags = { "prod" = "v7" }', "'prod': expected \"model:tag\""),
        ('[registries."mfs+s3://b"]\ntags = { "llama:a/b" = "v7" }', "'llama:a/b': expected \"model:tag\""),
        ('[registries."mfs+s3://b"]\ntags = { "llama:prod" = "sha256:1" }', "is 'sha256:1': expected another"),
        ('[registries."mfs+s3://b"]\nprofile = 1', "profile: expected a string"),
        ("x", "is not TOML"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path, text))
    assert complaint in str(caught.value)
    assert "models.toml" in str(caught.value)


def test_differences_are_printed_settled_and_then_gone(mfs: Mfs, mnt: FakeMount, tmp_path: Path) -> None:
    file = written(tmp_path, f"""
        [mounts."{mnt.path}".models]
        "llama" = {{ tier = "ssd", pinned = true }}
        "minilm/model.safetensors" = {{ tier = "ssd", pinned = false }}
    """)  # fmt: skip
    lines = [
        f"{mnt / 'minilm/model.safetensors'}: 1 of 1 file pinned",
        f"{mnt / 'llama'}: 3 of 3 files not pinned",
        f"{mnt / 'llama'}: 10.0 M of 14.0 M not in the SSD tier",
    ]
    assert mfs("apply", "--check", file, status=1).stdout.splitlines() == lines
    assert mfs("apply", file).stdout.splitlines() == [f"settled: {line}" for line in lines]  # not: it still is so
    assert mfs("apply", "--check", file).stdout == mfs("apply", file).stdout == f"{file}: everything is as it says\n"
    assert {row["pinned"] for row in mfs.json("ls", mnt / "llama")} == {True}
    assert {row["pinned"] for row in mfs.json("ls", mnt / "minilm")} == {False}


def test_what_is_not_there_is_a_difference_that_stays(mfs: Mfs, mnt: FakeMount, tmp_path: Path) -> None:
    file = written(tmp_path, f'[mounts."{mnt.path}".models]\n"no" = {{}}\n"llama" = {{ tier = "ssd" }}')
    done = mfs("apply", file, status=1)
    assert done.stderr == f"mfs: still: {mnt / 'no'}: is not there: no does not exist in this mount\n"
    assert mfs.json("apply", "--check", file, status=1) == {
        "done": [],
        "left": [{"where": mnt / "no", "what": "is not there: no does not exist in this mount"}],
    }


def test_a_mount_that_is_not_there(mfs: Mfs, mnt: FakeMount, tmp_path: Path) -> None:
    assert "is not under an mfs mount" in mfs.error("apply", written(tmp_path, f'[mounts."{tmp_path}"]'))
    inside = written(tmp_path, f'[mounts."{mnt / "llama"}"]')
    assert "lies inside a mount: name its mount point" in mfs.error("apply", inside, status=2)
    assert "cannot be read" in mfs.error("apply", tmp_path / "none.toml")

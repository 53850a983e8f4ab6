"""`mfs push` and `mfs diff` as a person and a program meet them."""

from __future__ import annotations

import json
import os
import pickle
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import DEADLINE_S, Mfs
from tests.registry.models import tensors, trained, write_model
from tests.servers.docker_registry import DockerRegistry


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", tensors())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"mfs+file://{tmp_path}/reg"


def test_a_push_says_what_it_reused_compressed_and_saved(mfs: Mfs, base: Path, url: str, tmp_path: Path) -> None:
    first = mfs("push", base, f"{url}/llama:v1").stdout.splitlines()
    assert first[0].startswith("llama:v1 is sha256:")
    assert first[0].endswith("(new revision)")
    assert first[1].startswith("  2 files, ")
    assert [line.split()[0] for line in first[2:]] == ["compressed", "stored"]
    tuned = write_model(tmp_path / "tuned", trained(tensors(), 2, "layer"))
    second = mfs("push", tuned, f"{url}/tuned:v1", "--base", "llama:v1").stdout
    assert "differences saved" in second
    assert "against llama@sha256:" in second
    assert "reused" in second
    again = mfs("push", tuned, f"{url}/tuned:v1").stdout
    assert "a revision that was there, which the tag meant already" in again
    assert "0 new chunks" in again


def test_what_does_not_compress_is_no_negative_saving(mfs: Mfs, url: str, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise/w.bin").write_bytes(os.urandom(3_000_000))
    text = mfs("push", tmp_path / "noise", f"{url}/noise:v1").stdout
    assert "-" not in text.replace("w.bin", "")
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["headers", "stored"]


def test_an_annotation_that_is_no_text_is_refused(mfs: Mfs, base: Path, url: str) -> None:
    for address in (f"{url}/m:v1", "oci://localhost:1/m:v1"):
        done = mfs("push", base, address, "--annotate", os.fsdecode(b"a=\xff"), status=2)
        assert "--annotate" in done.stderr


def test_json_of_a_push_is_exact_and_adds_up(mfs: Mfs, base: Path, url: str) -> None:
    (base / ".git").mkdir()
    done = mfs("push", base, f"{url}/llama", "--json", "--annotate", "dataset=a=b")
    said = json.loads(done.stdout)
    assert (said["model"], said["tag"], said["new_revision"], said["left_out"]) == ("llama", "latest", True, [".git"])
    assert "left out, since their names begin with a dot: .git" in done.stderr
    total = said["reused_bytes"] + said["saved_by_compression_bytes"] + said["saved_by_differences_bytes"]
    assert said["total_bytes"] == total + said["stored_bytes"]
    none = mfs.json("push", base, f"{url}/other:v1", "--compress", "none", "--no-base")
    assert none["reused_bytes"] == none["total_bytes"]


def test_diff_says_what_two_revisions_share(mfs: Mfs, base: Path, url: str, tmp_path: Path) -> None:
    tuned = trained(tensors(), 2, "layer") | {"head": tensors(3)["head"][:100], "more": tensors(4)["layer.0.bias"]}
    del tuned["nothing"]
    mfs("push", base, f"{url}/llama:v1")
    mfs("push", write_model(tmp_path / "tuned", tuned), f"{url}/llama:v2")
    text = mfs("diff", f"{url}/llama:v1", f"{url}/llama:v2").stdout
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "differs" in lines["layer.0.weight"]
    assert "~" in lines["layer.0.weight"]
    assert "other shape" in lines["head"]
    assert "BF16 [160, 3400] → BF16 [100, 3400]" in lines["head"]
    assert "only in second" in lines["more"]
    assert "only in first" in lines["nothing"]
    assert "embedding" not in lines
    assert "the same: 2 tensors and 1 other file" in text
    full = mfs.json("diff", f"{url}/llama:v1", f"{url}/llama:v2", "--data")
    rows = {row["name"]: row for row in full["rows"]}
    assert rows["layer.1.weight"]["differing_share"] == pytest.approx(0.8, abs=0.01)  # of five steps one is none
    assert not rows["layer.1.weight"]["is_sampled"]
    assert rows["embedding"]["state"] == "same"
    assert full["same_bytes"] == sum(row["nbytes"] for row in full["rows"] if row["state"] == "same")
    same = mfs.json("diff", f"{url}/llama:v1", f"{url}/llama:v1")
    assert same["same_bytes"] + _header_bytes(base) == same["second_bytes"] == same["shared_chunks_bytes"]


def _header_bytes(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["--base", "llama:v1", "--no-base"], 2, "exclude each other"),
        (["--annotate", "words"], 2, "expected KEY=VALUE"),
        (["--base", "nothing:v1"], 1, "no such tag"),
        (["--modelcar"], 2, "for oci://"),
        (["--compress", "best"], 2, "'best' is not one of"),
    ],
)
def test_wrong_use_is_one_line(mfs: Mfs, base: Path, url: str, arguments: list[str], status: int, reason: str) -> None:
    assert reason in mfs.error("push", base, f"{url}/llama:v1", *arguments, status=status)


def test_wrong_places_are_one_line(mfs: Mfs, base: Path, url: str, tmp_path: Path) -> None:
    assert "not a registry" in mfs.error("push", base, "s3://bucket/llama:v1", status=2)
    assert "does not exist" in mfs.error("push", tmp_path / "nothing", f"{url}/llama:v1", status=2)
    address = f"{url}/llama@sha256:{64 * '0'}"
    assert "expected …/MODEL:TAG" in mfs.error("push", base, address, status=2)
    assert "no registry" in mfs.error("diff", f"{url}/llama:v1", f"{url}/llama:v2")
    (base / "model.pt").write_bytes(pickle.dumps({"a": list(range(50))}))
    assert "model.pt: a pickle" in mfs.error("push", base, f"{url}/llama:v1", status=2)
    assert not (tmp_path / "reg").exists()  # no registry is made for what is refused
    mfs("push", base, f"{url}/llama:v1", "--allow-pickle")


def test_there_is_a_bar_on_a_terminal(base: Path, url: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mfs", "push", str(base), f"{url}/llama:v1"]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # EIO: the other side is closed
            pass
        out, _ = process.communicate(timeout=DEADLINE_S)
    os.close(ours)
    assert process.returncode == 0
    assert out.startswith("llama:v1 is sha256:")
    assert b"hashing" in shown
    assert b"sending" in shown


def test_a_push_is_signed_before_it_is_seen(mfs: Mfs, base: Path, url: str, tmp_path: Path) -> None:
    key, public = tmp_path / "team.key", tmp_path / "team.pub"
    for command in (
        ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key],
        ["pkey", "-in", key, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True, timeout=DEADLINE_S)
    mfs("push", base, f"{url}/llama:v1", "--sign", key)
    mfs("verify", "--key", public, f"{url}/llama:v1")
    assert "public key" in mfs.error("push", base, f"{url}/llama:v2", "--sign", public)
    assert "no such tag" in mfs.error("diff", f"{url}/llama:v1", f"{url}/llama:v2")


def test_a_push_to_an_oci_registry(mfs: Mfs, base: Path, registry: DockerRegistry) -> None:
    address = f"oci://{registry.host}/team/llama:v3"
    said = mfs.json("push", base, address)
    assert (said["files_count"], said["sent_bytes"] + said["reused_bytes"]) == (2, said["nbytes"])
    assert "there already" in mfs("push", base, address).stdout
    assert "for mfs+…://" in mfs.error("push", base, address, "--compress", "none", status=2)

"""Processes of ours run our code alone, wherever somebody stands when he starts them."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

import mfs
from mfs import children
from mfs.testing import ramp

PACKAGES = Path(mfs.__file__).parents[1]
PLANTED = ("queue", "socket", "logging", "json", "mfs", "trio", "sitecustomize", "errno", "types", "torch")

THEIRS = {"mfs/cli/watch.py", "gpuload/cli/programs.py", "gpuload/cli/serving.py"}
"""Run a program that the user names, or his own command once more, as he would: in his directory and environment."""
OUTSIDE = {"mfs/testing/mounting.py", "mfs/testing/outside.py"}
"""Also run programs of tests, which import tests."""
STARTERS = {"mfs/children.py", "mfs/cli/standard.py"}
"""May name the interpreter. The second starts the command itself once more, as it was started."""


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("PYTHONPATH", "", None),
        ("PYTHONPATH", ":/opt/lib", "/opt/lib"),
        ("PYTHONPATH", "lib:.:/opt/a b:", "/opt/a b"),
        ("PYTHONHOME", "here", None),
        ("PYTHONSTARTUP", "/etc/startup.py", None),
        ("LD_PRELOAD", "./evil.so libjemalloc.so.2:/usr/lib/x.so", "libjemalloc.so.2:/usr/lib/x.so"),
        ("LD_LIBRARY_PATH", ":/opt/lib:", "/opt/lib"),
        ("PATH", "/usr/bin::bin:/bin", "/usr/bin:/bin"),
        ("AWS_CONFIG_FILE", "aws/config", "/here/aws/config"),
        ("AWS_CONFIG_FILE", "~/aws", "~/aws"),
        ("SSL_CERT_FILE", "/etc/ca.pem", "/etc/ca.pem"),
        ("HF_TOKEN", "relative/looking", "relative/looking"),
    ],
)
def test_nothing_is_looked_for_where_somebody_stands(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str, expected: str | None
) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    monkeypatch.setenv(name, given)
    assert children.environment().get(name) == expected


def test_a_directory_that_is_gone_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("AWS_CONFIG_FILE", "config")
    assert children.environment()["AWS_CONFIG_FILE"] == "config"


def test_of_another_process_no_code_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("HF_TOKEN", "new")
    old = {"PYTHONPATH": "/old/mfs", "LD_PRELOAD": "/old.so", "PATH": "/old", "HF_TOKEN": "old", "AWS_PROFILE": "old"}
    found = children.environment(old)
    assert "PYTHONPATH" not in found
    assert "LD_PRELOAD" not in found
    assert found["PATH"] != "/old"
    assert (found["HF_TOKEN"], found["AWS_PROFILE"]) == ("new", "old")


def test_every_child_of_both_packages_is_started_so() -> None:
    """In the sources themselves: one that is added later must not be forgotten."""
    found = []
    for file in [*PACKAGES.glob("mfs/**/*.py"), *PACKAGES.glob("gpuload/**/*.py")]:
        place = str(file.relative_to(PACKAGES))
        if place in THEIRS | OUTSIDE:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("subprocess.", "multiprocessing.")):
                words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if words.get("cwd") != "children.CWD" or "env" not in words:
                    found.append(f"{place}:{node.lineno}: {ast.unparse(node)[:80]}")
            names_python = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
            if names_python and place not in STARTERS:
                found.append(f"{place}:{node.lineno}: names the interpreter itself")
    assert not found


@pytest.mark.parametrize("how", ["foreground", "background"])
def test_modules_planted_in_the_working_directory_do_not_run(tmp_path: Path, how: str) -> None:
    """As root in somebody's directory, with every process of a mount: command, daemon, workers, probe of a dead one."""
    here, ran = tmp_path / "here", tmp_path / "ran"
    models, mnt = here / "models", here / "mnt"
    models.mkdir(parents=True)
    mnt.mkdir()
    (models / "a.bin").write_bytes(ramp(1000))
    for name in PLANTED:
        (here / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write('{name} ')\nraise SystemExit(3)\n")
    env = {**os.environ, "MFS_RUNTIME_DIR": "../run"}
    mfs_command = [
        *children.python("-c", "import sys; from mfs.cli import main; sys.argv[0] = 'mfs'; sys.exit(main())")
    ]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*mfs_command, *words], cwd=here, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    options = ["mount", "models", "mnt", "--ram-size", "64M", "--cache-dir", "cache"]
    if how == "foreground":
        with subprocess.Popen([*mfs_command, *options, "--foreground"], cwd=here, env=env) as daemon:
            for _ in range(200):
                if run("status", "mnt").returncode == 0 or daemon.poll() is not None:
                    break
            assert run("ls", "mnt").stdout.count("a.bin") == 1
            daemon.kill()
    else:
        done = run(*options)
        assert done.returncode == 0, done.stderr
        assert run("ls", "mnt").stdout.count("a.bin") == 1
    done = run("umount", "mnt")
    assert done.returncode == 0, done.stderr
    assert (here / "cache" / "mfs-cache.json").exists()
    assert not ran.exists(), ran.read_text()

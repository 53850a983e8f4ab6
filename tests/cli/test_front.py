"""Help, usage errors, completion: the command before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfs.cli.app import cli
from tests.cli.conftest import Mfs

COMMANDS = sorted(cli.commands)


PAGES = [(), *((name,) for name in COMMANDS), ("config", "show"), ("config", "check")]
PAGES += [("triton", "backend"), ("triton", "init")]


@pytest.mark.parametrize("command", PAGES)
def test_every_command_has_its_page(mfs: Mfs, command: tuple[str, ...]) -> None:
    text = mfs(*command, "--help").stdout
    assert text.startswith("Usage: mfs")
    if command not in (("config",), ("triton",)):
        assert "Exit status:" in text
        assert "Examples:" in text or command == ("version",)
    assert max(map(len, text.splitlines())) <= 100


def test_the_front_page_names_every_command(mfs: Mfs) -> None:
    text = mfs("--help").stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "..." not in text.partition("Mount:")[2].partition("Examples:")[0]  # no summary was cut off


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from mfs.cli import main; main(['--help']); "
        "print({'rich', 'trio', 'boto3', 'numpy', 'pyfuse3', 'http.client', 'tomllib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("ls", "--nonsense"), "ls: No such option"),
        (("stat",), "stat: Missing argument 'PATH...'"),
        (("prefetch", "--tier", "vram", "/x"), "prefetch: Invalid value for '--tier'"),
        (("mount",), "SOURCE and MOUNTPOINT are both needed"),
        (("mount", "s3://x"), "SOURCE and MOUNTPOINT are both needed"),
        (("mount", "s3://x", "/m", "--ram-size", "1GB"), "'--ram-size': ambiguous size"),
        (("mount", "s3://x", "/m", "--timeout", "soon"), "'--timeout': not a duration"),
        (("mount", "s3://x", "/m", "--umask", "8"), "'--umask': is '8': expected octal"),
        (("mount", "s3://x", "/m", "--cache-size", "1G"), "--cache-size is of the SSD tier, and there is none"),
        (("umount", "/m", "--timeout", "soon"), "--timeout: not a duration"),
        (("status", "--watch"), "--watch needs a PATH"),
        (("status", "/x", "--cache-dir", "/y"), "--cache-dir stands alone"),
        (("ls", ""), "an empty path"),
        (("mount", "", "/m"), "SOURCE is an empty path"),
        (("mount", "s3://x", ""), "MOUNTPOINT is an empty path"),
        (("mount", "s3://x", "/m", "--cache-dir", ""), "--cache-dir is an empty path"),
        (("doctor", "--quick", ""), "SOURCE is an empty path"),
        (("estimate", ""), "SOURCE is an empty path"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(mfs: Mfs, args: tuple[str, ...], complaint: str) -> None:
    assert complaint in mfs.error(*args, status=2)


@pytest.mark.parametrize("command", [("mfs",), ("mfs", "triton"), ("gpuload",)])
def test_a_command_alone_shows_its_page_as_wrong_usage(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Usage: {' '.join(command)} [OPTIONS] COMMAND")
    assert len(done.stderr.splitlines()) > 10  # a page, not a line


def test_older_releases_of_click_are_enough() -> None:
    """Before 8.4 its types take no parameters when the program runs, and other programs hold it there."""
    program = (
        "import click; click.ParamType.__class_getitem__ = None; "
        "import mfs.cli.app, gpuload.cli.app; print(mfs.cli.app.cli.name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cli\n", "")


@pytest.mark.parametrize("name", ["mfs", "gpuload"])
def test_ctrl_c_while_a_command_imports_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, "-c", f"import sys, {name}.cli; sys.exit({name}.cli.main())", "version"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: interrupted\n")


def test_a_path_outside_any_mount(mfs: Mfs, tmp_path: Path) -> None:
    for command in (
        "ls",
        "stat",
        "status",
        "prefetch",
        "pin",
        "unpin",
        "evict",
        "refresh",
        "verify",
        "config",
        "umount",
    ):
        assert f"{tmp_path} is not under an mfs mount" in mfs.error(command, tmp_path)


def test_hostile_names_do_not_reach_the_terminal(mfs: Mfs) -> None:
    assert "\\x1b[2Jx is not under" in mfs.error("ls", "/tmp/\x1b[2Jx")
    assert "a b is not under" in mfs.error("ls", "/tmp/a\nb")


def test_debug_shows_where(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mfs", "--debug", "ls", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_version(mfs: Mfs) -> None:
    assert mfs("--version").stdout == mfs("version").stdout.partition(" (")[0] + "\n"
    assert set(mfs.json("version")) == {"mfs", "python", "pyfuse3", "trio", "boto3", "kernel"}


def test_output_into_a_closed_pipe_is_no_error_message() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mfs", "completion", "bash"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(mfs: Mfs, shell: str) -> None:
    assert "_MFS_COMPLETE" in mfs("completion", shell).stdout


def complete(mfs: Mfs, tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`, by the script itself."""
    script = mfs("completion", "bash").stdout
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(exist_ok=True)
    command = bin_dir / "mfs"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mfs "$@"\n')
    command.chmod(0o755)
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f'{script}\ncompopt() {{ echo "compopt $1 $2"; }}\n'
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        f'_mfs_completion mfs "{words[-1]}" "{words[-2]}"\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    environment = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split("\n")


def test_bash_completes_commands_options_and_paths(mfs: Mfs, tmp_path: Path) -> None:
    assert {"prefetch", "pin"} <= set(complete(mfs, tmp_path, "mfs", "p"))
    assert {"--tier", "--no-wait", "--json"} <= set(complete(mfs, tmp_path, "mfs", "prefetch", "--"))
    assert {"ssd", "ram"} <= set(complete(mfs, tmp_path, "mfs", "prefetch", "--tier", ""))
    assert "compopt -o default" in complete(mfs, tmp_path, "mfs", "ls", "/mnt/mo")
    assert "compopt -o default" in complete(mfs, tmp_path, "mfs", "prefetch", "/a", "/mnt/mo")

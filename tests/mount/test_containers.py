"""Servers that are not root, and containers: other users, mount and network namespaces, propagation, and a mount whose
daemon belongs to an ordinary user.

A container is made by hand from what a runtime uses (unshare, bind mounts, setpriv); no runtime is installed here.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins

SIZE = (5 << 20) + 17
DIGEST = hashlib.sha256(ramp(SIZE)).hexdigest()
DEADLINE_S = 30
USER, GROUP = 4321, 4322
NOBODY = pwd.getpwnam("nobody")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and being others takes root")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="mfs-c-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def shared(place: Path) -> Iterator[Path]:
    """A mount point whose mounts propagate, as /mnt does on a host with systemd; mounts of mfs go below it."""
    path = place / "shared"
    path.mkdir()
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "--make-rshared", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def weights(folder: origins.FolderOrigin) -> origins.FolderOrigin:
    folder.put_all({"llama/w.bin": ramp(SIZE), "llama/config.json": b"{}"})
    return folder


def run(*command: str | Path, uid: int = USER, gid: int = GROUP, groups: str = "") -> subprocess.CompletedProcess[str]:
    """A command as another user."""
    who = [f"--reuid={uid}", f"--regid={gid}", f"--groups={groups}" if groups else "--clear-groups"]
    argv = ["setpriv", *who, "--no-new-privs", "--", *map(str, command)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


class Container:
    """A process in mount and network namespaces of its own, into which a directory is bound read-only."""

    def __init__(self, outside: Path, inside: Path, propagation: str = "private") -> None:
        inside.mkdir()
        script = (
            'mount --rbind "$1" "$2" && mount -o remount,bind,ro "$2" && mount --make-r$3 "$2" && '
            "echo ready && exec sleep infinity"
        )
        unshare = ["unshare", "--mount", "--net", "--propagation", "slave", "--"]
        argv = [*unshare, "sh", "-c", script, "sh", str(outside), str(inside), propagation]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.inside = inside
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, *command: str | Path, **who: int) -> subprocess.CompletedProcess[str]:
        """A command in there, as another user."""
        enter = ["nsenter", f"--target={self._process.pid}", "--mount", "--net", "--"]
        uid, gid = who.get("uid", USER), who.get("gid", GROUP)
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs", "--"]
        argv = [*enter, *drop, *map(str, command)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    def digest(self, path: str) -> str:
        """sha256 of a file in there, or what the tool says."""
        done = self.run("sha256sum", self.inside / path)
        return done.stdout.split()[0] if done.returncode == 0 else done.stderr.strip()

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait(DEADLINE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


class TestUsers:
    def test_another_user_reads_with_allow_other(self, weights: origins.FolderOrigin, place: Path) -> None:
        """Bytes, names and modes are the same for everybody; writing fails for everybody, root too."""
        with TestMount(place / "m", weights.url, allow_other=True, umask=0) as mount:
            file = mount.path / "llama" / "w.bin"
            assert run("sha256sum", file).stdout.split()[0] == DIGEST
            assert run("stat", "-c", "%a %s %u", file).stdout == f"444 {SIZE} 0\n"
            assert run("stat", "-c", "%a", file.parent).stdout == "555\n"
            assert run("ls", mount.path / "llama").stdout.split() == ["config.json", "w.bin"]
            assert "Read-only file system" in run("touch", mount.path / "new").stderr
            assert "Read-only file system" in run("touch", mount.path / "new", uid=0, gid=0).stderr

    def test_without_allow_other_nobody_else_gets_in(self, weights: origins.FolderOrigin, place: Path) -> None:
        """Not even to look at the names."""
        with TestMount(place / "m", weights.url) as mount:
            assert "Permission denied" in run("ls", mount.path).stderr
            assert run("sha256sum", mount.path / "llama" / "w.bin", uid=0, gid=0).stdout.split()[0] == DIGEST

    def test_owner_group_and_umask_decide_who_reads(self, weights: origins.FolderOrigin, place: Path) -> None:
        """The kernel checks the modes shown: the owner and members of the group read, others do not."""
        with TestMount(place / "m", weights.url, allow_other=True, uid=USER, gid=GROUP, umask=0o027) as mount:
            file = mount.path / "llama" / "w.bin"
            assert run("stat", "-c", "%a %u %g", file).stdout == f"440 {USER} {GROUP}\n"
            assert run("stat", "-c", "%a", file.parent).stdout == "550\n"
            assert run("sha256sum", file, gid=1).stdout.split()[0] == DIGEST
            assert run("sha256sum", file, uid=77, groups=str(GROUP)).stdout.split()[0] == DIGEST
            assert "Permission denied" in run("cat", file, uid=77, gid=78).stderr


class TestContainers:
    def test_a_container_without_a_network_reads_as_another_user(
        self, weights: origins.FolderOrigin, place: Path
    ) -> None:
        """Read-only bind mount, no network, no rights: the bytes come through the host's daemon."""
        with TestMount(place / "m", weights.url, allow_other=True) as mount, \
                Container(mount.path, place / "models") as container:  # fmt: skip
            assert container.run("ls", "/sys/class/net").returncode == 0
            assert "inet " not in container.run("ip", "-4", "addr").stdout
            assert container.digest("llama/w.bin") == DIGEST
            assert "Read-only file system" in container.run("touch", place / "models" / "x").stderr
            refreshed = ramp(SIZE, 5)
            weights.put("llama/w.bin", refreshed)
            mount.client.refresh()
            assert container.digest("llama/w.bin") == hashlib.sha256(refreshed).hexdigest()

    def test_a_bound_mount_survives_a_handover(self, weights: origins.FolderOrigin, place: Path) -> None:
        """Without any propagation: it is the same mount, with another daemon."""
        with TestMount(place / "m", weights.url, allow_other=True) as mount, \
                Container(mount.path, place / "models") as container:  # fmt: skip
            assert container.digest("llama/config.json") == hashlib.sha256(b"{}").hexdigest()
            mount.hand_over()
            assert container.digest("llama/w.bin") == DIGEST

    def test_a_container_started_before_the_mount_sees_it_and_its_successors(
        self, weights: origins.FolderOrigin, place: Path, shared: Path
    ) -> None:
        """The parent directory bound with rslave: a mount, a handover, a mount that replaces a crashed one, all show;
        a remount too.
        """
        folder = shared / "m"
        folder.mkdir()
        mount = TestMount(folder, weights.url, allow_other=True, cache_dir=place / "cache")
        with Container(shared, place / "inside", "slave") as container:
            assert "No such file" in container.digest("m/mnt/llama/w.bin")
            with mount:
                assert container.digest("m/mnt/llama/w.bin") == DIGEST
                mount.hand_over()
                assert container.digest("m/mnt/llama/w.bin") == DIGEST
                mount.kill(detach=False)
                assert "Transport endpoint is not connected" in container.digest("m/mnt/llama/w.bin")
                mount.detach()
                mount.start()
                assert container.digest("m/mnt/llama/w.bin") == DIGEST
            assert "No such file" in container.digest("m/mnt/llama/w.bin")

    def test_without_propagation_a_container_sees_only_what_was_mounted_before(
        self, weights: origins.FolderOrigin, place: Path, shared: Path
    ) -> None:
        """Why the recipes say rslave: a private bind shows neither a later mount nor the one that replaces a crashed
        one.
        """
        folder = shared / "m"
        folder.mkdir()
        mount = TestMount(folder, weights.url, allow_other=True, cache_dir=place / "cache")
        with Container(shared, place / "early", "private") as early, mount:
            assert "No such file" in early.digest("m/mnt/llama/w.bin")
            with Container(shared, place / "late", "private") as late:
                assert late.digest("m/mnt/llama/w.bin") == DIGEST
                mount.kill()
                mount.start()
                assert "Transport endpoint is not connected" in late.digest("m/mnt/llama/w.bin")


def closed_ancestor(path: str) -> str:
    """The topmost directory on the way to `path` that others may not enter; '' if there is none."""
    for folder in reversed(Path(path).parents):
        if not folder.stat().st_mode & 0o001:
            return str(folder)
    return ""


class TestOrdinaryUser:
    """`mfs mount` without root: fusermount3 mounts, and everything else works as for root."""

    def script(self, place: Path, body: str, uid: int = NOBODY.pw_uid) -> subprocess.CompletedProcess[str]:
        """Shell text as an ordinary user, in a mount namespace where /dev/fuse and this Python are everybody's, as on
        a usual machine.
        """
        device, home = place / "fuse", place / "home"
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        device.chmod(0o666)
        for folder in (home, place / "base"):
            folder.mkdir()
        os.chown(home, uid, NOBODY.pw_gid)
        opened = closed_ancestor(sys.base_prefix)
        (place / "outer").write_text(
            "set -e\n"
            + f"mount --bind '{device}' /dev/fuse\n"
            + (
                f"mount --bind '{sys.base_prefix}' '{place}/base'\n"
                f"mount -t tmpfs -o mode=755 none '{opened}'\n"
                f"mkdir -p '{sys.base_prefix}'\n"
                f"mount --move '{place}/base' '{sys.base_prefix}'\n"
                if opened
                else ""
            )
            + f"exec setpriv --reuid={uid} --regid={NOBODY.pw_gid} --clear-groups -- "
            f"env HOME={home} XDG_RUNTIME_DIR={home} bash '{place}/inner'\n"
        )
        (place / "inner").write_text(
            f"set -e\ncd '{home}'\nmfs() {{ '{sys.executable}' -P -m mfs \"$@\"; }}\n{textwrap.dedent(body)}"
        )
        environment = {name: value for name, value in os.environ.items() if name != "MFS_RUNTIME_DIR"}
        argv = ["unshare", "--mount", "--propagation", "private", "--", "bash", str(place / "outer")]
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=120, check=False,
            env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip

    @pytest.fixture
    def registry(self, weights: origins.FolderOrigin, place: Path) -> Path:
        """The models, where everybody can read them."""
        if not os.stat(shutil.which("fusermount3") or "/").st_mode & stat.S_ISUID:
            pytest.skip("fusermount3 is not installed with its set-uid bit")
        shutil.copytree(weights.url.removeprefix("file://"), place / "registry")
        return place / "registry"

    def test_mount_read_hand_over_unmount(self, registry: Path, place: Path) -> None:
        done = self.script(
            place,
            f"""
            mkdir mnt cache
            mfs mount {registry} mnt --ram-size 64M --cache-dir cache
            stat -c '%u %g %a' mnt/llama/w.bin
            mfs prefetch --tier ssd mnt > prefetched
            mfs status --json mnt | grep -o 'only root may ask for it'
            exec 5< mnt/llama/w.bin
            sha256sum < mnt/llama/w.bin
            mfs mount --handover mnt
            sha256sum <&5
            exec 5<&-
            mfs status mnt > status
            mfs umount mnt
            ls mnt | wc -l
        """,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert f"{NOBODY.pw_uid} {NOBODY.pw_gid} 444" in lines
        assert lines.count(f"{DIGEST}  -") == 2
        assert "only root may ask for it" in lines  # whole files are read through the daemon
        assert any("taken over from pid" in line for line in lines)
        assert lines[-2:] == [f"{place}/home/mnt unmounted", "0"]

    def test_a_crash_is_a_pause_and_one_of_the_holder_too_heals(self, registry: Path, place: Path) -> None:
        done = self.script(
            place,
            f"""
            mkdir mnt
            mfs mount {registry} mnt --ram-size 64M
            pid() {{ mfs status --json mnt | grep -o '"pid": [0-9]*' | head -1 | cut -d' ' -f2; }}
            daemon=$(pid)
            exec 5< mnt/llama/w.bin
            kill -9 $daemon
            sha256sum <&5
            exec 5<&-
            until daemon=$(pid) && [ "$daemon" ]; do sleep 0.1; done
            kill -9 $(ps -o ppid= -p $daemon) $daemon
            while ls mnt 2> /dev/null; do :; done
            mfs mount {registry} mnt --ram-size 64M
            sha256sum < mnt/llama/w.bin
            mfs umount mnt
        """,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "replaced a stale mount" in done.stderr
        assert done.stdout.count(f"{DIGEST}  -") == 2

    def test_allow_other_needs_the_administrators_leave(self, registry: Path, place: Path) -> None:
        """The error says where it is given."""
        if "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
            pytest.skip("user_allow_other is set on this machine")
        done = self.script(place, f"mkdir mnt; mfs mount {registry} mnt --ram-size 64M --allow-other")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "user_allow_other" in line
        assert "/etc/fuse.conf" in line

    def test_a_user_without_a_name_is_told_why_it_cannot_mount(self, registry: Path, place: Path) -> None:
        """As uids are that a cluster makes up."""
        done = self.script(place, f"mkdir mnt; mfs mount {registry} mnt --ram-size 64M", uid=USER)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert f"uid {USER} is not in /etc/passwd" in line

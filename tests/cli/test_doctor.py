"""`mfs doctor`: what it finds, provoked for real: limits, file systems, namespaces, groups, clocks, credentials."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mfs import limits
from mfs.cache.ram import PROCESS_BYTES
from mfs.findings import Level
from mfs.fuse import kernel as fuse_kernel
from mfs.planning import disk, kernel, machine, origin
from mfs.planning.doctor import _traces
from mfs.planning.wanted import Wanted
from mfs.units import parse_size
from tests.cli.conftest import DEADLINE_S, FakeMount, Mfs
from tests.servers.nginx import NginxServer
from tests.servers.relay import Relay
from tests.servers.swift import SwiftServer

MFS = [sys.executable, "-m", "mfs"]
CANARY = "c4n4ry-s3cr3t"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and groups are root's to make")

Found = dict[str, dict[str, str]]


def doctor(
    *args: str | Path, status: int | None = 0, before: str = "", wrap: tuple[str, ...] = (), **env: str
) -> Found:
    """Findings by what they are about. before: shell that runs first, in this process. wrap: a program around it."""
    command = [*wrap, "bash", "-c", f'{before}\nexec "$@"', "doctor", *MFS, "doctor", *map(str, args), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env=os.environ | env, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert status is None or done.returncode == status, f"{done.stdout}\n{done.stderr}"
    assert CANARY not in done.stdout + done.stderr
    found: Found = {one["what"]: one for one in json.loads(done.stdout)["findings"]}
    assert all(one["advice"] for one in found.values() if one["level"] in ("warning", "fault"))
    return found


def level_of(found: Found, what: str) -> str:
    return found[what]["level"]


# -- this machine


def test_this_machine_alone(mfs: Mfs) -> None:
    found = doctor(status=None)
    assert {"kernel", "pyfuse3", "/dev/fuse", "descriptors", "memory", "processors", "cache"} <= set(found)
    assert set(found["kernel"]) == {"what", "level", "value", "advice"}
    assert os.uname().release in found["kernel"]["value"]
    lines = mfs("doctor", "--ram-size", "100000T", status=1).stdout.splitlines()
    assert lines[0].split() == ["WHAT", "LEVEL", "VALUE", "WHAT", "TO", "DO"]
    starts = {line.index("fault") for line in lines if line.startswith("memory ")}
    assert starts == {lines[0].index("LEVEL")}, "aligned"
    assert "1 fault" in lines[-1]


def test_traces_that_cannot_be_had_are_said() -> None:
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert list(_traces({})) == []
    assert [found.level for found in _traces(asked)] == [Level.OK]
    [found] = _traces(asked | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert (found.level, "'grpc'" in found.value) == (Level.WARNING, True)
    assert "http/protobuf" in found.advice


def test_one_truth_of_what_the_kernel_has() -> None:
    assert kernel._SINCE == fuse_kernel.PASSTHROUGH_SINCE
    assert kernel._release("6.8.0-31").level == "warning"
    assert kernel._release("6.9.0").level in ("ok", "note")
    assert kernel._release("strange").level == "note"


def test_limits_of_a_shell_show() -> None:
    found = doctor(before="ulimit -n 300; ulimit -f 4000", status=1)
    assert found["descriptors"]["value"] == "300 open files, up to 300"
    assert "LimitNOFILE" in found["descriptors"]["advice"]
    assert level_of(found, "descriptors") == "warning"
    assert level_of(found, "file size") == "fault"
    assert "ulimit -f unlimited" in found["file size"]["advice"]


def test_memory_that_does_not_fit_is_a_fault() -> None:
    found = doctor("--ram-size", "100000T", status=1)
    assert level_of(found, "memory") == "fault"
    assert "lower --ram-size" in found["memory"]["advice"]
    traced = doctor("--ram-size", "100000T", status=1, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert for_processes(traced) - for_processes(found) == PROCESS_BYTES


def for_processes(found: dict[str, dict[str, str]]) -> int:
    said = re.search(r"and (\S+ \S+) for processes", found["memory"]["value"])
    assert said is not None
    return parse_size(said[1])


def test_what_a_container_lacks(tmp_path: Path) -> None:
    root = tmp_path
    for folder in ("proc/self", "dev", "sys/kernel/mm/transparent_hugepage", "etc"):
        (root / folder).mkdir(parents=True)
    (root / "proc/filesystems").write_text("nodev\tproc\n\text4\n")
    (root / "proc/self/status").write_text("CapEff:\t00000000a80425fb\n")
    found = {one.what: one for one in kernel.examine(Wanted(), root)}
    assert [found[what].level for what in ("fuse module", "/dev/fuse")] == ["fault", "fault"]
    assert "--device /dev/fuse" in found["/dev/fuse"].advice
    if os.geteuid() == 0:
        assert "--cap-add SYS_ADMIN" in found["mounting"].advice
    place = root / "sys/kernel/mm/transparent_hugepage"
    (place / "enabled").write_text("always [never]\n")
    (place / "shmem_enabled").write_text("never [deny] force\n")
    assert machine._huge_pages(root).level == "warning"


def test_other_users_need_a_line_in_fuse_conf(tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    conf.write_text("#user_allow_other\n")
    assert kernel._allow_other(conf, Wanted()).level == "note"
    assert kernel._allow_other(conf, Wanted(allow_other=True)).level == "fault"
    conf.write_text("mount_max = 1000\nuser_allow_other\n")
    assert kernel._allow_other(conf, Wanted(allow_other=True)).level == "ok"


@needs_root
def test_a_group_above_limits_processors_and_processes() -> None:
    """The group of the process itself says nothing; the one above it does."""
    made: list[Path] = []
    name = f"mfs-test-{uuid.uuid4().hex[:8]}"
    try:
        places = {}
        for controller, file, value in (("cpu", "cpu.cfs_quota_us", "50000"), ("pids", "pids.max", "400")):
            top = Path("/sys/fs/cgroup", controller)
            if not (top / "cgroup.procs").exists():
                pytest.skip(f"no control group of version 1 for {controller} here")
            try:
                for group in (top / name, top / name / "inner"):
                    group.mkdir()
                    made.append(group)
                (top / name / file).write_text(value)
            except OSError as error:
                pytest.skip(f"control groups cannot be made here: {error}")
            places[controller] = top / name / "inner"
        enter = "\n".join(f"echo $$ > {place}/cgroup.procs" for place in places.values())
        found = doctor("--quick", before=enter, status=None)
        assert found["processors"]["value"].startswith("0.5 of ")
        assert f"{name} (cpu.cfs_quota_us)" in found["processors"]["value"]
        assert level_of(found, "processors") == "warning"
        assert f"{name} (pids.max)" in found["processes"]["value"]
        assert level_of(found, "processes") == "warning"
        assert "TasksMax" in found["processes"]["advice"]
    finally:
        for group in reversed(made):
            deadline = time.monotonic() + 5
            while group.exists() and time.monotonic() < deadline:
                try:
                    group.rmdir()
                except OSError:  # the kernel is still taking the last process out of it
                    time.sleep(0.02)


@pytest.mark.parametrize(("text", "cpus"), [("max 100000", None), ("150000 100000", 1.5), ("20000 100000", 0.2)])
def test_a_quota_of_version_2(tmp_path: Path, text: str, cpus: float | None) -> None:
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (group.parent / "cpu.max").write_text(f"{text}\n")
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    found = limits.cpus(tmp_path)
    own = len(os.sched_getaffinity(0))
    assert found.value == (own if cpus is None else min(own, cpus))
    assert ("/sys/fs/cgroup/a (cpu.max)" in found.bound_by) == (cpus is not None and cpus < own)


def test_a_stale_mount_is_named_with_its_cure(fake_mount: Callable[..., FakeMount]) -> None:
    dead, living = fake_mount("dead"), fake_mount("living")
    dead.kill()
    found = doctor(status=None)
    assert found[f"mount {dead.path}"]["advice"] == f"mfs umount {dead.path}"
    assert level_of(found, f"mount {dead.path}") == "warning"
    assert level_of(found, f"mount {living.path}") == "note", "it has no holder"


# -- the cache


def in_mounts(script: str) -> dict[str, Any]:
    """Run behind `script` in a mount namespace of its own, which takes everything away with it."""
    return {"wrap": ("unshare", "-m", "--propagation", "private"), "before": f"set -e\n{script}"}


@needs_root
def test_a_small_tmpfs_is_no_cache(tmp_path: Path) -> None:
    found = doctor("--cache-dir", tmp_path / "c", "--quick", status=1,
                   **in_mounts(f"mount -t tmpfs -o size=3m t {tmp_path}"))  # fmt: skip
    assert level_of(found, "cache: file system") == "warning"
    assert "this is memory" in found["cache: file system"]["advice"]
    assert level_of(found, "cache: free space") == "fault"
    assert "not one chunk fits" in found["cache: free space"]["advice"]


@needs_root
def test_a_small_ext4_is_measured_and_its_size_is_advised(tmp_path: Path) -> None:
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    image.touch()
    os.truncate(image, 256 << 20)
    if shutil.which("mkfs.ext4", path="/sbin:/usr/sbin") is None:
        pytest.skip("no mkfs.ext4 here")
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    tried = subprocess.run(["unshare", "-m", "mount", "-o", "loop", image, place], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no loop devices here: {tried.stderr}")
    found = doctor("--cache-dir", place / "c", "--cache-size", "10G", status=0,
                   **in_mounts(f"mount -o loop {image} {place}; mkdir {place}/c"))  # fmt: skip
    assert "ext4" in found["cache: file system"]["value"]
    assert level_of(found, "cache: free space") == "warning"
    assert found["cache: free space"]["advice"].startswith("say --cache-size ")
    assert level_of(found, "cache: holes") == "ok"
    assert found["cache: reflinks"]["value"].startswith("not possible")
    assert "GB/s" in found["cache: speed"]["value"]


@needs_root
def test_a_containers_own_layer_is_no_place_for_a_cache(tmp_path: Path) -> None:
    layers = " ".join(str(tmp_path / name) for name in ("low", "up", "work", "all"))
    options = f"lowerdir={tmp_path}/low,upperdir={tmp_path}/up,workdir={tmp_path}/work"
    found = doctor("--cache-dir", tmp_path / "all" / "c", "--quick", status=None,
                   **in_mounts(f"mkdir {layers}; mount -t overlay -o {options} o {tmp_path}/all"))  # fmt: skip
    assert "overlay" in found["cache: file system"]["value"]
    assert "volume" in found["cache: file system"]["advice"]


@needs_root
def test_a_disk_that_is_read_only_is_a_fault(tmp_path: Path) -> None:
    found = doctor("--cache-dir", tmp_path / "c", "--quick", status=1,
                   **in_mounts(f"mkdir {tmp_path}/c; mount -t tmpfs -o ro t {tmp_path}/c"))  # fmt: skip
    assert level_of(found, "cache") == "fault"


def test_what_is_no_cache_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert level_of(doctor("--cache-dir", tmp_path / "file", "--quick", status=1), "cache") == "fault"
    found = doctor("--cache-dir", tmp_path / "new" / "c", "--quick", status=None)
    assert "not there yet" in found["cache"]["value"]
    assert not (tmp_path / "new").exists(), "looking makes nothing"


def test_looking_at_a_cache_changes_nothing(tmp_path: Path) -> None:
    """Not the mode of one that a mount would mend either, nor, with --quick, the time at which it was changed."""
    place = tmp_path / "c"
    place.mkdir()
    place.chmod(0o777)
    os.utime(place, ns=(0, 0))
    assert level_of(doctor("--cache-dir", place, "--quick", status=None), "cache") == "ok"
    assert (place.stat().st_mode & 0o777, place.stat().st_mtime_ns) == (0o777, 0)
    (place / "x").touch()
    found = doctor("--cache-dir", place, "--quick", status=1)
    assert "has mode 0777" in found["cache"]["value"], "what a mount would refuse is refused"


@needs_root
def test_directories_that_are_not_ours_to_enter(tmp_path: Path) -> None:
    """Those of another user, as after `su` without a new session."""
    closed = tmp_path / "closed"
    (closed / "cache").mkdir(parents=True)
    closed.chmod(0o700)
    code = (
        "import os, json; from pathlib import Path\n"
        "from mfs.errors import AccessError; from mfs.planning.cached import Cached\n"
        "from mfs.planning import disk, mounts; from mfs.planning.wanted import Wanted\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n    Cached(Path(os.environ['CLOSED'], 'cache')); raise SystemExit('taken for empty')\n"
        "except AccessError: pass\n"
        "found = [*mounts.examine(), *disk.examine(Wanted(cache_dir=Path(os.environ['CLOSED'], 'cache')))]\n"
        "print(json.dumps({one.what: one.level for one in found}))\n"
    )
    env = os.environ | {"CLOSED": str(closed), "MFS_RUNTIME_DIR": str(closed / "run")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    levels = json.loads(done.stdout)
    assert (levels["cache"], levels["runtime directory"]) == ("fault", "fault")


def test_a_kill_in_the_middle_of_measuring_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "c"
    place.mkdir()
    process = subprocess.Popen([*MFS, "doctor", "--cache-dir", place], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not _has_open(process.pid, place) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.poll() is None, "it was to be caught while it writes"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert os.listdir(place) == []


def _has_open(pid: int, folder: Path) -> bool:
    """Whether a process has a file without a name open there, with something in it."""
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            if os.readlink(link).startswith(f"{folder}/") and os.stat(link).st_size > 8 << 20:
                return True
        except OSError:
            continue
    return False


def test_what_is_measured_is_bounded(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path).f_bavail
    found = disk.measure_speed(tmp_path, bytes_max=16 << 20)
    assert found.write_bytes_s > 0
    assert found.read_bytes_s > 0
    assert os.listdir(tmp_path) == []
    assert before  # the file has no name, and is gone with its descriptor


# -- origins


@pytest.fixture
def web(nginx: NginxServer) -> str:
    """A folder with one model, and nothing else."""
    name = uuid.uuid4().hex[:12]
    (nginx.files / name / "m").mkdir(parents=True)
    (nginx.files / name / "m" / "w.bin").write_bytes(bytes(6 << 20))
    return f"{nginx.url}{name}/"


def test_a_web_folder_that_is_well(web: str) -> None:
    found = doctor(web, status=None)
    of_it = {what.removeprefix(f"{web}: "): one["level"] for what, one in found.items() if what.startswith(web)}
    assert of_it == {
        "proxy": "ok", "name": "ok", "connection": "ok", "clock": "ok", "listing": "ok", "latency": "ok",
        "bandwidth": "note",
    }  # fmt: skip
    assert " ms for a small range" in found[f"{web}: latency"]["value"]


def test_an_origin_without_a_network(web: str) -> None:
    found = doctor(
        "http://models.example/prod/", web, status=1, wrap=("unshare", "-rn") if os.geteuid() else ("unshare", "-n")
    )
    assert level_of(found, "http://models.example/prod/: name") == "fault"
    assert "resolv.conf" in found["http://models.example/prod/: name"]["advice"]
    assert level_of(found, f"{web}: connection") == "fault"
    assert f"{web}: listing" not in found, "what cannot be reached is not asked"


def test_a_proxy_that_is_away_is_named_and_its_password_is_not(web: str) -> None:
    found = doctor(web, status=1, http_proxy=f"http://user:{CANARY}@127.0.0.1:9", no_proxy="")
    assert found[f"{web}: proxy"]["value"] == "127.0.0.1:9, named by the environment"
    assert level_of(found, f"{web}: connection") == "fault"
    assert "HTTPS_PROXY" in found[f"{web}: connection"]["advice"]
    found = doctor(web, status=None, http_proxy="http://127.0.0.1:9", no_proxy="127.0.0.0/8")
    assert found[f"{web}: proxy"]["value"] == "none for this origin, though http_proxy is set"


def test_secrets_in_a_url_stay_there(nginx: NginxServer) -> None:
    url = nginx.url.replace("http://", f"http://reader:{CANARY}@")
    assert any("***" in what for what in doctor(f"{url}~private/", status=1))


def test_a_certificate_that_is_not_trusted(nginx: NginxServer, web: str) -> None:
    url = web.replace(nginx.url, nginx.tls_url)
    found = doctor(url, status=1)
    assert level_of(found, f"{url}: TLS") == "warning"
    assert "SSL_CERT_FILE" in found[f"{url}: TLS"]["advice"]
    assert level_of(found, f"{url}: listing") == "fault"
    found = doctor(url, status=None, SSL_CERT_FILE=str(nginx.ca_file))
    assert level_of(found, f"{url}: TLS") == level_of(found, f"{url}: listing") == "ok"


@pytest.mark.parametrize(("shift_s", "level", "word"), [(-1000, "fault", "ahead of"), (400, "fault", "behind"),
                                                        (60, "note", "behind"), (0, "ok", "as the")])  # fmt: skip
def test_a_clock_that_is_wrong(
    swift: SwiftServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, shift_s: int, level: str, word: str
) -> None:
    """The server's clock is right, and its answers say another time: as if ours were wrong."""
    for name, value in swift.environ().items():
        monkeypatch.setenv(name, value)
    with Relay(swift.endpoint) as relay:
        relay.clock_shift_s = shift_s
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        source = origin.SourceConfig(f"s3://{s3_bucket}")
        found = {one.what.rpartition(": ")[2]: one for one in origin.examine(source, Wanted((source,)))}
    assert found["clock"].level == level
    assert word in found["clock"].value
    assert bool(found["clock"].advice) == (level != "ok")
    assert ("signatures are refused" in found["clock"].advice) == (level == "fault")


def test_credentials_that_are_refused(swift: SwiftServer, s3_bucket: str) -> None:
    environ = swift.environ() | {"AWS_SECRET_ACCESS_KEY": CANARY}
    found = doctor(f"s3://{s3_bucket}", status=1, **environ)
    assert level_of(found, f"s3://{s3_bucket}: clock") == "ok"
    assert level_of(found, f"s3://{s3_bucket}: listing") == "fault"
    assert "credentials" in found[f"s3://{s3_bucket}: listing"]["advice"]


def test_a_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "w.bin").write_bytes(bytes(5 << 20))
    found = doctor(tmp_path / "models", tmp_path / "none", status=1)
    assert level_of(found, f"{tmp_path}/models: listing") == "ok"
    assert level_of(found, f"{tmp_path}/models: bandwidth") == "note"
    assert level_of(found, f"{tmp_path}/none: listing") == "fault"


def test_a_shared_cache_that_is_away(tmp_path: Path, web: str, nginx: NginxServer) -> None:
    (tmp_path / "m.toml").write_text(
        f'[sources.one]\nurl = "{web}"\nvia = "http://127.0.0.1:9"\n'
        f'[sources.two]\nurl = "{web}"\nvia = "{nginx.url.rstrip("/")}"\n'
    )
    found = doctor("--config", tmp_path / "m.toml", status=None)
    assert level_of(found, "one: shared cache") == "warning"
    assert "every node asks the origin by itself" in found["one: shared cache"]["advice"]
    assert level_of(found, "two: shared cache") == level_of(found, "one: listing") == "ok"


def test_a_mounts_own_file_says_what_to_look_at(tmp_path: Path, mfs: Mfs) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "m.toml").write_text(
        f'[mount]\ncache_dir = "{tmp_path}/c"\nram_size = "100000T"\n[sources.prod]\nurl = "{tmp_path}/models"\n'
    )
    found = doctor("--config", tmp_path / "m.toml", "--quick", status=1)
    assert level_of(found, "memory") == "fault"
    assert level_of(found, "prod: listing") == "ok"
    assert "no SOURCE" in mfs.error("doctor", "--config", tmp_path / "m.toml", "s3://x", status=2)
    assert "not a source" in doctor("tpu://x", status=1)["tpu://x"]["value"]

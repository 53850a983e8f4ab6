"""The command, as people run it: real processes, a real server, statuses and single lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuload.cli.app import cli
from gpuload.cli.options import parse_device_map, parse_rules
from gpuload.client.asking import ask
from gpuload.client.attached import attach
from gpuload.server import versions
from gpuload.testing import random_tensors, write
from mfs.errors import UsageError

COMMANDS = [
    "serve",
    "load",
    "swap",
    "unload",
    "evict",
    "resize",
    "pin",
    "status",
    "wait",
    "plan",
    "digest",
    "doctor",
    "bench",
    "run",
    "hook",
]


def gpuload(*args: object, socket_path: Path | None = None, status: int = 0) -> str:
    """Run it; its stdout, or its stderr where it is to fail."""
    environment = {**os.environ, "GPULOAD_SOCKET": str(socket_path or "/nonexistent/s.sock")}
    done = subprocess.run(
        [sys.executable, "-m", "gpuload", *map(str, args)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("cli") / "s.sock"
    command = [sys.executable, "-m", "gpuload", "serve", "--socket", str(path), "--arena", "cpu=64MiB"]
    command += ["--digests", str(path.with_name("digests"))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "serving" in server.stderr.readline()
        yield path
        server.send_signal(signal.SIGINT)
    assert server.returncode == 0
    assert not path.exists()


def test_a_life_of_a_model(socket_path: Path, tmp_path: Path) -> None:
    one = random_tensors(1, {"a": (1000, 1000), "b": (1000, 1000)})
    first = write(tmp_path / "first.safetensors", one)
    second = write(tmp_path / "second.safetensors", {**one, "b": random_tensors(2, {"b": (1000, 1000)})["b"]})
    assert "nothing resident" in gpuload("status", socket_path=socket_path)
    assert "first on cpu" in gpuload("load", first, socket_path=socket_path)
    report = json.loads(gpuload("swap", second, "--json", socket_path=socket_path))["report"]
    assert report["bytes_copied"] == 2_000_000
    assert "would do without first: say --evict" in gpuload("resize", "cpu", "2M", socket_path=socket_path, status=1)
    assert "arena 32.0 M, taken 32.0 M, used 4.0 M" in gpuload("resize", "cpu", "32M", socket_path=socket_path)
    assert json.loads(gpuload("resize", "cpu", "64M", "--json", socket_path=socket_path))["arena_used_bytes"] == 4 << 20
    assert "was started with" in gpuload("resize", "cpu", "65M", socket_path=socket_path, status=2)
    assert "pinned" in gpuload("pin", "first", socket_path=socket_path)
    status = json.loads(gpuload("status", "--json", socket_path=socket_path))
    assert [(m["model"], m["pinned"], m["generation"]) for m in status["devices"][0]["models"]] == [("first", True, 2)]
    assert "second.safetensors" in gpuload("status", socket_path=socket_path)
    assert "first: generation 2, " in gpuload("wait", "first", "--after", 1, socket_path=socket_path)
    over = gpuload("wait", "first", "--after", 2, "--timeout", 0, socket_path=socket_path, status=1)
    assert over == "gpuload: first is still generation 2 after 0 s\n"
    assert json.loads(gpuload("wait", "first", "--json", socket_path=socket_path))["generation"] == 2
    held = attach("first", socket_path=str(socket_path))
    gpuload("swap", first, socket_path=socket_path)
    who = f"generation 2 of first is held by pid {os.getpid()} (user {os.getuid()}): 4.0 M will be free once they"
    assert who in gpuload("status", socket_path=socket_path)
    del held
    gpuload("swap", second, socket_path=socket_path)
    large = write(tmp_path / "large.safetensors", random_tensors(3, {"x": (32 << 20,)}))
    refused = gpuload("load", large, socket_path=socket_path, status=1)
    assert "short by" in refused
    assert refused.count("\n") == 1
    assert "other content" in gpuload("load", first, "--name", "first", socket_path=socket_path, status=2)
    assert "released" in gpuload("evict", "first", socket_path=socket_path)
    assert "there are: none" in gpuload("unload", "first", socket_path=socket_path, status=1)


def test_a_server_may_open_as_many_files_as_it_is_let(tmp_path: Path) -> None:
    """A model on CUDA is handed out as thousands of descriptors; a shell's usual soft limit is 1024."""
    serve = [sys.executable, "-m", "gpuload", "serve", "--socket", str(tmp_path / "s.sock"), "--arena", "cpu=2MiB"]
    limited = ["bash", "-c", 'ulimit -S -n 200; ulimit -H -n; exec "$@"', "x", *serve, "--digests", str(tmp_path / "d")]
    with subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            hard = server.stdout.readline().strip()
            assert "serving" in server.stderr.readline()
            pid = ask({"op": "ping"}, socket_path=str(tmp_path / "s.sock"))["pid"]
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert next(line for line in limits.splitlines() if "open files" in line).split()[3:5] == [hard, hard]
        finally:
            server.send_signal(signal.SIGINT)


def test_a_model_on_two_devices(tmp_path: Path) -> None:
    """Loaded by --device-map, swapped where it stands, planned, shown and unloaded as one."""
    path = tmp_path / "s.sock"
    command = [sys.executable, "-m", "gpuload", "serve", "--socket", str(path), "--digests", str(tmp_path / "d")]
    with subprocess.Popen(
        [*command, "--arena", "cpu=32MiB", "--arena", "cpu:1=32MiB"], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            assert "serving" in server.stderr.readline()
            one = write(tmp_path / "one.safetensors", random_tensors(1, {"a.w": (1000, 1000), "b.w": (1000, 1000)}))
            two = write(tmp_path / "two.safetensors", random_tensors(2, {"a.w": (1000, 1000), "b.w": (1000, 1000)}))
            (tmp_path / "map.json").write_text('{"": "cpu", "b": "cpu:1"}')
            assert "several devices" in gpuload("load", one, socket_path=path, status=2)
            given = ["--name", "m", "--device-map", "=cpu", "--device-map", "b=cpu:1"]
            assert "m on cpu,cpu:1" in gpuload("load", one, *given, socket_path=path)
            assert "m on cpu,cpu:1" in gpuload("swap", two, socket_path=path)
            found = json.loads(gpuload("plan", one, "--device-map", tmp_path / "map.json", "--json", socket_path=path))
            names = [t["target"] for t in found["targets"][2:]]
            assert names == ["cpu", "the server's arena on cpu", "cpu:1", "the server's arena on cpu:1"]
            assert [t["weights_bytes"] for t in found["targets"][2:]] == [2 << 20] * 4, "whole granules"
            assert all(t["fits"] for t in found["targets"])
            assert gpuload("status", socket_path=path).count("rest on") == 2
            assert "m on cpu,cpu:1: released" in gpuload("unload", "m", socket_path=path)
            rule = ["--rule", "*.w=0"]
            said = json.loads(gpuload("load", one, "--ranks", "cpu:1,cpu", *rule, "--json", socket_path=path))
            assert (said["ranks"], said["bytes"]) == (2, 4_000_000)
        finally:
            server.send_signal(signal.SIGINT)


def test_digests_ahead_of_need(tmp_path: Path) -> None:
    """After `digest` the very first swap of a new server reads and copies only what differs."""
    one = random_tensors(1, {"a": (1000, 1000), "b": (1000, 1000)})
    first = write(tmp_path / "first.safetensors", one)
    second = write(tmp_path / "second.safetensors", {**one, "b": random_tensors(2, {"b": (1000, 1000)})["b"]})
    kept = ["--digests", tmp_path / "d"]
    found = [json.loads(gpuload("digest", model, *kept, "--json")) for model in (first, second, second)]
    if found[0]["files"][0]["reason"]:
        pytest.skip(f"{tmp_path}: {found[0]['files'][0]['reason']}")
    assert [(f["bytes_known"], f["bytes_hashed"]) for f in found] == [(0, 4000000), (0, 4000000), (4000000, 0)]
    assert "0 B known, 3.8 M hashed" in gpuload("digest", second, *kept, "--again")
    path = tmp_path / "s.sock"
    command = [sys.executable, "-m", "gpuload", "serve", "--socket", str(path), "--arena", "cpu=64MiB"]
    with subprocess.Popen([*command, *map(str, kept)], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert "serving" in server.stderr.readline()
            gpuload("load", first, "--name", "m", socket_path=path)
            report = json.loads(gpuload("swap", second, "--json", socket_path=path))["report"]
            assert (report["bytes_hashed"], report["bytes_copied"]) == (0, 2000000)
        finally:
            server.send_signal(signal.SIGINT)


def test_a_model_of_which_nothing_can_be_remembered_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "CHANGE_STAMPED", set())
    path = write(tmp_path / "m.safetensors", random_tensors(1, {"a": (64, 64)}))
    result = CliRunner().invoke(cli, ["digest", str(path), "--digests", str(tmp_path / "d")])
    assert result.exit_code == 1
    assert f"not kept: {path}: nothing that can be told of this file" in result.output


def test_digests_for_every_rank(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", random_tensors(1, {"a.q_proj.weight": (64, 64), "norm": (64,)}))
    found = json.loads(gpuload("digest", path, "--world", 2, "--digests", tmp_path / "d", "--json"))
    if found["files"][0]["reason"]:
        pytest.skip(found["files"][0]["reason"])
    assert found["bytes_hashed"] == 64 * 64 * 2 + 64 * 2, "two halves, and once what every rank has whole"


def test_run_serves_a_program_that_knows_nothing(socket_path: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", random_tensors(1, {"a": (900, 600)}))
    code = "import sys; from safetensors.torch import load_file; print(load_file(sys.argv[1])['a'].shape)"
    out = gpuload("run", "--socket", socket_path, "--", sys.executable, "-c", code, path)
    assert "900, 600" in out
    models = json.loads(gpuload("status", "--json", socket_path=socket_path))["devices"][0]["models"]
    assert [m["model"].startswith("content:") for m in models] == [True]
    assert "cannot run" in gpuload("run", "/nonexistent/program", status=2)


def test_plan_reads_headers_only(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", random_tensors(1, {"a.q_proj.weight": (64, 64)}))
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64})
    )
    found = json.loads(gpuload("plan", tmp_path, "--kv-cache", "100", "--device", "cpu", "--json"))
    assert (found["bytes_total"], found["kv_cache_bytes"]) == (8192, 100 * 2 * 2 * 4 * 16 * 2)
    assert found["rank_bytes"] == {"1": 8192, "2": 4096, "4": 2048, "8": 1024, "16": 512}
    assert [t["target"] for t in found["targets"]] == ["a card of 80 GB", "a card of 141 GB", "cpu"]
    assert all(t["fits"] and t["tensor_parallel"] == 1 for t in found["targets"])
    assert "fits" in gpuload("plan", tmp_path)
    (tmp_path / "config.json").unlink()
    assert "needs a config.json" in gpuload("plan", tmp_path, "--kv-cache", "100", status=2)


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["dance"], 2, "No such command"),
        (["load"], 2, "Missing argument"),
        (["load", "/nonexistent"], 1, "no such file or folder: /nonexistent"),
        (["status"], 1, "start one with `gpuload serve`"),
        (["serve", "--arena", "cpu"], 2, "expected DEVICE=SIZE"),
        (["serve", "--arena", "cpu=lots"], 2, "not a size: 'lots'"),
        (["serve", "--arena", "cpu=70GB"], 2, "ambiguous size: '70GB'; write 70G"),
        (["serve", "--arena", "cpu=1G", "--arena", "cpu:0=1G"], 2, "cpu was given before"),
        (["serve", "--arena", "cpu=1M", "--socket", "/tmp/gpuload-test-never.sock"], 1, "one granule of 2.0 M"),
        (["serve", "--arena", "tpu=1GiB"], 2, "no such device"),
        (["serve", "--arena", "cpu=9000PiB"], 2, "size too large"),
        (["serve", "--arena", "cpu=999999GiB", "--socket", "/tmp/gpuload-test-never.sock"], 1, "does not fit"),
        (["serve", "--mode", "999"], 2, "octal"),
        (["plan", "/nonexistent"], 1, "no such file"),
        (["plan", "/tmp", "--kv-cache", "-1"], 2, "number of tokens"),
        (["bench", "--size", "1MiB"], 2, "something to measure"),
        (["bench", "--size", "1Q"], 2, "bench: Invalid value for '--size': not a size: '1Q'"),
        (["load", "/tmp", "--world", "2", "--rule", "x"], 2, "GLOB=AXIS"),
        (["load", "/tmp", "--device-map", "/nonexistent.json"], 2, "PREFIX=DEVICE or a JSON file"),
        (["load", "/tmp", "--device-map", "/dev/null"], 2, "PREFIX=DEVICE or a JSON file"),
        (["digest", "/nonexistent"], 1, "no such file"),
    ],
)  # fmt: skip
def test_what_fails_is_one_line_and_a_status(args: list[str], status: int, said: str) -> None:
    line = gpuload(*args, status=status)
    assert said in line
    assert line.startswith("gpuload: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 6


def test_doctor_says_what_there_is() -> None:
    findings = {f["what"]: f["level"] for f in json.loads(gpuload("doctor", "--json"))["findings"]}
    assert findings["torch"] == findings["shared memory"] == "ok"
    assert "shared memory" in gpuload("doctor")


def test_doctor_names_a_folder_of_digests_that_others_may_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [json.loads(gpuload("doctor", "--json"))["findings"]]
    (tmp_path / "gpuload" / "digests").mkdir(parents=True)
    (tmp_path / "gpuload" / "digests").chmod(0o777)
    found.append(json.loads(gpuload("doctor", "--json"))["findings"])
    said = [next(f for f in findings if f["what"] == "digests") for findings in found]
    assert [f["level"] for f in said] == ["ok", "warning"]
    assert "can be written by others" in said[1]["value"]
    assert "chmod go-w" in said[1]["advice"]


def test_device_maps(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"": 0, "lm_head": "cpu"}')
    assert parse_device_map((str(tmp_path / "m.json"), "lm_head=cuda:1", "=cuda:2")) == {
        "": "cuda:2", "lm_head": "cuda:1",
    }  # fmt: skip
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(UsageError, match="expected a JSON object"):
        parse_device_map((str(tmp_path / "m.json"),))


def test_rules() -> None:
    assert parse_rules(("*.a=0", "b==1", "c=whole")) == {"*.a": 0, "b=": 1, "c": None}
    with pytest.raises(UsageError):
        parse_rules(("=1",))

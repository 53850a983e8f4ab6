"""Leases, and who may do what, across processes and users."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import gpuload.client.attached
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach, open_resident
from gpuload.device.host import HostDevice
from gpuload.errors import ServerError, to_wire
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import AccessError, ConfigError

NOBODY = 65534
one_way = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])


def in_child(work: Callable[[], str]) -> tuple[int, int, int]:
    """Fork, run `work`, and hand what it returns (or its error) to a pipe; the child then waits until the last
    descriptor is closed. Returns (process, pipe to read, descriptor to close)."""
    out_read, out_write = os.pipe()
    hold_read, hold_write = os.pipe()
    process = os.fork()
    if process:
        os.close(out_write)
        os.close(hold_read)
        return process, out_read, hold_write
    os.close(hold_write)
    try:
        said = work()
    except BaseException as error:  # a child must never run the parent's tests
        said = json.dumps(to_wire(error))
    os.write(out_write, said.encode())
    os.close(out_write)
    os.read(hold_read, 1)
    os._exit(0)


@one_way
def test_a_forked_child_keeps_the_lease(server: ServerThread, tmp_path: Path) -> None:
    load_resident(
        write(tmp_path / "a.safetensors", random_tensors(1, {"w": (50, 50)})),
        "m",
        "cpu",
        socket_path=server.socket_path,
    )
    held = attach("m", socket_path=server.socket_path)
    process, out, hold = in_child(lambda: "here")
    assert os.read(out, 100) == b"here"
    del held
    gc.collect()
    assert server.gauges()["leases"] == 1, "the child still has the memory"
    os.close(hold)
    os.waitpid(process, 0)
    assert server.gauges()["leases"] == 0
    os.close(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_may_attach_and_nothing_else(config: ServerConfig, small_granules: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = write(Path(folder) / "a.safetensors", random_tensors(1, {"w": (50, 50)}))
        config = replace(config, socket_path=f"{folder}/s.sock", socket_mode=0o666)
        with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
            load_resident(file, "m", "cpu", socket_path=server.socket_path)

            def work() -> str:
                os.setuid(NOBODY)
                refused = []
                requests = [{"op": "unload", "model": "m"}, {"op": "pin", "model": "m"}]
                requests += [
                    {"op": op, "model": "x", "device": "cpu", "files": ["x"]} for op in ("load", "swap", "open")
                ]
                for request in requests:
                    try:
                        ask(request, socket_path=server.socket_path)
                    except AccessError:
                        refused.append(request["op"])
                attached = attach("m", socket_path=server.socket_path)
                return json.dumps(
                    [refused, list(attached), ask({"op": "ping"}, socket_path=server.socket_path)["protocol"]]
                )

            process, out, hold = in_child(work)
            assert json.loads(os.read(out, 10_000)) == [["unload", "pin", "load", "swap", "open"], ["w"], 4]
            os.close(hold)
            os.waitpid(process, 0)
            os.close(out)
            assert server.gauges()["models"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_handed_what_he_could_write_to(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA arenas are: the importer chooses the access. Our own user is trusted with it."""

    def open_one(name: str) -> HostDevice:
        device = HostDevice(granule_bytes=4096)
        device.exports_read_only = False
        return device

    monkeypatch.setattr(gpuload.client.attached, "open_device", open_one)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        want = random_tensors(1, {"w": (50, 50)})
        config = replace(config, socket_path=f"{folder}/s.sock", socket_mode=0o666)
        with running_server(config, open_one) as server:
            load_resident(write(Path(folder) / "a.safetensors", want), "m", "cpu", socket_path=server.socket_path)

            def work() -> str:
                os.setuid(NOBODY)
                return json.dumps(list(attach("m", socket_path=server.socket_path)))

            process, out, hold = in_child(work)
            said = json.loads(os.read(out, 10_000))
            assert said["error"] == "AccessError"
            assert f"user {NOBODY} may not attach to cpu of user 0" in said["message"]
            os.close(hold)
            os.waitpid(process, 0)
            os.close(out)
            assert server.gauges()["leases"] == 0
            assert_same(attach("m", socket_path=server.socket_path), want)
            gc.collect()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_socket_is_not_for_other_users_unless_told(server: ServerThread) -> None:
    os.chmod(os.path.dirname(server.socket_path), 0o755)

    def work() -> str:
        os.setuid(NOBODY)
        ask({"op": "ping"}, socket_path=server.socket_path)
        return "let in"

    process, out, hold = in_child(work)
    assert json.loads(os.read(out, 10_000))["error"] in ("AccessError", "AwayError")
    os.close(hold)
    os.waitpid(process, 0)
    os.close(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_no_place_for_a_socket(config: ServerConfig, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, NOBODY, -1)
    with (
        pytest.raises(ConfigError, match="belongs to user"),
        running_server(replace(config, socket_path=f"{folder}/s.sock")),
    ):
        raise AssertionError("it started")


@one_way
def test_many_openers_of_one_file_load_it_once(server: ServerThread, tmp_path: Path) -> None:
    want = random_tensors(1, {f"w{i}": (50, 500) for i in range(6)})
    path = write(tmp_path / "a.safetensors", want)

    def opened(_: int) -> tuple[dict, int]:  # type: ignore[type-arg]
        with open(path, "rb") as file:
            got = open_resident([file.fileno()], [str(path)], "cpu", socket_path=server.socket_path)
        assert got.report is not None
        return got, got.report["bytes_copied"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(opened, range(8)))
    assert sum(copied for _, copied in found) == sum(t.nbytes for t in want.values())
    for got, _ in found:
        assert_same(got, want)
    assert server.gauges()["leases"] == 8
    del found, got
    gc.collect()
    assert server.gauges()["leases"] == 0


@one_way
def test_a_name_beside_a_descriptor_opens_nothing(server: ServerThread, tmp_path: Path) -> None:
    """The descriptor's bytes are loaded, whatever file the name beside it leads to."""
    mine, other = random_tensors(1, {"w": (50, 50)}), random_tensors(2, {"w": (50, 50)})
    path, lure = write(tmp_path / "a.safetensors", mine), write(tmp_path / "b.safetensors", other)
    with open(path, "rb") as file:
        got = open_resident([file.fileno()], [str(lure)], "cpu", socket_path=server.socket_path)
    assert_same(got, mine)


@one_way
def test_a_server_of_another_version_is_one_clear_line_and_holds_no_lease(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (50, 50)}))
    load_resident(path, "m", "cpu", socket_path=server.socket_path)
    real = gpuload.client.attached.exchange

    def older(*args: object, **kwargs: object) -> tuple[dict[str, object], list[int]]:
        reply, fds = real(*args, **kwargs)  # type: ignore[arg-type]
        return {name: value for name, value in reply.items() if name != "parts"}, fds

    monkeypatch.setattr(gpuload.client.attached, "exchange", older)
    with pytest.raises(ServerError, match="another version than this program: restart it") as kept:
        attach("m", socket_path=server.socket_path)
    assert kept.value is not None
    assert server.gauges()["leases"] == 0, "though the error, with all it refers to, is still held"

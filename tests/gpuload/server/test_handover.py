"""A server that is killed, stopped or replaced while it is used: weights and leases stay, and nobody is refused."""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload import holder
from gpuload.client.asking import ask, connect, load_resident
from gpuload.client.attached import Attached, attach
from gpuload.errors import BusyError, FitError
from gpuload.server.estate import FORMAT
from gpuload.testing import assert_same, bits, random_tensors, write
from gpuload.wire import close_all, receive_blocking, send_blocking
from mfs.errors import MfsError, NotFoundError
from tests.gpuload.client.test_c import DUMP, build, parsed, run
from tests.gpuload.device.conftest import compiled
from tests.mount.service_manager import ServiceManager

__all__ = ["compiled"]  # a fixture

DEADLINE_S = 60.0
ARENA = "cpu=64MiB"
SHAPES = {f"l.{i}": (512, 2048) for i in range(4)} | {"n": (50,)}


class Served:
    """A `gpuload serve` that a test starts, kills, and has replaced."""

    def __init__(self, folder: Path, arena: str = ARENA) -> None:
        self.folder, self.path = folder, str(folder / "s.sock")
        self.command = [sys.executable, "-m", "gpuload", "serve", "--socket", self.path, "--arena", arena]
        self.command += ["--digests", str(folder / "d")]
        self.environment: dict[str, str] = {}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *more: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment}
        process = subprocess.Popen([*self.command, *more], stderr=subprocess.PIPE, text=True, env=environment)
        self.processes.append(process)
        return process

    def start_serving(self, *more: str) -> subprocess.Popen[str]:
        process = self.start(*more)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "serving" in line, line
        return process

    @property
    def pid(self) -> int:
        return int(self.ask("ping")["pid"])

    def ask(self, op: str, **more: Any) -> dict[str, Any]:
        return ask({"op": op, **more}, socket_path=self.path)

    def kill(self) -> int:
        """As the kernel does when memory is short. Returns who it was, once it is dead: before, it may still accept."""
        pid = self.pid
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([process], [], [], DEADLINE_S)
        os.close(process)
        return pid

    def load(self, path: Path, name: str, *, is_swap: bool = False) -> dict[str, Any]:
        return load_resident(path, name, "cpu", is_swap=is_swap, socket_path=self.path)["report"]

    def attach(self, name: str) -> Attached:
        return attach(name, socket_path=self.path)

    def gauges(self) -> dict[str, int]:
        return dict(self.ask("status")["devices"][0]["gauges"])

    def wait_for(self, gauge: str, value: int) -> None:
        until = time.monotonic() + DEADLINE_S
        while self.gauges()[gauge] != value:
            assert time.monotonic() < until, self.gauges()
            time.sleep(0.01)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.communicate(timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                there = subprocess.run(["ps", "-eo", "pid,ppid,stat,wchan:20,args"], capture_output=True, text=True)
                process.kill()
                _, said = process.communicate()
                raise AssertionError(f"{process.args} did not end; {said}\n{there.stdout}") from None


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


def content(seed: int) -> dict[str, torch.Tensor]:
    return random_tensors(seed, SHAPES)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of bits: random ones are no numbers now and then, which equal nothing."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


class TestKilled:
    def test_weights_names_pins_and_leases_are_there_after_kill_9(self, served: Served, tmp_path: Path) -> None:
        first, second = content(1), content(2)
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", first), "m")
        old = served.attach("m")
        served.load(write(tmp_path / "b.safetensors", second), "m", is_swap=True)
        served.ask("pin", model="m", pinned=True)
        before, pid = served.ask("status"), served.kill()
        after = served.ask("status")
        assert after["pid"] != pid
        assert (before["servers_before"], after["servers_before"]) == (0, 1)
        assert after["devices"][0]["gauges"] == before["devices"][0]["gauges"]
        told = ("model", "digest", "pinned", "generation", "leases", "bytes", "label")
        assert [{k: m[k] for k in told} for m in after["devices"][0]["models"]] == [
            {k: m[k] for k in told} for m in before["devices"][0]["models"]
        ]
        assert_same(old, first)
        assert_same(served.attach("m"), second)
        report = served.load(tmp_path / "b.safetensors", "again")
        assert report["bytes_copied"] == 0, "what is resident is found by its digest"
        del old
        gc.collect()
        served.wait_for("retired", 0)
        for name in ("m", "again"):
            served.ask("unload", model=name)
        served.wait_for("leases", 0)
        assert set(served.gauges().values()) == {0}

    def test_a_client_that_leaves_while_nobody_serves_has_no_lease_afterwards(
        self, served: Served, tmp_path: Path
    ) -> None:
        above = served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held = served.attach("m")
        os.kill(above.pid, signal.SIGSTOP)  # it will not start the next one yet
        served.kill()
        del held
        gc.collect()
        os.kill(above.pid, signal.SIGCONT)
        served.wait_for("leases", 0)

    def test_a_copy_in_flight_is_not_believed(self, served: Served, tmp_path: Path) -> None:
        """Killed at random points of loads: what has a name afterwards has its bytes, and no granule is lost."""
        chance = random.Random(5)
        served.start_serving()
        known = {seed: content(seed) for seed in range(3)}
        files = {seed: write(tmp_path / f"{seed}.safetensors", made) for seed, made in known.items()}
        found = 0
        served.load(files[2], "m")
        for _ in range(3):
            name, pid = "m", served.pid
            killer = threading.Timer(0.03 + chance.random() * 0.1, os.kill, [pid, signal.SIGKILL])
            killer.start()
            with suppress(MfsError):
                for seed in (0, 1, 2, 0, 1, 2):
                    served.load(files[seed], name, is_swap=True)
            killer.join()
            until = time.monotonic() + DEADLINE_S
            while served.pid == pid:
                assert time.monotonic() < until
            got = served.attach(name)
            assert any(all(same(got[n], made[n]) for n in SHAPES) for made in known.values())
            found += 1
            del got
        assert found == 3, "what was served before the kill is there in any case"
        gc.collect()
        with suppress(NotFoundError):
            served.ask("unload", model="m")
        served.wait_for("leases", 0)
        assert set(served.gauges().values()) == {0}

    def test_bytes_that_are_not_what_they_were_are_given_up(self, served: Served, tmp_path: Path) -> None:
        """As after a server that went wild before it died."""
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "spoilt")
        served.load(write(tmp_path / "b.safetensors", content(2)), "whole")
        pid = served.pid
        arena = next(
            f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")
            if "gpuload-arena" in os.readlink(f"/proc/{pid}/fd/{fd}")
        )  # fmt: skip
        if os.geteuid():
            pytest.skip("only root may write there")
        with open(arena, "r+b") as file:
            file.seek(1000)
            was = file.read(1)
            file.seek(1000)
            file.write(bytes([was[0] ^ 1]))
        served.kill()
        names = [m["model"] for m in served.ask("status")["devices"][0]["models"]]
        assert names == ["whole"]
        assert_same(served.attach("whole"), content(2))

    @pytest.mark.parametrize(("limit", "is_full"), [("-Sn 100", False), ("-n 160", True)], ids=["soft", "hard"])
    def test_more_models_than_half_of_the_descriptors(
        self, served: Served, tmp_path: Path, limit: str, is_full: bool
    ) -> None:
        """Each has one in the server, and a copy of it at the holder. Where no more are to be had one more model is
        refused, in words, while there are enough left for all else."""
        served.command = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *served.command]
        served.start_serving()
        file, made = write(tmp_path / "a.safetensors", {"w": torch.ones(4)}), 0
        with suppress(BusyError) if is_full else nullcontext():
            for made in range(150 if is_full else 90):
                served.load(file, f"m{made}")
        assert not is_full or 80 < made < 149
        status = served.ask("status")
        names = {m["model"] for m in status["devices"][0]["models"]}
        assert len(names) == (made if is_full else 90)
        pid = served.kill()
        assert served.pid != pid
        assert {m["model"] for m in served.ask("status")["devices"][0]["models"]} == names
        assert_same(served.attach("m7"), {"w": torch.ones(4)})

    def test_a_server_that_dies_again_and_again_is_given_up(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", f"{HOLDER}\n"], env={**os.environ, "FAKE": FAKE}, capture_output=True, text=True,
            timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert done.stderr.count("starting the next one") == holder.CRASHES_MAX
        assert "the 6th within 60 s: given up, with the weights" in done.stderr.splitlines()[-1]
        kept = [line.split("=")[1] for line in done.stdout.splitlines()]
        assert kept == ["", *["index:more"] * holder.CRASHES_MAX], "each gets what the first had kept, but for the rest"

    def test_who_was_told_to_stop_is_not_followed_whatever_it_says_then(self) -> None:
        """Told in the middle of a take-over it takes its clients up again, which it says."""
        done = subprocess.run(
            [sys.executable, "-c", f"{HOLDER}\n"], env={**os.environ, "FAKE": FAKE_THAT_WAS_TOLD}, capture_output=True,
            text=True, timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert "starting the next one" not in done.stderr

    def test_an_heir_that_goes_as_it_is_given_up_does_not_take_the_holder_along(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has not read the last word to it, which the kernel reports as a connection that was reset."""
        monkeypatch.setattr(holder, "_ANSWER_S", 0.05)
        ours, theirs = socket.socketpair()

        class Late(socket.socket):
            def shutdown(self, how: int) -> None:
                theirs.close()
                super().shutdown(how)

        handlers = {number: signal.getsignal(number) for number in holder.SIGNALS}
        one = holder.Holder([])
        for number, handler in handlers.items():  # of this process, not of a holder
            signal.signal(number, handler)
        with one._sock, Late(fileno=ours.detach()) as connection:
            assert not one._is_anothers(connection, b"yours")

    def test_one_that_is_killed_over_giving_its_place_is_followed_unless_the_other_serves(self, tmp_path: Path) -> None:
        for answer in ("serves", ""):
            fake = FAKE_THAT_GIVES.format(answer=answer)
            done = subprocess.run(
                [sys.executable, "-c", f"{HOLDER}\n"], env={**os.environ, "FAKE": fake}, capture_output=True, text=True,
                timeout=DEADLINE_S,
            )  # fmt: skip
            assert done.stdout.count("heard b'yours'") == 1
            is_followed = "starting the next one" in done.stderr
            assert is_followed == (answer == ""), done.stderr
            assert (done.returncode, "gave its place to serves" in done.stderr) == (0, not is_followed)


DIES_GIVING = """
import os, signal, socket, sys
mark = os.path.join(os.environ["KILLER"], "impatient")
impatient = open(mark).read() if os.path.exists(mark) else ""
if impatient == "holder" and not os.environ.get("GPULOAD_HOLDER"):
    set_timeout = socket.socket.settimeout
    socket.socket.settimeout = lambda self, s: set_timeout(self, s and min(s, 0.5))
if os.environ.get("GPULOAD_HOLDER"):
    from importlib.abc import MetaPathFinder

    class Finder(MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "gpuload.server.daemon":
                return None
            sys.meta_path.remove(self)
            from gpuload.server import handover
            from gpuload.server.handover import Giver, Heir

            if impatient == "giver":
                handover.END_S = 0.5

            def dies(who):
                mark = os.path.join(os.environ["KILLER"], who)
                if os.path.exists(mark):
                    os.unlink(mark)
                    os.kill(os.getpid(), signal.SIGKILL)

            tell, hold = Giver._tell_holder, Heir.hold

            def tells(self, message, *args):
                tell(self, message, *args)
                if "GIVING" in message:
                    dies("giver")

            async def holds(self):
                if os.path.exists(os.path.join(os.environ["KILLER"], "heir")):
                    await self._say({"op": "held"})
                dies("heir")
                await hold(self)
                dies("owner")
                if os.path.exists(os.path.join(os.environ["KILLER"], "stopped")):
                    os.kill(os.getpid(), signal.SIGSTOP)
                if os.path.exists(os.path.join(os.environ["KILLER"], "failed")):
                    raise OSError("it failed")

            Giver._tell_holder, Heir.hold = tells, holds
            return None

    sys.meta_path.insert(0, Finder())
"""
"""Around what both sides of a take-over say last: the side that has a file of its name dies there, once. The owner
is an heir that was given all; with a file "failed" it raises there, with "stopped" it stops. Who is named
in a file "impatient" waits half a second for it."""

FAKE_THAT_GIVES = """
import os, signal, socket
from mfs import manager
if "LISTEN_FDNAMES" in os.environ:
    os._exit(0)
manager.notify("FDSTORE=1\\nFDNAME=index", [os.memfd_create("index")])
manager.notify("READY=1")
ours, theirs = socket.socketpair()
manager.notify("STOPPING=1\\nGIVING=" + b"yours".hex(), [ours.fileno()])
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
ours.close()
print("heard", theirs.recv(9), flush=True)
theirs.send(b"{answer}")
"""

FAKE_THAT_WAS_TOLD = """
import os, signal
from mfs import manager
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
manager.notify("FDSTORE=1\\nFDNAME=index", [os.memfd_create("index")])
manager.notify("READY=1")
os.kill(os.getppid(), signal.SIGTERM)
signal.sigwait({signal.SIGTERM})
manager.notify("READY=1")
os.kill(os.getpid(), signal.SIGKILL)
"""

HOLDER = """
import os, sys
from gpuload import holder
from mfs import one_child
holder.children.python = lambda *_: [sys.executable, "-c", os.environ["FAKE"]]
one_child._FIRST_PAUSE_S = 0.001
holder.main()
"""

FAKE = """
import os, signal
from mfs import manager
print("kept=" + os.environ.get("LISTEN_FDNAMES", ""), flush=True)
if "LISTEN_FDNAMES" not in os.environ:
    assert os.environ.get("LISTEN_PID") in (None, str(os.getpid()))
    for name in ("index", "less", "more"):
        manager.notify("FDSTORE=1\\nFDNAME=" + name, [os.memfd_create(name)])
    manager.notify("FDSTOREREMOVE=1\\nFDNAME=less")
else:
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in (3, 4)] == ["/memfd:index (deleted)", "/memfd:more (deleted)"]
manager.notify("READY=1")
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestReplaced:
    def test_fifty_clients_notice_nothing(self, served: Served, tmp_path: Path) -> None:
        """They attach, check, let go and ping, all the time, while models are swapped and the server is replaced."""
        known = {seed: content(seed) for seed in range(2)}
        files = {seed: write(tmp_path / f"{seed}.safetensors", made) for seed, made in known.items()}
        digests: dict[str, int] = {}
        served.start_serving()
        for seed in (0, 1):
            served.load(files[seed], "m", is_swap=True)
            digests[served.attach("m").digest] = seed
        wrong, stop = list[object](), threading.Event()
        done = [0] * 50

        def use(number: int) -> None:
            held: Attached | None = None
            while not stop.is_set():
                try:
                    if number % 2:
                        served.ask("ping")
                    elif held is None:
                        held = served.attach("m")
                    else:
                        name = f"l.{number % 4}"
                        if not same(held[name], known[digests[held.digest]][name]):
                            wrong.append("other bytes")
                        held = None
                except BusyError as error:
                    if "gives its place" not in str(error):
                        wrong.append(error)
                except BaseException as error:
                    wrong.append(error)
                done[number] += 1
                time.sleep(0.02)  # a new server needs the machine as well

        def swap() -> None:
            seed = 0
            while not stop.is_set():
                try:
                    served.load(files[seed := 1 - seed], "m", is_swap=True)
                except FitError:  # those who are attached hold all
                    time.sleep(0.02)
                except BusyError as error:
                    if "nothing was changed" not in str(error):
                        wrong.append(error)

        threads = [threading.Thread(target=use, args=(n,)) for n in range(50)] + [threading.Thread(target=swap)]
        for thread in threads:
            thread.start()
        pids = [served.pid]
        for _ in range(2):
            old = served.processes[-1]
            served.start_serving("--take-over")
            assert old.wait(DEADLINE_S) == 0
            pids.append(served.pid)
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert min(done) > 0
        assert len(set(pids)) == 3
        assert served.ask("status")["servers_before"] == 2
        gc.collect()
        served.wait_for("leases", 0)
        served.ask("unload", model="m")
        assert set(served.gauges().values()) == {0}
        pid = served.kill()
        assert served.pid != pid, "its own holder has everything"

    def test_a_lease_goes_on_and_ends_with_its_client(self, served: Served, tmp_path: Path) -> None:
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held = served.attach("m")
        served.start_serving("--take-over")
        assert served.gauges()["leases"] == 1
        assert_same(held, content(1))
        del held
        gc.collect()
        served.wait_for("leases", 0)

    def test_an_heir_that_fails_changes_nothing(self, served: Served, tmp_path: Path) -> None:
        """One of another version; one that breaks off at each step."""
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held = served.attach("m")
        resting = connect(served.path, DEADLINE_S)  # who has asked nothing yet
        pid = served.pid
        first = {"op": "take-over", "format": FORMAT, "version": "x"}
        for said, why in [
            ([{"op": "take-over", "format": 99, "version": "9.9"}], "gpuload 9.9) that knows format 99 wants to take"),
            ([first, {"op": "what"}], "it said 'what', expected 'yield'"),
            ([first, {"op": "yield"}, {"op": "hold"}], "it said 'hold', expected 'held'"),
            ([first], None),
            ([first, {"op": "yield"}], None),
        ]:
            with connect(served.path, DEADLINE_S) as sock:
                for message in said:
                    send_blocking(sock, message)
                    answer, fds = receive_blocking(sock)
                    close_all(fds)
                if why is not None:
                    assert why in answer["message"]
                    assert "\n" not in answer["message"]
            assert served.pid == pid
        send_blocking(resting, {"op": "ping"})
        assert receive_blocking(resting)[0]["pid"] == pid
        resting.close()
        assert_same(served.attach("m"), content(1))
        assert_same(held, content(1))
        served.start_serving("--take-over")
        assert served.pid != pid

    @pytest.mark.parametrize("both", [False, True], ids=["giver", "both"])
    def test_a_giver_that_is_killed_before_its_last_word(self, served: Served, tmp_path: Path, both: bool) -> None:
        """Its holder says it, and the heir has everything; where that one has died as well, the holder follows."""
        killer = tmp_path / "killer"
        killer.mkdir()
        (killer / "sitecustomize.py").write_text(DIES_GIVING)
        served.environment = {"PYTHONPATH": f"{killer}:{os.environ.get('PYTHONPATH', '')}", "KILLER": str(killer)}
        first = served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held, pid = served.attach("m"), served.pid
        (killer / "giver").touch()
        if both:
            (killer / "heir").touch()
            assert served.start("--take-over").wait(DEADLINE_S) != 0
        else:
            served.start_serving("--take-over")
            assert first.wait(DEADLINE_S) == 0
        assert not (killer / "giver").exists()
        assert served.pid != pid
        assert served.gauges()["leases"] == 1
        assert_same(held, content(1))
        assert_same(served.attach("m"), content(1))
        assert (first.poll() is None) == both

    def test_an_heir_that_dies_before_all_is_its_own_leaves_no_name(self, served: Served, tmp_path: Path) -> None:
        """The kernel tells clients who listens: that is the one that serves."""
        (tmp_path / "sitecustomize.py").write_text(DIES_GIVING)
        served.environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "KILLER": str(tmp_path)}
        served.start_serving()
        pid = served.pid
        (tmp_path / "heir").touch()
        assert served.start("--take-over").wait(DEADLINE_S) != 0
        assert served.pid == pid
        with connect(served.path, DEADLINE_S) as sock:
            assert struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] == pid

    @pytest.mark.parametrize("how", ["owner", "failed"])
    def test_an_heir_that_has_everything_and_never_serves(self, served: Served, tmp_path: Path, how: str) -> None:
        """It is killed, or fails, after the giver's last word: that one goes on, under its name, and is followed."""
        (tmp_path / "sitecustomize.py").write_text(DIES_GIVING)
        served.environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "KILLER": str(tmp_path)}
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held, pid = served.attach("m"), served.pid
        resting = connect(served.path, DEADLINE_S)
        (tmp_path / how).touch()
        assert served.start("--take-over").wait(DEADLINE_S) != 0
        assert served.pid == pid
        send_blocking(resting, {"op": "ping"})
        assert receive_blocking(resting)[0]["pid"] == pid
        with connect(served.path, DEADLINE_S) as sock:
            assert struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] == pid
        resting.close()
        assert served.gauges()["leases"] == 1
        assert_same(held, content(1))
        (tmp_path / how).unlink(missing_ok=True)
        assert served.kill() == pid
        assert served.pid != pid
        assert_same(served.attach("m"), content(1))
        served.start_serving("--take-over")
        assert_same(served.attach("m"), content(1))

    @pytest.mark.parametrize("is_killed", [False, True], ids=["giver", "holder"])
    def test_an_heir_that_is_stopped_when_it_has_everything(
        self, served: Served, tmp_path: Path, is_killed: bool
    ) -> None:
        """The giver goes on, or the next one where it is killed: what that serves is not touched when it wakes up."""
        (tmp_path / "sitecustomize.py").write_text(DIES_GIVING)
        served.environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "KILLER": str(tmp_path)}
        (tmp_path / "impatient").write_text("holder" if is_killed else "giver")
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held, pid = served.attach("m"), served.pid
        (tmp_path / "stopped").touch()
        heir = served.start("--take-over")
        stopped = wait_stopped(heir.pid)
        if is_killed:
            os.kill(pid, signal.SIGKILL)
        assert (served.pid == pid) != is_killed, "asked while it was given away: answered once it was not"
        pid = served.pid
        served.load(write(tmp_path / "b.safetensors", content(2)), "other")
        os.kill(stopped, signal.SIGCONT)
        _, said = heir.communicate(timeout=DEADLINE_S)
        assert heir.returncode == 1
        assert "keeps its place" in said
        assert served.pid == pid
        assert_same(held, content(1))
        assert_same(served.attach("other"), content(2))
        assert served.kill() == pid
        assert {m["model"] for m in served.ask("status")["devices"][0]["models"]} == {"m", "other"}
        assert_same(served.attach("other"), content(2))

    def test_another_arena_is_refused_in_one_line(self, served: Served) -> None:
        served.start_serving()
        pid = served.pid
        other = subprocess.run(
            [sys.executable, "-m", "gpuload", "serve", "--socket", served.path, "--arena", "cpu=32MiB", "--take-over"],
            capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
        assert other.returncode == 1
        assert other.stderr.count("\n") == 1
        assert "wanted is cpu (cpu) of 16 granules" in other.stderr
        assert served.pid == pid

    def test_without_a_server_there_is_nothing_to_take_over(self, served: Served) -> None:
        process = served.start("--take-over")
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 1
        assert "no gpuload server at" in said
        assert said.count("\n") == 1

    def test_who_waits_for_other_content_goes_on_waiting_at_the_heir(self, served: Served, tmp_path: Path) -> None:
        served.start_serving()
        served.load(write(tmp_path / "a.safetensors", content(1)), "m")
        held = served.attach("m")
        with ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(held.wait, timeout_s=DEADLINE_S)
            until = time.monotonic() + DEADLINE_S
            while not served.ask("status")["waiting"] and time.monotonic() < until:
                time.sleep(0.01)
            served.start_serving("--take-over")
            served.load(write(tmp_path / "b.safetensors", content(2)), "m", is_swap=True)
            assert waiter.result(DEADLINE_S)

    def test_a_question_that_does_not_end_keeps_nobody_from_taking_over(self, served: Served) -> None:
        served.start_serving()
        pid = served.pid
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as half:
            half.connect(served.path)
            half.sendall(b"\0\0")  # and never the rest
            served.start_serving("--take-over")
            assert served.pid != pid
            half.settimeout(DEADLINE_S)
            assert half.recv(1) == b""


def wait_stopped(above: int) -> int:
    """Which process below that one has stopped, once one has."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid, _, rest = status.read_text().partition(" (")
                state, parent = rest.rpartition(") ")[2].split()[:2]
                if state == "T" and above in (int(pid), int(parent)):
                    return int(pid)
        time.sleep(0.01)
    raise AssertionError(f"nobody below {above} has stopped")


class TestOnCards:
    """On the stand-in driver, where memory is there as long as any process has a descriptor or a mapping of it."""

    def test_memory_lives_by_its_descriptors(self, compiled: Path, tmp_path: Path) -> None:
        served = Served(tmp_path, "cuda:0=64MiB")
        cards = {
            "LD_LIBRARY_PATH": str(compiled.parent),
            "STANDIN_CENSUS": str(os.getpid()),
            "STANDIN_MEMORY": str(256 << 20),
        }
        served.environment = cards
        program = build(tmp_path / "dump", DUMP, "-DGPULOAD_WITH_CUDA")
        made = content(1)

        def attached() -> dict[str, bytes]:
            done = run(program, served.path, "m", "-", "-", "60", **cards)
            assert done.returncode == 0, done.stderr
            return {name: data for name, _, _, data in parsed(done.stdout)}

        def free_bytes() -> int:
            return int(served.ask("status")["devices"][0]["device_free_bytes"])

        try:
            served.start_serving()
            load_resident(write(tmp_path / "a.safetensors", made), "m", "cuda:0", socket_path=served.path)
            assert attached() == {name: bits(tensor) for name, tensor in made.items()}
            free, pid = free_bytes(), served.kill()
            assert served.pid != pid
            assert attached() == {name: bits(tensor) for name, tensor in made.items()}
            served.start_serving("--take-over")
            assert attached() == {name: bits(tensor) for name, tensor in made.items()}
            assert served.processes[0].wait(DEADLINE_S) == 0
            assert free_bytes() == free, "it is the same memory, once"
            report = load_resident(tmp_path / "a.safetensors", "other", "cuda:0", socket_path=served.path)["report"]
            assert report["bytes_copied"] == 0
            for name, granules in (("big", 6), ("bigger", 7)):  # of eight; the latter evicts all that is there
                path = write(tmp_path / f"{name}.safetensors", random_tensors(1, {"w": (granules << 23,)}, "U8"))
                load_resident(path, name, "cuda:0", socket_path=served.path)
            served.ask("unload", model="bigger")
            assert free_bytes() == 128 << 20, "memory that took another shape is kept by nobody as it was"
        finally:
            served.close()


class TestServiceManager:
    def test_restart_kill_and_reload_under_systemds_protocols(self, served: Served, tmp_path: Path) -> None:
        with ServiceManager(tmp_path) as manager:
            manager.start(served.command, {})
            manager.wait_for("READY=1")
            served.load(write(tmp_path / "a.safetensors", content(1)), "m")
            held = served.attach("m")
            manager.take_all()
            names = [name for name, _ in manager.store]
            assert {"socket", "lock", "index", "shared.0"} < set(names)
            assert sum(name.startswith("lease.") for name in names) == 1

            assert manager.stop() == 0  # systemctl restart: whoever asks meanwhile waits
            answers: list[dict[str, Any]] = []
            asking = threading.Thread(target=lambda: answers.append(served.ask("ping")))
            asking.start()
            again(manager, served)
            asking.join(DEADLINE_S)
            assert answers[0]["pid"] == manager.pid
            assert_same(served.attach("m"), content(1))
            gc.collect()
            served.wait_for("leases", 1)

            manager.kill_group()  # with all that is around it
            again(manager, served)
            status = served.ask("status")
            assert (status["servers_before"], status["outlives_a_crash"]) == (2, True)
            assert served.gauges()["leases"] == 1

            reload = subprocess.Popen([*served.command, "--take-over"], env=manager.environment)  # ExecReload=
            said = len(manager.said)
            manager.wait_for("MAINPID=", after=said)
            assert manager.wait_ended() == 0
            assert reload.wait(DEADLINE_S) == 0
            pid = served.pid
            assert f"MAINPID={pid}" in manager.said[-1][1] or any(f"MAINPID={pid}" in m for _, m in manager.said)
            manager.take_all()
            assert len({name for name, _ in manager.store}) == len(manager.store), "what is kept is kept once"

            assert served.kill() == pid
            again(manager, served)
            assert served.ask("status")["servers_before"] == 4
            assert served.gauges()["leases"] == 1
            assert_same(held, content(1))
            del held
            gc.collect()
            served.wait_for("leases", 0)
            served.ask("unload", model="m")
            assert set(served.gauges().values()) == {0}
            manager.take_all()
            assert not [name for name, _ in manager.store if name.startswith(("model.", "lease."))]


def again(manager: ServiceManager, served: Served) -> None:
    """As Restart=: with what the store has."""
    said = len(manager.said)
    manager.start(served.command, {})
    manager.wait_for("READY=1", after=said)

"""The hook itself, in processes of their own: when it takes effect, what it holds, and what happens on failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuload.client.asking import ask
from gpuload.testing import ServerThread, random_tensors, write
from tests.gpuload.hooks.conftest import DEADLINE_S, NO_SOCKET, SITE, Run, hooked_environment, run_hooked, warmed

USE = """
import sys
{early}
import torch
from safetensors.torch import load_file
from safetensors import safe_open
def digest(t):
    return t.contiguous().flatten().view(torch.uint8).to(torch.int64).mul(torch.arange(t.nbytes) % 1009).sum().item()
path = sys.argv[1]
one = load_file(path)
print("load_file", {{k: digest(t) for k, t in sorted(one.items())}})
with safe_open(path, "pt") as f:
    print("get_tensor", digest(f.get_tensor("w")), f.keys(), f.metadata())
    s = f.get_slice("w")
    print("get_slice", digest(s[3:9, 5:]), s.get_shape(), s.get_dtype())
with safe_open(path, "np") as f:
    print("numpy", f.get_tensor("h").sum())
try:
    with safe_open(path, "pt") as f:
        f.get_tensor("absent")
except Exception as e:
    print(type(e).__name__, e)
one["w"].zero_()
print("again", digest(load_file(path)["w"]))
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run_hooked` for programs that import torch before safetensors anyway."""
    with warmed(tmp_path_factory.mktemp("warm"), "torch") as run:
        yield run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {**random_tensors(1, {"w": (64, 200)}), **random_tensors(2, {"h": (9,)}, "F32")}
    return write(tmp_path / "a.safetensors", tensors)


@pytest.mark.parametrize(
    "early",
    [
        "",
        "from safetensors import safe_open; from safetensors.torch import load_file",
        "import importlib.util as u; assert u.find_spec('safetensors') and u.find_spec('safetensors')",
    ],
    ids=["late", "imported before", "asked for before"],
)
def test_unmodified_safetensors_is_served_and_cannot_tell(
    warm: Run, resident: ServerThread, file: Path, early: str
) -> None:
    code = USE.format(early=early)
    plain = warm(code, file, socket_path=None, GPULOAD_AUTO="0")
    run = run_hooked if early.startswith("from safetensors") else warm  # there it is safetensors that brings torch
    served = run(code, file, socket_path=resident.socket_path)
    assert served.stdout == plain.stdout
    gauges = resident.gauges()
    assert (gauges["models"], gauges["leases"]) == (1, 0), "the file is resident, and nobody holds it any more"


MODES = """
import sys, torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
reads = {
    "get_tensor": lambda f: f.get_tensor("w"),
    "get_tensors": lambda f: f.get_tensors()["w"] if hasattr(f, "get_tensors") else f.get_tensor("w"),
    "slice": lambda f: f.get_slice("w")[2:5],
    "columns": lambda f: f.get_slice("w")[:, 3],
    "all": lambda f: f.get_slice("w")[...],
}
modes = {"none": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode, "fake": FakeTensorMode}
def told(work):
    try:
        return work()
    except Exception as e:
        return type(e).__name__ + " " + str(e)
def use(t):  # as who trains does
    said = [t.is_inference(), t.requires_grad, t.is_leaf, told(lambda: t._version)]
    said.append(told(lambda: t.add_(1)._version))
    said.append(told(lambda: (t.float() * torch.ones((), requires_grad=True)).sum().backward()))
    return said + [told(lambda: t.requires_grad_().is_leaf), told(lambda: (t * 2).sum().backward())]
for first in modes:
    for later in modes:
        for name, read in reads.items():
            with safe_open(sys.argv[1], "pt") as f:
                with modes[first]():
                    one = told(lambda: read(f))
                with modes[later]():
                    other = told(lambda: read(f))
                again = read(f)
                for made in (one, other, again):
                    print(first, later, name, made if isinstance(made, str) else use(made))
"""


def test_every_reader_gets_tensors_of_his_own_mode(warm: Run, resident: ServerThread, tmp_path: Path) -> None:
    """Whoever read the file before him, and in whatever mode: the library's tensors know nothing of each other."""
    path = write(tmp_path / "a.safetensors", random_tensors(2, {"w": (8, 9)}, "F32"))
    plain = warm(MODES, path, socket_path=None, GPULOAD_AUTO="0")
    served = warm(MODES, path, socket_path=resident.socket_path)
    assert served.stdout == plain.stdout
    assert "without the server" not in served.stderr


LIMITED = """
import os, resource, subprocess, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
import torch
from safetensors.torch import load_file
resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
kept = [load_file(sys.argv[1]) for _ in range(150)]
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
ask = "import resource; print('a program', resource.getrlimit(resource.RLIMIT_NOFILE))"
print(resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)
subprocess.run([sys.executable, "-S", "-c", ask], env={})
subprocess.run([sys.executable, "-S", "-c", ask], env={}, close_fds=False)
if not os.fork():
    print("a fork", resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)
    os._exit(0)
os.wait()
"""


def test_a_program_keeps_its_limit_of_descriptors_and_what_is_below_it(
    warm: Run, resident: ServerThread, file: Path
) -> None:
    """A lease for every shard of a large model, under a low limit: the program and its children can open as before."""
    plain = warm(LIMITED, file, socket_path=None, GPULOAD_AUTO="0")
    served = warm(LIMITED, file, socket_path=resident.socket_path)
    assert served.stdout == plain.stdout
    assert "without the server" not in served.stderr


SCARCE = """
import resource, sys
import torch
from safetensors.torch import load_file
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
kept = [load_file(sys.argv[1]) for _ in range(100)]
files = [open("/dev/null") for _ in range(20)]
print(len(kept))
from gpuload.hooks.counts import counts
print(counts, file=sys.stderr)
"""


def test_leases_leave_a_program_half_of_its_descriptors(warm: Run, resident: ServerThread, file: Path) -> None:
    """Where its limit cannot be raised either, the rest of a model of many files is the library's."""
    plain = warm(SCARCE, file, socket_path=None, GPULOAD_AUTO="0")
    served = warm(SCARCE, file, socket_path=resident.socket_path)
    assert served.stdout == plain.stdout == "100\n"
    assert "descriptors (ulimit -n)" in served.stderr
    assert "served 0," not in served.stderr


def assert_alone(run: Run, code: str, file: Path, socket_path: str | None, reason: str) -> None:
    """The program's output is the library's, and one line says why."""
    plain = run(code, file, socket_path=None, GPULOAD_AUTO="0")
    alone = run(code, file, socket_path=socket_path)
    assert alone.stdout == plain.stdout
    lines = [line for line in alone.stderr.splitlines() if line]
    assert len(lines) == 1, alone.stderr
    assert reason in lines[0]


def test_without_a_server_it_is_silent_but_for_one_line(warm: Run, file: Path) -> None:
    assert_alone(warm, USE.format(early=""), file, None, "without the server: no gpuload server at")


def test_a_server_without_room_is_as_good_as_none(warm: Run, resident: ServerThread, tmp_path: Path) -> None:
    big = write(tmp_path / "big.safetensors", random_tensors(1, {"w": (200 << 20,), "h": (9,)}, "U8"))
    code = "import sys; from safetensors.torch import load_file; print(int(load_file(sys.argv[1])['w'][-5:].sum()))"
    assert_alone(warm, code, big, resident.socket_path, "without the server")


def test_a_server_that_is_stopped_holds_nobody(warm: Run, file: Path, tmp_path: Path) -> None:
    """Its socket takes connections still; nothing behind it answers."""
    socket_path = str(tmp_path / "s.sock")
    server = subprocess.Popen(
        [sys.executable, "-m", "gpuload", "serve", "--arena", "cpu=8MiB", "--socket", socket_path],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        assert "serving" in server.stderr.readline()
        pid = ask({"op": "ping"}, socket_path=socket_path)["pid"]
        os.kill(pid, signal.SIGSTOP)
        code = "import gpuload.hooks.resident as r; r.PING_S = 0.2" + USE.format(early="")
        assert_alone(warm, code, file, socket_path, "did not answer")
        os.kill(pid, signal.SIGCONT)
    finally:
        server.kill()
        server.communicate()


REPLACED = """
import os, sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as f:
    os.replace(sys.argv[2], sys.argv[1])
    print(f.get_tensor("w").tolist())
with safe_open(sys.argv[1], "pt") as f:
    print(f.get_tensor("w").tolist())
"""


def test_a_file_replaced_while_open_is_not_mixed_with_the_new_one(
    warm: Run, resident: ServerThread, tmp_path: Path
) -> None:
    made = [random_tensors(i, {"w": (4,)}, "I32") for i in (1, 2)]
    old, new = (write(tmp_path / f"{i}.safetensors", t) for i, t in enumerate(made))
    out = warm(REPLACED, old, new, socket_path=resident.socket_path).stdout.splitlines()
    assert out == [str(t["w"].tolist()) for t in made]


HELD = """
import sys, time
import gpuload.hooks.safetensors_patch as hook
hook.IDLE_S = 0.05
from gpuload.client.asking import ask
def leases():
    return ask({"op": "status"})["devices"][0]["gauges"]["leases"]
def wait_for_none():
    deadline = time.monotonic() + 60
    while leases():
        assert time.monotonic() < deadline, "the lease was never given up"
        time.sleep(0.01)
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as f:
    piece = f.get_slice("w")
    held = piece[:]
    assert leases() == 1
    del held
wait_for_none()  # although the slice is alive
late = piece[:]
assert hook.counts.left == 1 and late.shape == (64, 200)
hook.IDLE_S = 0.2
f = safe_open(sys.argv[1], "pt")
kept = f.get_tensor("w")
del f  # dropped, and never closed
time.sleep(0.5)
assert leases() == 1, "a tensor that lives holds its memory, idle or not"
del kept
wait_for_none()
f = safe_open(sys.argv[1], "pt")
assert f.get_tensor("w") is not None
wait_for_none()
assert f.get_tensor("w").shape == (64, 200) and leases() == 1, "it attaches again"
assert hook.counts.left == 1
print("done", len(hook._slices.values()), "slices known")
"""


def test_a_lease_ends_with_the_file_and_its_tensors_however_the_file_is_dropped(
    warm: Run, resident: ServerThread, file: Path
) -> None:
    out = warm(HELD, file, socket_path=resident.socket_path).stdout
    assert out == "done 0 slices known\n"


FORKED_INSIDE = """
import os, sys, threading
import gpuload.hooks.resident as resident
import gpuload.hooks.safetensors_patch as hook
inside, go = threading.Event(), threading.Event()
real = resident.attach_file
def slow(*args, **kwargs):
    inside.set()
    assert go.wait(60)
    return real(*args, **kwargs)
hook.attach_file = slow
from safetensors import safe_open
f = safe_open(sys.argv[1], "pt")
got = []
thread = threading.Thread(target=lambda: got.append(f.get_tensor("w")))
thread.start()
assert inside.wait(60)
child = os.fork()
if not child:
    hook.attach_file = real
    os._exit(0 if f.get_tensor("w").shape == (64, 200) and hook.counts.served == 1 else 1)
_, status = os.waitpid(child, 0)
go.set()
thread.join()
print(os.waitstatus_to_exitcode(status), got[0].shape[0])
"""


def test_a_child_forked_while_a_thread_attaches_does_not_hang(warm: Run, resident: ServerThread, file: Path) -> None:
    assert warm(FORKED_INSIDE, file, socket_path=resident.socket_path).stdout == "0 64\n"


def test_a_program_that_loads_nothing_pays_nothing() -> None:
    imported = ("torch", "safetensors", "trio", "gpuload.client.attached")
    code = f"import sys; print([m for m in {imported} if m in sys.modules])"
    assert run_hooked(code, socket_path=None).stdout.strip() == "[]"


def test_off_means_off(warm: Run, resident: ServerThread, file: Path) -> None:
    """gpuload's own folder on the path, and GPULOAD_AUTO not set: safetensors is nobody's but its own."""
    use = "import sys; from safetensors.torch import load_file; load_file(sys.argv[1])"
    code = f"{use}; print('gpuload.client.attached' in sys.modules)"
    assert warm(code, file, socket_path=resident.socket_path, GPULOAD_AUTO="0").stdout.strip() == "False"
    assert resident.gauges()["models"] == 0


def test_the_hidden_sitecustomize_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.hidden_ran = True")
    code = "import sys; print(sys.hidden_ran, any('gpuload.hooks.auto' == m for m in sys.modules))"
    out = run_hooked(code, socket_path=None, PYTHONPATH=f"{SITE}:{tmp_path}").stdout
    assert out.split() == ["True", "True"]


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        ("gpuload/__init__.py", "raise RuntimeError('as asked')"),
        ("gpuload/__init__.py", "this is no Python"),
        ("gpuload/hooks/safetensors_patch.py", "raise RuntimeError('as asked')"),
    ],
    ids=["at import", "not even Python", "when it is needed"],
)
def test_a_gpuload_that_fails_is_one_line_and_no_more(tmp_path: Path, broken: str, code: str) -> None:
    """A half-installed gpuload stands first on the path; auto.py itself is the real one where it is reached."""
    for name in ("gpuload/__init__.py", "gpuload/hooks/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "gpuload/hooks/auto.py").write_text((SITE.parent / "auto.py").read_text())
    (tmp_path / broken).write_text(code)
    file = write(tmp_path / "a.safetensors", random_tensors(2, {"h": (9,), "w": (3,)}, "F32"))
    use = "import sys; from safetensors.numpy import load_file; print(sorted(load_file(sys.argv[1])))"
    done = run_hooked(use, file, socket_path=None, PYTHONPATH=f"{SITE}:{tmp_path}")
    assert done.stdout == "['h', 'w']\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("gpuload: not used here:")


def test_a_python_that_has_no_gpuload_runs_as_ever(tmp_path: Path) -> None:
    """Another environment's interpreter, below a hooked program: sitecustomize finds no gpuload there, and says so."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules.pop('sitecustomize', None); print('ran')"],
        env={**hooked_environment(None), "PYTHONPATH": f"{SITE}:{tmp_path}"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.stdout == "ran\n"
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=DEADLINE_S)
    done = subprocess.run(
        [venv / "bin" / "python", "-c", "print('ran')"],
        env={**hooked_environment(None), "PYTHONPATH": str(SITE)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == "gpuload: not used here: No module named 'gpuload'\n"


def test_gpuload_run_hooks_a_server_and_the_processes_it_starts(resident: ServerThread, file: Path) -> None:
    """`gpuload run -- python server.py`, from the outside: the command line, a program, and a process below it."""
    inner = (
        "import sys; from safetensors.torch import load_file; load_file(sys.argv[1]); "
        "from gpuload.hooks.counts import counts; print(counts.served, counts.left)"
    )
    outer = "import subprocess, sys; " + f"subprocess.run([sys.executable, '-c', {inner!r}, sys.argv[1]], check=True)"
    command = [sys.executable, "-m", "gpuload", "run", "--socket", resident.socket_path, "--"]
    environment = {k: v for k, v in os.environ.items() if k not in ("GPULOAD_AUTO", "GPULOAD_SOCKET")}
    for code in (inner, outer):
        done = subprocess.run(
            [*command, sys.executable, "-c", code, str(file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert (done.stdout, done.stderr) == ("2 0\n", "")
    assert resident.gauges()["models"] == 1


def test_what_came_from_where_can_be_asked(warm: Run, resident: ServerThread, file: Path) -> None:
    code = (
        "import json, sys; from safetensors.torch import load_file; load_file(sys.argv[1]); "
        "from gpuload.hooks.counts import counts; print(json.dumps([counts.served, str(counts)]))"
    )
    said = json.loads(warm(code, file, socket_path=resident.socket_path).stdout)
    assert said == [2, "served 2, streamed 0, left to the library 0"]
    said = json.loads(warm(code, file, socket_path=NO_SOCKET).stdout)
    assert said == [0, "served 0, streamed 0, left to the library 2"]


SIZES = """
import sys
from safetensors.torch import load_file
from gpuload.hooks.counts import counts
for path in sys.argv[1:]:
    before = counts.served
    load_file(path)
    print(counts.served - before)
"""


@pytest.mark.parametrize(
    ("given", "served", "said"),
    [
        ("", "0\n1\n", ""),
        ("0", "1\n1\n", ""),
        ("few", "0\n1\n", "GPULOAD_SMALL_BYTES='few': expected a number of bytes"),
    ],
    ids=["as it is", "every file", "no number"],
)
def test_small_files_are_left_to_the_library(
    warm: Run, resident: ServerThread, file: Path, tmp_path: Path, given: str, served: str, said: str
) -> None:
    few = write(tmp_path / "few.safetensors", random_tensors(1, {"w": (1000,)}))
    many = write(tmp_path / "many.safetensors", random_tensors(1, {"w": (1 << 19,)}))  # 1 MiB and its header
    done = warm(SIZES, few, many, socket_path=resident.socket_path, GPULOAD_SMALL_BYTES=given)
    assert done.stdout == served
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)

"""The C client against a real server and hostile ones: what PROTOCOL.md says suffices to get every byte.

Compiled with all warnings as errors, as C11 and as C++17, and run under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors import safe_open

from gpuload import include_dir
from gpuload.client.asking import ask, load_resident
from gpuload.device.cuda import CudaDevice
from gpuload.device.host import HostDevice
from gpuload.server.config import ServerConfig
from gpuload.testing import ServerThread, bits, random_tensors, running_server, write
from gpuload.wire import encode, rights
from tests.gpuload.conftest import GRANULE
from tests.gpuload.device.conftest import Processes, compiled, process

__all__ = ["compiled", "process"]  # fixtures

DUMP = Path(__file__).parent / "c" / "dump.c"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
SANITIZED = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
REFUSED, AWAY, PROTOCOL_ERROR, SYSTEM, USAGE = 1, 2, 3, 4, 5

Table = list[tuple[str, str, tuple[int, ...], bytes]]


def build(out: Path, source: Path, *flags: str, standard: str = "c11", compiler: str = "cc") -> Path:
    language = ["-x", "c++"] if compiler == "c++" else []
    command = [
        compiler,
        f"-std={standard}",
        *STRICT,
        *flags,
        f"-I{include_dir()}",
        *language,
        source,
        "-o",
        out,
        "-ldl",
    ]
    subprocess.run([str(part) for part in command], check=True)
    return out


@pytest.fixture
def server(config: ServerConfig) -> Iterator[ServerThread]:
    config = replace(config, arena_bytes={"cpu": 128 << 20})
    with running_server(config, lambda _: HostDevice(granule_bytes=GRANULE)) as running:
        yield running


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("c") / "dump", DUMP, *SANITIZED)


def run(program: Path, path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """GPULOAD_SOCKET is `path`."""
    done = subprocess.run(
        [program, *arguments], env={**os.environ, "GPULOAD_SOCKET": path, **environment}, capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert b"Sanitizer" not in done.stderr, done.stderr.decode()
    assert b"runtime error" not in done.stderr, done.stderr.decode()
    if done.returncode:
        assert done.stderr.count(b"\n") == 1, done.stderr.decode()
    return done


def parsed(dumped: bytes) -> Table:
    at, table = 0, []

    def field() -> bytes:
        nonlocal at
        (size,) = struct.unpack_from("=Q", dumped, at)
        at += 8 + size
        return dumped[at - size : at]

    while at < len(dumped):
        name, dtype, shape, data = field(), field(), field(), field()
        table.append((name.decode(), dtype.decode(), struct.unpack(f"={len(shape) // 8}Q", shape), data))
    return table


def test_every_byte_of_the_real_model(server: ServerThread, dump: Path, minilm_dir: Path) -> None:
    load_resident(minilm_dir / "model.safetensors", "m", "cpu", socket_path=server.socket_path)
    done = run(dump, server.socket_path, "m", "-", "-", "60")
    assert done.returncode == 0, done.stderr
    got = {name: (dtype, shape, data) for name, dtype, shape, data in parsed(done.stdout)}
    with safe_open(minilm_dir / "model.safetensors", "pt") as file:
        assert set(got) == set(file.keys())
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert got[name][1:] == (tuple(tensor.shape), bits(tensor)), name
    assert server.gauges()["leases"] == 0
    assert run(dump, server.socket_path, "-", "-", "-", "60").stdout == b"4 0.1.0"


def test_names_types_and_shapes_of_all_kinds(server: ServerThread, dump: Path, tmp_path: Path) -> None:
    made = random_tensors(1, {'a "quoted" \\ name': (3, 5), "größe 𝕨 \t": (7,), "none": (0, 4), "one": ()}, "F32")
    made |= random_tensors(2, {f"l.{i}": (50, 41) for i in range(30)}, "U8")
    load_resident(write(tmp_path / "a.safetensors", made), "m ö", "cpu", socket_path=server.socket_path)
    done = run(dump, server.socket_path, "m ö", "cpu", "-", "60")
    assert done.returncode == 0, done.stderr
    assert {name: (shape, data) for name, _, shape, data in parsed(done.stdout)} == {
        name: (tuple(tensor.shape), bits(tensor)) for name, tensor in made.items()
    }


def test_what_the_server_refuses_is_said(server: ServerThread, dump: Path, tmp_path: Path) -> None:
    load_resident(
        write(tmp_path / "a.safetensors", random_tensors(1, {"w": (5,)})), "m", "cpu", socket_path=server.socket_path
    )
    digest = ask({"op": "status"}, socket_path=server.socket_path)["devices"][0]["models"][0]["digest"]
    assert run(dump, server.socket_path, "m", "cpu", digest, "60").returncode == 0
    for arguments, word in [
        (("x", "-", "-"), "NotFoundError: no model 'x' is resident"),
        (("m", "cuda:3", "-"), "NotFoundError: this server has no arena on cuda:3"),
        (("m", "-", "0" * 64), "ChangedError: 'm' is now"),
    ]:
        done = run(dump, server.socket_path, *arguments, "60")
        assert (done.returncode, word in done.stderr.decode()) == (REFUSED, True), done.stderr
    done = run(dump, str(tmp_path / "nobody"), "m", "-", "-", "60")
    assert (done.returncode, b"start one with `gpuload serve`" in done.stderr) == (AWAY, True)
    assert run(dump, "/" + "x" * 200, "m", "-", "-", "60").returncode == USAGE
    assert run(dump, server.socket_path, "x" * 900, "-", "-", "60").returncode == USAGE


def test_it_is_cpp_too_and_the_example_runs(server: ServerThread, tmp_path: Path) -> None:
    example = build(tmp_path / "example", Path(include_dir()) / "example.c", "-O2")
    if shutil.which("c++"):
        build(tmp_path / "cpp", DUMP, standard="c++17", compiler="c++")
        build(tmp_path / "cpp-cuda", DUMP, "-DGPULOAD_WITH_CUDA", standard="c++17", compiler="c++")
    made = random_tensors(3, {"w": (2, 3)}, "F32")
    load_resident(write(tmp_path / "a.safetensors", made), "m", "cpu", socket_path=server.socket_path)
    said = run(example, server.socket_path, "m", "w").stdout.decode()
    assert said.startswith("w F32 [2, 3]: ")
    assert [float(word) for word in said.split("]: ")[1].split()] == pytest.approx(
        made["w"].flatten()[:5].tolist(), rel=1e-4, nan_ok=True
    )


def test_on_a_card(process: Processes, compiled: Path, config: ServerConfig, tmp_path: Path, dump: Path) -> None:
    """Against the stand-in driver, whose memory a CPU can read."""
    program = build(tmp_path / "dump", DUMP, *SANITIZED, "-DGPULOAD_WITH_CUDA")
    driver = process(STANDIN_DEVICES=2)
    made = random_tensors(1, {f"l.{i}": (300, 1000) for i in range(4)}, "BF16")
    config = replace(config, arena_bytes={"cuda:1": 8 << 20})
    with running_server(config, lambda name: CudaDevice(1, granule_bytes=65536, driver=driver)) as server:
        load_resident(write(tmp_path / "a.safetensors", made), "m", "cuda:1", socket_path=server.socket_path)
        cards = {"LD_LIBRARY_PATH": str(compiled.parent), "STANDIN_DEVICES": "2"}
        for visible in ("0,1", "1,0", "1"):
            done = run(program, server.socket_path, "m", "-", "-", "60", CUDA_VISIBLE_DEVICES=visible, **cards)
            assert done.returncode == 0, done.stderr
            assert {name: data for name, _, _, data in parsed(done.stdout)} == {n: bits(t) for n, t in made.items()}
        done = run(program, server.socket_path, "m", "-", "-", "60", CUDA_VISIBLE_DEVICES="0", **cards)
        assert (done.returncode, b"which this process does not see" in done.stderr) == (SYSTEM, True)
        done = run(dump, server.socket_path, "m", "-", "-", "60")
        assert (done.returncode, b"compile with GPULOAD_WITH_CUDA" in done.stderr) == (USAGE, True)
        assert server.gauges("cuda:1")["leases"] == 0


# -- servers that mean no good

GOOD: dict[str, Any] = {
    "model": "m", "digest": "d" * 64, "generation": 1, "metadata": [None],
    "parts": [{"device": "cpu", "granule_bytes": 4096, "runs": [[0, 1]], "fds": 1}],
    "tensors": [["w", "U8", [100], 0, 0, 100]],
}  # fmt: skip


def memory(size: int = 4096, *, seals: int = 0x2) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, 1033, seals)
    return fd


class Hostile:
    """Answers one client with the bytes and descriptors that a test gives."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(path)
        self._sock.listen(8)
        self.path = path

    def answer(
        self, sent: bytes, groups: Sequence[Sequence[int]] = (), *, mark: bytes = b"F", waits: bool = False
    ) -> None:
        def serve() -> None:
            client, _ = self._sock.accept()
            with client:
                client.recv(4096)
                try:
                    client.sendall(sent)
                    for group in groups:
                        client.sendmsg([mark], rights(group))
                except OSError:  # it has seen enough
                    pass
                while waits and client.recv(4096):  # a request may come in parts
                    pass
            for fd in {fd for group in groups for fd in group}:
                os.close(fd)

        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    made = Hostile(str(tmp_path / "h.sock"))
    yield made
    made.close()


def frame(message: dict[str, Any], fds: int) -> bytes:
    return encode(message, range(fds))


def raw(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def with_part(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "parts": [{**GOOD["parts"][0], **changes}]}


def with_row(*row: Any) -> dict[str, Any]:
    return {**GOOD, "tensors": [list(row)]}


LIES: list[tuple[str, Callable[[], tuple[bytes, list[list[int]]]], int]] = [
    ("nothing", lambda: (b"", []), AWAY),
    ("half a length", lambda: (b"\0\0", []), AWAY),
    ("half a frame", lambda: (raw(b'{"fds":0}' * 9)[:30], []), AWAY),
    ("absurd length", lambda: (b"\xff\xff\xff\xff{", []), PROTOCOL_ERROR),
    ("length of nothing", lambda: (b"\0\0\0\0", []), PROTOCOL_ERROR),
    ("no object", lambda: (raw(b"[1,2]"), []), PROTOCOL_ERROR),
    ("more than an object", lambda: (raw(b"{}{}"), []), PROTOCOL_ERROR),
    ("an open string", lambda: (raw(b'{"a":"b'), []), PROTOCOL_ERROR),
    ("an open escape", lambda: (raw(b'{"a":"\\'), []), PROTOCOL_ERROR),
    ("half a surrogate", lambda: (raw(b'{"a":"\\ud800x"}'), []), PROTOCOL_ERROR),
    ("a zero", lambda: (raw(b'{"a":"\0"}'), []), PROTOCOL_ERROR),
    ("no UTF-8", lambda: (raw(b'{"a":"\xff\xfe"}'), []), PROTOCOL_ERROR),
    ("a cut character", lambda: (raw(b'{"a":"\xf0\x9f"}'), []), PROTOCOL_ERROR),
    ("deep", lambda: (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), []), PROTOCOL_ERROR),
    ("absurdly many descriptors", lambda: (raw(b'{"fds":100000000000000000000}'), []), PROTOCOL_ERROR),
    ("fewer than no descriptors", lambda: (raw(b'{"fds":-1}'), []), PROTOCOL_ERROR),
    ("descriptors that do not come", lambda: (frame(GOOD, 3), [[memory()]]), AWAY),
    ("more than were announced", lambda: (frame(GOOD, 1), [[memory(), memory()]]), PROTOCOL_ERROR),
    ("none for the part", lambda: (frame(GOOD, 0), []), PROTOCOL_ERROR),
    ("more than the parts have", lambda: (frame(GOOD, 2), [[memory(), memory()]]), PROTOCOL_ERROR),
    ("no parts", lambda: (frame({**GOOD, "parts": 5}, 0), []), PROTOCOL_ERROR),
    ("no digest", lambda: (frame({**GOOD, "digest": None}, 1), [[memory()]]), PROTOCOL_ERROR),
    ("memory that could shrink", lambda: (frame(GOOD, 1), [[memory(seals=0)]]), PROTOCOL_ERROR),
    ("memory that is too small", lambda: (frame(GOOD, 1), [[memory(100)]]), PROTOCOL_ERROR),
    ("runs beyond", lambda: (frame(with_part(runs=[[1, 1]]), 1), [[memory()]]), PROTOCOL_ERROR),
    ("runs that overflow", lambda: (frame(with_part(runs=[[2**62, 2**62]]), 1), [[memory()]]), PROTOCOL_ERROR),
    ("runs of nothing", lambda: (frame(with_part(runs=[[0, 0]]), 1), [[memory()]]), PROTOCOL_ERROR),
    ("runs of one", lambda: (frame(with_part(runs=[[0]]), 1), [[memory()]]), PROTOCOL_ERROR),
    ("no runs", lambda: (frame(with_part(runs={}), 1), [[memory()]]), PROTOCOL_ERROR),
    ("no granule", lambda: (frame(with_part(granule_bytes=0), 1), [[memory()]]), PROTOCOL_ERROR),
    ("an odd granule", lambda: (frame(with_part(granule_bytes=4097), 1), [[memory(8192)]]), PROTOCOL_ERROR),
    ("a huge granule", lambda: (frame(with_part(granule_bytes=2**62), 1), [[memory()]]), PROTOCOL_ERROR),
    ("no device", lambda: (frame(with_part(device=7), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a short row", lambda: (frame(with_row("w", "U8"), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a long row", lambda: (frame(with_row("w", "U8", [1], 0, 0, 1, 1), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a part that is not there", lambda: (frame(with_row("w", "U8", [1], 1, 0, 1), 1), [[memory()]]), PROTOCOL_ERROR),
    ("beyond its part", lambda: (frame(with_row("w", "U8", [2], 0, 4095, 2), 1), [[memory()]]), PROTOCOL_ERROR),
    ("far beyond", lambda: (frame(with_row("w", "U8", [8], 0, 2**62, 8), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a shape of other bytes", lambda: (frame(with_row("w", "F32", [2], 0, 0, 7), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a shape beyond", lambda: (frame(with_row("w", "U8", [2**40, 2**40], 0, 0, 8), 1), [[memory()]]), PROTOCOL_ERROR),
    ("bits that overflow", lambda: (frame(with_row("w", "F64", [2**60], 0, 0, 0), 1), [[memory()]]), PROTOCOL_ERROR),
    ("many axes", lambda: (frame(with_row("w", "U8", [1] * 100, 0, 0, 1), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a negative axis", lambda: (frame(with_row("w", "U8", [-1], 0, 0, 1), 1), [[memory()]]), PROTOCOL_ERROR),
    ("half an offset", lambda: (frame(with_row("w", "U8", [1], 0, 0.5, 1), 1), [[memory()]]), PROTOCOL_ERROR),
    ("a name twice", lambda: (frame({**GOOD, "tensors": GOOD["tensors"] * 2}, 1), [[memory()]]), PROTOCOL_ERROR),
    ("no socket's descriptor", lambda: (frame(GOOD, 1), [[os.open("/dev/null", os.O_RDONLY)]]), PROTOCOL_ERROR),
]  # fmt: skip


def test_no_answer_does_harm(hostile: Hostile, dump: Path) -> None:
    for name, lie, status in LIES:
        hostile.answer(*lie())
        done = run(dump, hostile.path, "m", "-", "-", "30")
        hostile.thread.join()
        assert done.returncode == status, (name, done.returncode, done.stderr)
    hostile.answer(frame(GOOD, 1), [[memory()]], mark=b"G")
    assert run(dump, hostile.path, "m", "-", "-", "30").returncode == PROTOCOL_ERROR
    hostile.thread.join()
    hostile.answer(frame(GOOD, 1), [[memory()]])
    done = run(dump, hostile.path, "m", "-", "-", "30")
    hostile.thread.join()
    assert parsed(done.stdout) == [("w", "U8", (100,), bytes(100))], "what is right is taken"


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_was_said(hostile: Hostile, dump: Path) -> None:
    for sent in (b"", b"\0\0\1\0{", frame(GOOD, 1)):
        hostile.answer(sent, waits=True)
        done = run(dump, hostile.path, "m", "-", "-", "0.2")
        hostile.thread.join()
        assert (done.returncode, b"did not answer in time" in done.stderr) == (AWAY, True), done.stderr


def test_answers_with_any_bytes_changed(hostile: Hostile, dump: Path) -> None:
    """A good answer with some bytes replaced or cut out: taken or refused, never a fault."""
    chance = random.Random(3)
    for _ in range(40):
        body = bytearray(frame(GOOD, 1)[4:])
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(body))
            if chance.random() < 0.3:
                del body[at : at + chance.randrange(1, 9)]
            else:
                body[at] = chance.choice(b'"\\[]{},:0129-.eutfn\x00\xff')
        hostile.answer(raw(bytes(body)), [[memory()]])
        run(dump, hostile.path, "m", "-", "-", "30")
        hostile.thread.join()


def test_where_the_header_is() -> None:
    done = subprocess.run([sys.executable, "-m", "gpuload", "include"], capture_output=True, text=True)
    assert (Path(done.stdout.strip()) / "gpuload.h").exists()


def test_digests_are_what_the_protocol_says(server: ServerThread, tmp_path: Path) -> None:
    made = random_tensors(1, {"b": (5 << 20,), 'a "q"\u00e9\n\u007f': (3, 7), "none": (0, 2)}, "U8")
    load_resident(write(tmp_path / "a.safetensors", made), "m", "cpu", socket_path=server.socket_path)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names = file.offset_keys()
    text = {"b": '"b"', 'a "q"\u00e9\n\u007f': '"a \\"q\\"\u00e9\\n\u007f"', "none": '"none"'}
    rows = ",".join(f'[{text[name]},"U8",[{",".join(str(n) for n in made[name].shape)}]]' for name in names)
    hasher = blake3(blake3(f'[[[["format","pt"]]],[{rows}]]'.encode()).digest())
    for name in names:
        data = bits(made[name])
        for at in range(0, len(data), 4 << 20):
            hasher.update(blake3(data[at : at + (4 << 20)]).digest())
    model = ask({"op": "status"}, socket_path=server.socket_path)["devices"][0]["models"][0]
    assert model["digest"] == hasher.hexdigest()

"""A real Triton inference server with its python backend, on loopback, CPU only.

Made by `tools/setup test` in `.servers/triton`: the server of the nvidia-pytriton wheel, and an environment for the
python backend's stub, which sees this project and torch. Models are talked to over HTTP with JSON.
Quirks (2.51): the stub ignores PYTHONPATH; a killed server leaves its shared memory, so this one is given names of its
own by a private prefix and cleans them up.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import shutil
import signal
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers.process import PROJECT_ROOT, ServerError, ServerProcess, free_port, wait_for_signal

ROOT = PROJECT_ROOT / ".servers" / "triton"
INSTALLED = ROOT / "server" / "pytriton" / "tritonserver"
PYTHON = ROOT / "python" / "bin" / "python3"
SHARED_MEMORY = Path("/dev/shm")

CALL_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
_EXIT_TIMEOUT_S = 5
_PREFIX = "mfs_test_triton_"


class TritonError(Exception):
    """The server answered with an error: `status` and its own message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def missing() -> str:
    """Why there is no Triton on this machine; '' if there is."""
    if (ROOT / "made").exists():
        return ""
    machine = platform.machine()
    return f"no Triton for {machine}" if machine != "x86_64" else f"no Triton in {ROOT}: run tools/setup test"


class TritonServer:
    """One tritonserver over one repository. Not started by the constructor; `log` is its output since its start."""

    def __init__(
        self,
        folder: Path,
        repository: Path | str,
        *options: str,
        env: Mapping[str, str] | None = None,
        auto_complete: bool = False,
        backends: Mapping[str, Path] | None = None,
        argv_before: Sequence[str] = (),
    ) -> None:
        """folder: for its log and temporary files. options: further flags, such as '--model-control-mode=poll'.

        auto_complete: let backends fill in what configurations leave out; costs a second a model.
        backends: name -> folder of further backends. argv_before: a command to run the server under.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self._options = [*options, *([] if auto_complete else ["--disable-auto-complete-config"])]
        self._repository = str(repository)
        self._env = dict(env or {})
        self._backends = dict(backends or {})
        self._before = list(argv_before)
        self._log = folder / "triton.log"
        self._process: ServerProcess | None = None
        self._pid = 0
        self._kept: http.client.HTTPConnection | None = None
        # Its stubs name their memory by a prefix and themselves by no more: with a prefix of our own we know ours.
        self._prefix = f"{_PREFIX}{os.getpid()}_{self.port}_"
        self.temporary = folder / "tmp"
        """Its TMPDIR."""

    # -- life

    def start(self, *, ready: bool = True) -> TritonServer:
        """Start and return when it answers. ready: and when it says that it and its first models are ready.

        Raises: ServerError.
        """
        if reason := missing():
            raise ServerError(reason)
        if self._process is not None:
            raise ServerError("Triton is already running")
        for left in SHARED_MEMORY.glob(f"{_PREFIX}*"):  # of a run that was killed a day ago
            if time.time() - left.stat().st_mtime > 86_400:
                left.unlink(missing_ok=True)
        self.temporary.mkdir(exist_ok=True)
        self._log.unlink(missing_ok=True)
        argv = [
            *self._before,
            str(INSTALLED / "bin" / "tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._backend_folder()}",
            "--http-address=127.0.0.1", f"--http-port={self.port}", "--allow-grpc=false", "--allow-metrics=false",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}", f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            *self._options,
        ]  # fmt: skip
        library = sysconfig.get_config_var("LIBDIR")
        env = {
            "PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(library),
            "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.temporary),
            "TRITON_AWS_MOUNT_DIRECTORY": str(self.temporary), **self._env,
        }  # fmt: skip
        self._process = ServerProcess("tritonserver", argv, log=self._log, env=env)
        self._pid = self._process.pid
        try:
            self._process.wait_until(lambda: self.is_ready if ready else self.is_live)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it, with its stubs and their shared memory; kill what does not end. Harmless when stopped."""
        process, self._process = self._process, None
        if process is None:
            return
        stubs = self._stubs()
        try:
            if process.popen.poll() is None:
                process.popen.terminate()
                deadline_s = time.monotonic() + STOP_TIMEOUT_S
                while process.popen.poll() is None and time.monotonic() < deadline_s:
                    time.sleep(0.02)
            if process.popen.poll() is None:
                process.popen.kill()
            process.reap()
        finally:
            # They end by themselves when they miss the server, some seconds later.
            for pid in stubs & self._stubs():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            for left in SHARED_MEMORY.glob(f"{self._prefix}*"):
                left.unlink(missing_ok=True)
            shutil.rmtree(self.temporary, ignore_errors=True)

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.popen.poll() is None

    def _stubs(self) -> set[int]:
        """Pids of its stubs, known by the memory they were given."""
        found = set()
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    if (
                        self._prefix.encode() in Path(entry.path, "cmdline").read_bytes()
                        and int(entry.name) != self._pid
                    ):
                        found.add(int(entry.name))
                except OSError:
                    pass
        return found

    def _backend_folder(self) -> Path:
        """Triton's own python backend, and what the test brings."""
        folder = self.folder / "backends"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, place in {"python": INSTALLED / "backends" / "python", **self._backends}.items():
            (folder / name).symlink_to(place)
        return folder

    # -- asking

    @property
    def is_live(self) -> bool:
        return self._answers("/v2/health/live")

    @property
    def is_ready(self) -> bool:
        return self._answers("/v2/health/ready")

    def is_model_ready(self, model: str, version: int | None = None) -> bool:
        return self._answers(f"/v2/models/{model}{'' if version is None else f'/versions/{version}'}/ready")

    def index(self) -> dict[tuple[str, str], str]:
        """(model, version) -> state, of all that the repository holds or held; an unloaded model has version ''."""
        found = self.call("/v2/repository/index")
        return {(item["name"], item.get("version", "")): item.get("state", "") for item in found}

    def versions(self, model: str) -> list[str]:
        """The versions that serve."""
        return sorted(version for (name, version), state in self.index().items() if (name, state) == (model, "READY"))

    def load(self, model: str, config: Mapping[str, Any] | None = None, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Load, or load again what changed. Raises: TritonError."""
        body = {} if config is None else {"parameters": {"config": json.dumps(config)}}
        self.call(f"/v2/repository/models/{model}/load", body, timeout_s=timeout_s)

    def unload(self, model: str) -> None:
        """Raises: TritonError."""
        self.call(f"/v2/repository/models/{model}/unload")

    def infer(
        self,
        model: str,
        inputs: Mapping[str, tuple[str, Sequence[int], Iterable[Any]]],
        *,
        version: int | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[str, list[Any]]:
        """inputs: name -> (datatype, shape, flat values). Returns each output's flat values. Raises: TritonError."""
        listed = [
            {"name": name, "datatype": kind, "shape": list(shape), "data": list(data)}
            for name, (kind, shape, data) in inputs.items()
        ]
        place = "" if version is None else f"/versions/{version}"
        answer = self.call(f"/v2/models/{model}{place}/infer", {"inputs": listed}, timeout_s=timeout_s)
        return {item["name"]: item["data"] for item in answer["outputs"]}

    def call(self, path: str, body: Any = None, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """POST and return the JSON of the answer. Raises: TritonError; OSError if it does not answer in time."""
        # A connection each, unless one is kept: one kept alive would delay the server's stop.
        connection = self._kept or http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {} if self._kept else {"Connection": "close"}
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            connection.request("POST", path, json.dumps(body or {}), headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            if not self._kept:
                connection.close()
        if answer.status != 200:
            raise TritonError(answer.status, text.decode("utf-8", "replace"))
        return json.loads(text) if text else None

    @contextmanager
    def kept_connection(self) -> Iterator[None]:
        """While this is open, calls go over one connection that the server answers now.

        Triton gives every connection to one of a few threads, and a load blocks its thread: a new connection may wait
        for somebody else's load, whatever the load waits for.
        """
        deadline_s = time.monotonic() + CALL_TIMEOUT_S
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
            try:
                connection.request("GET", "/v2/health/live")
                connection.getresponse().read()
                break
            except TimeoutError:
                connection.close()
                if time.monotonic() > deadline_s:
                    raise
        self._kept = connection
        try:
            yield
        finally:
            self._kept = None
            connection.close()

    def _answers(self, path: str) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False
        return True

    # -- its log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def loads(self, model: str) -> int:
        """How often a version of the model was loaded or begun to be, since the start."""
        return len(re.findall(rf'"loading: {re.escape(model)}:\d+"', self.log))

    def unloads(self, model: str) -> int:
        """How often a version of the model was unloaded since the start."""
        return len(re.findall(rf"successfully unloaded '{re.escape(model)}'", self.log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("options", nargs="*", help="further flags of tritonserver")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="triton-"))
    with TritonServer(folder, args.repository.resolve(), *args.options) as server:
        print(f"http://127.0.0.1:{server.port} (log: {folder}/triton.log)", flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()

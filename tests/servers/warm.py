"""A Python that has imported what many programs import, and becomes one of them at each call, by fork.

`import torch` costs two seconds of a core, transformers three and diffusers seven, and tests that compare what programs
find ran some sixty which did little else. What such a program prints, how it ends and what it opens are its own; only
its first imports are old. So this is nothing for a program that is about those, or whose environment is read while they
happen: that one starts a Python.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.servers.remote import Remote, obey, read_settings

IMPORT_S = 300.0
"""Until everything is imported: from a cold disk, beside a full test run."""


class WarmPython:
    """The parent's end. One program at a time."""

    def __init__(self, imports: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> None:
        """Return when all of these are imported. env: added to this process's environment."""
        settings = {"imports": imports}
        self._remote = Remote("tests.servers.warm", log=log, settings=settings, env=env, ready_s=IMPORT_S)

    def run(
        self,
        code: str,
        *args: object,
        env: Mapping[str, str],
        timeout_s: float,
        on_hang: Callable[[], None] = lambda: None,
    ) -> subprocess.CompletedProcess[str]:
        """`python -c code args` in the project's folder. Nothing that it started outlives this call.

        env: the whole of its environment. on_hang: called when `timeout_s` has passed, before it is killed.
        Raises: subprocess.TimeoutExpired.
        """
        argv = ["-c", *map(str, args)]
        # Into files and not through pipes, whose end would be waited for if a grandchild (an engine's worker) lingers.
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            pid = self._remote.call("begin", code=code, argv=argv, env=dict(env), out=out.name, err=err.name)
            ended, is_hanging = os.pidfd_open(pid), True  # nobody reaps it before `end`
            try:
                is_hanging = not select.select([ended], [], [], timeout_s)[0]
            finally:
                os.close(ended)
                if is_hanging:
                    on_hang()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                status = self._remote.call("end")
            if is_hanging:
                raise subprocess.TimeoutExpired(argv, timeout_s, out.read(), err.read())
            return subprocess.CompletedProcess(argv, status, out.read(), err.read())

    def stop(self) -> None:
        self._remote.stop()


class _Begun(BaseException):
    """In the forked process, which is no server any more: leads it out of what it was doing."""

    def __init__(self, code: str) -> None:
        self.code = code


class _Programs:
    """The child's end."""

    def __init__(self) -> None:
        self._pid = 0

    def begin(self, code: str, argv: list[str], env: dict[str, str], out: str, err: str) -> int:
        """Fork the program, in a session of its own. Returns its pid."""
        self._pid = os.fork()
        if self._pid:
            return self._pid
        os.setsid()
        for fd, name in ((0, os.devnull), (1, out), (2, err)):
            opened = os.open(name, os.O_RDWR)
            os.dup2(opened, fd)
            os.close(opened)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = argv
        raise _Begun(code)

    def end(self) -> int:
        """How it ended, as subprocess says it."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def main() -> None:
    for name in read_settings()["imports"]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection there would copy every page of this
    programs, begun = _Programs(), None
    try:
        obey({"begin": programs.begin, "end": programs.end})
    except _Begun as found:
        begun = found.code
    if begun is not None:
        own = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(begun, "<string>", "exec"), own.__dict__)


if __name__ == "__main__":
    main()

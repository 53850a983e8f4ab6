"""How processes of ours are started: they run our code, wherever the person who started us stands.

`python -m` and `python -c` would look for every module in the working directory first, and a daemon of root's must not
run what somebody has put there. So every child gets `python()`, `CWD`, and `environment()`, in which nothing is looked
for relative to a directory. What the parent itself was told to load by absolute paths (PYTHONPATH, LD_PRELOAD) its
children load too: it has run that code already, and packages may stand there that it is made of.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress

CWD = "/"
"""Where children run: a directory that is never unmounted or removed, and in which only root can put things."""

_CODE = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH")
"""Lists of what is run; entries that are empty or relative mean whatever stands in the working directory."""
_NEVER = ("PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONBREAKPOINT")
"""For a Python that a person sits before."""
_FILES = (
    "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CREDENTIAL_FILE", "AWS_CA_BUNDLE",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC", "HF_HOME", "HF_TOKEN_PATH", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME", "MFS_RUNTIME_DIR", "TMPDIR", "DOCKER_CONFIG", "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
)  # fmt: skip
"""Names of files that people write relative to where they stand."""


def python(*arguments: str) -> list[str]:
    """The command that runs this Python with these arguments, with nothing but what is installed on its path."""
    return [sys.executable, "-P", *arguments]


def environment(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child.

    inherited: another process's, which ours goes before; of it nothing is taken that names code.
    """
    idle = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's would spin for work that never comes, while a cold start runs
    others = {name: value for name, value in (inherited or {}).items() if not _names_code(name)}
    found = {name: value for name, value in (idle | others | dict(os.environ)).items() if name not in _NEVER}
    for name in _CODE:
        if name in found:
            kept = ":".join(_fixed(name, found.pop(name)))
            if kept:
                found[name] = kept
    for name in _FILES:
        if found.get(name) and not found[name].startswith("~"):
            with suppress(OSError):  # the working directory is gone, and such a file with it
                found[name] = os.path.abspath(found[name])
    return found


def in_words(status: int) -> str:
    """How a child ended, by its wait status."""
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def end_as(status: int) -> None:
    """End this process as a child of it ended, by its wait status. Does not return."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _names_code(name: str) -> bool:
    return name.startswith(("PYTHON", "LD_")) or name == "PATH"


def _fixed(name: str, value: str) -> list[str]:
    """The entries of a list that mean the same wherever one stands."""
    if name != "LD_PRELOAD":
        return [part for part in value.split(":") if part.startswith("/")]
    # A plain name is looked up among the machine's libraries: ld.so(8).
    return [part for part in re.split("[: ]+", value) if part.startswith("/") or (part and "/" not in part)]

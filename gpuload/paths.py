"""Where server and clients meet, and where digests are kept, when nobody says otherwise."""

from __future__ import annotations

import os

SOCKET_VARIABLE = "GPULOAD_SOCKET"


def default_socket() -> str:
    """$GPULOAD_SOCKET, else gpuload.sock in the user's runtime directory, else in a private folder of /tmp."""
    given = os.environ.get(SOCKET_VARIABLE)
    if given:
        return given
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return os.path.join(runtime, "gpuload.sock")
    return f"/tmp/gpuload-{os.getuid()}/gpuload.sock"


def default_digests() -> str:
    """Where digests of weights files are kept: gpuload/digests in $XDG_CACHE_HOME, else in ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(caches, "gpuload", "digests")

"""Where server and clients meet when nobody says otherwise."""

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

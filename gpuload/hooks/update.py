"""Weights that a server swapped in, into engines that hold copies of their own: what vLLM's and SGLang's share.

The engine's driver holds a lease while its workers load. So all of them get that content, whatever is swapped in
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpuload import wire
from gpuload.client.asking import ATTACH_S, connect, exchange

UPDATE_S = 1800.0
"""Longest wait for workers to copy a model into place, and for requests that are being answered."""


@contextmanager
def leased(model: str, socket_path: str | None = None) -> Iterator[str]:
    """The digest of what is served as `model`; it is held inside. Maps nothing. Raises: as `attach`."""
    with connect(socket_path, ATTACH_S) as sock:
        reply, fds = exchange(sock, {"op": "attach", "model": model}, ())
        wire.close_all(fds)
        yield reply["digest"]


def tensors_of(model: str, digest: str | None, socket_path: str | None) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of all that is resident as `model`, attached by the time this returns; for who copies them.

    Raises: as `attach`, at once.
    """
    from gpuload.client.attached import attach

    attached = attach(model, digest=digest, socket_path=socket_path)

    def items() -> Iterator[tuple[str, Any]]:
        for name in list(attached):
            yield name, attached.pop(name)

    return items()

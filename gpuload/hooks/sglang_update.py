"""SGLang: weights that were swapped in at the server, into a running engine, by a model path of our own.

`gpuload:NAME` as the path of SGLang's `update_weights_from_disk` (an engine's method, and POST
/update_weights_from_disk) means what is resident under that name. SGLang does all else as ever: it waits for a point
between steps, loads into place, and empties its radix cache in the same call, or says that it could not.
`gpuload:NAME@DIGEST` is that content and no other, in every rank.

HOOKS.md says which versions it ran with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from gpuload.errors import GpuloadError
from gpuload.hooks.update import leased, tensors_of
from mfs.errors import UsageError

TARGET = "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator"

_NAMED = re.compile(r"gpuload:(?P<model>.+?)(?:@(?P<digest>[0-9a-f]{64}))?")


def iterate_named(original: Callable[..., Any], loader: Any, source: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Around DefaultModelLoader._get_weights_iterator: a path of ours is the server's, all others are SGLang's.

    Raises: as `attach`, at once, before SGLang has changed anything.
    """
    found = _NAMED.fullmatch(str(source.model_or_path))
    if found is None:
        made: Iterator[Any] = original(loader, source, *args, **kwargs)
        return made
    weights = tensors_of(found["model"], found["digest"], None)
    return ((source.prefix + name, tensor) for name, tensor in weights)


def update(engine: Any, model: str, *, socket_path: str | None = None) -> str:
    """Put what is resident as `model` into all ranks of an `sglang.Engine`, and empty its cache. Returns the digest.

    socket_path: of the server, to hold it meanwhile; the ranks find it as every client does.
    Raises: as `attach`; GpuloadError with SGLang's own words if it refused, or if its cache is in use.
    """
    if "@" in model:
        raise UsageError(f"{model!r}: a name with '@' cannot be part of a path; load it under another name")
    with leased(model, socket_path) as digest:
        done, message, *_ = engine.update_weights_from_disk(f"gpuload:{model}@{digest}")
    if not done:
        raise GpuloadError(f"SGLang did not update to {model!r}: {message}")
    return digest

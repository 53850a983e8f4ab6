"""Every tensor of a model's safetensors files, for loaders that walk over them: what vLLM's and SGLang's plugins share.

Per file: the resident server's tensors if one answers; else this process's own pipeline, which takes a mounted file out
of the daemon's RAM; and where that cannot even begin, safetensors itself. So a plugin is never worse off than the
loader it replaces. An error in the middle of a file is raised: what was handed out cannot be taken back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from gpuload.hooks.counts import counts
from gpuload.hooks.resident import attach_file, is_copied, tell_once
from gpuload.moving.model_files import picked_by_others


def weights_of(
    files: Sequence[str], *, device: str = "cpu", socket_path: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor), file by file in the order given; a file's tensors in no promised order.

    device: of the server's arena to be served from. Without a server the tensors come on the CPU.
    The index beside the files counts: see `model_files.picked_by_others`. Raises: IntegrityError before the first.
    """
    for file, others in zip(files, picked_by_others(files), strict=True):
        attached = attach_file(file, device, socket_path=socket_path)
        if attached is not None:
            for name in [name for name in attached if name not in others]:
                counts.add(served=1)
                yield name, attached[name].clone() if is_copied(device) else attached[name]
            del attached
            from gpuload.client.attached import close_left

            close_left()
        else:
            yield from (item for item in _streamed(file) if item[0] not in others)


def _streamed(file: str) -> Iterator[tuple[str, Any]]:
    from gpuload.client.load import stream

    landing = stream(file)
    try:
        first = next(landing, None)
    except (
        Exception
    ) as error:  # a type that we do not know, say: safetensors may, or has its own words for what is wrong
        tell_once(f"loading {file} by safetensors itself", error)
        yield from _by_library(file)
        return
    if first is None:
        return
    counts.add(streamed=1)
    yield first
    for item in landing:
        counts.add(streamed=1)
        yield item


def _by_library(file: str) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            counts.add(left=1)
            yield name, opened.get_tensor(name)


def are_mounted(files: Sequence[str]) -> bool:
    """True if there are files and all stand on mfs mounts that lend to us."""
    from mfs.control import borrowing

    return bool(files) and all(borrowing.find(os.path.abspath(file)) is not None for file in files)

"""One measured reading, in a process of its own: every tensor of a safetensors file, shuffled, cloned. Prints JSON.

    python -m tools.bench.reader PATH [--seed N] [--pretouch BYTES] [--no-digest] [--header-only]

The clock runs from `safe_open` to the last clone: not over imports, not over the check of what was read. That check
hashes all tensors again from the same open file, whose pages are still in the page cache: the very bytes that were
cloned.

Guest memory is touched and given back right before the clock starts. In a virtual machine the first touch of a page
that the host does not back yet runs at 0.4-1 GB/s, and freed pages go back to the host within seconds: without this,
every cold pass, ours and the peers', would measure the hypervisor.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import resource
import time
from typing import Any

_MADV_POPULATE_WRITE = 23


def pretouch(size_bytes: int) -> None:
    """Have the host back this much memory, and free it again."""
    memory = mmap.mmap(-1, size_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(_MADV_POPULATE_WRITE)
    memory.close()


def digest(file: Any) -> str:
    """Hash of all tensors, by name, of an open safetensors file (framework 'pt')."""
    import torch
    import xxhash

    total = xxhash.xxh3_128()
    for name in sorted(file.keys()):
        tensor = file.get_tensor(name)
        total.update(name.encode())
        total.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--pretouch", type=int, default=0)
    parser.add_argument("--no-digest", action="store_true")
    parser.add_argument("--header-only", action="store_true")
    args = parser.parse_args()
    if args.header_only:
        from safetensors import safe_open

        with safe_open(args.path, framework="numpy") as file:
            print(json.dumps({"tensors_count": len(list(file.keys()))}))
        return
    import torch  # noqa: F401  # an import costs seconds, and must not be on the clock
    from safetensors import safe_open

    if args.pretouch:
        pretouch(args.pretouch)
    cpu_before, size = _cpu_s(), 0
    start = time.perf_counter()
    with safe_open(args.path, framework="pt") as file:
        names = list(file.keys())
        header_s = time.perf_counter() - start
        random.Random(args.seed).shuffle(names)
        for name in names:
            size += file.get_tensor(name).clone().nbytes
        seconds = time.perf_counter() - start
        cpu = _cpu_s() - cpu_before
        result: dict[str, object] = {"bytes": size, "seconds": seconds, "header_s": header_s, "reader_cpu_s": cpu}
        if not args.no_digest:
            result["digest"] = digest(file)
    print(json.dumps(result))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

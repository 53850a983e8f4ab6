"""A link's ceiling: parallel ranged GETs of objects into buffers, nothing else. Prints JSON.

python -m tools.bench.ranges URL... [--connections N]
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
import urllib.parse

_PART_BYTES = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    targets = [urllib.parse.urlsplit(url) for url in args.urls]
    sizes = [_size(target) for target in targets]
    parts = iter([(n, start) for n, size in enumerate(sizes) for start in range(0, size, _PART_BYTES)])
    lock, faults = threading.Lock(), []

    def fetch() -> None:
        buffer = memoryview(bytearray(_PART_BYTES))
        connection = http.client.HTTPConnection(targets[0].hostname or "", targets[0].port, timeout=60)
        try:
            while True:
                with lock:
                    number, start = next(parts, (-1, 0))
                if number < 0:
                    return
                length = min(_PART_BYTES, sizes[number] - start)
                span = f"bytes={start}-{start + length - 1}"
                connection.request("GET", _path(targets[number]), headers={"Range": span})
                answer, got = connection.getresponse(), 0
                if answer.status != 206:
                    raise OSError(f"HTTP status {answer.status}")
                while got < length:
                    count = answer.readinto(buffer[got:length])
                    if not count:
                        raise OSError("short answer")
                    got += count
                answer.read()
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=fetch) for _ in range(args.connections)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if faults:
        raise SystemExit(faults[0])
    print(json.dumps({"bytes": sum(sizes), "seconds": seconds}))


def _size(target: urllib.parse.SplitResult) -> int:
    """Asked by a GET of the first byte: an address signed for GET is good for nothing else."""
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
    connection.request("GET", _path(target), headers={"Range": "bytes=0-0"})
    size = connection.getresponse().headers["Content-Range"].rpartition("/")[2]
    connection.close()
    return int(size)


def _path(target: urllib.parse.SplitResult) -> str:
    return f"{target.path}?{target.query}" if target.query else target.path


if __name__ == "__main__":
    main()

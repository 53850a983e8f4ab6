"""A link's ceiling: parallel ranged GETs of one object into buffers, nothing else. Prints JSON.

python -m tools.bench.ranges URL SIZE_BYTES [--connections N]
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
    parser.add_argument("url")
    parser.add_argument("size", type=int)
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    parts = iter(range(0, args.size, _PART_BYTES))
    lock, faults = threading.Lock(), []
    target = urllib.parse.urlsplit(args.url)

    def fetch() -> None:
        buffer = memoryview(bytearray(_PART_BYTES))
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            while True:
                with lock:
                    start = next(parts, None)
                if start is None:
                    return
                length = min(_PART_BYTES, args.size - start)
                span = f"bytes={start}-{start + length - 1}"
                connection.request("GET", f"{target.path}?{target.query}", headers={"Range": span})
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
    print(json.dumps({"bytes": args.size, "seconds": seconds}))


if __name__ == "__main__":
    main()

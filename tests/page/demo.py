"""A daemon with a busy afternoon, made up: for looking at the page and at `mfs top`, and for pictures of them."""

from __future__ import annotations

import math
import random
import time

from mfs.control.api import Json
from mfs.control.rows import ORDERS
from mfs.testing.fake_daemon import FakeDaemon

GIB = 1 << 30
_NAMES = [
    "llama-3.3-70b-instruct",
    "qwen3-235b-a22b-instruct-2507-fp8",
    "deepseek-v3.2",
    "mistral-small-24b",
    "gpt-oss-120b",
    "gemma-3-27b-it",
    "all-MiniLM-L6-v2",
    "whisper-large-v3-turbo",
    "flux.1-dev",
    "bge-m3",
    "team-search/reranker-experimental-with-a-very-long-name-that-somebody-found-descriptive-2026-11-28",
    "llama-3.3-70b-instruct-customer-support-finance-de-ft-v12",
    "phi-4",
    "nomic-embed-text-v1.5",
    "sdxl-turbo",
]
_SIZES = [131, 220, 642, 44, 61, 51, 0.09, 1.5, 22, 2.1, 0.6, 131, 27, 0.5, 6.5]


class BusyDaemon(FakeDaemon):
    """Everything moves with the time since the start: two models are being loaded, one waits for a slow origin."""

    def __init__(self, *, step_s: float = 0.0, is_troubled: bool = True) -> None:
        """step_s: so much time passes with each overview, instead of the clock's."""
        super().__init__({})
        self._step_s = step_s
        self._since = time.monotonic()
        self._looks = 0
        self._is_troubled = is_troubled
        rng = random.Random(11)
        self._models = list(zip(_NAMES, [int(size * GIB) for size in _SIZES], strict=True))
        self._models += [
            (f"tenant-{n:03d}/{rng.choice(_NAMES[:6])}-ft-v{rng.randint(1, 40)}", int(rng.choice([15, 44, 131]) * GIB))
            for n in range(199)
        ]
        self._cold = {name: rng.random() for name, _ in self._models}

    @property
    def _t(self) -> float:
        return self._looks * self._step_s if self._step_s else time.monotonic() - self._since

    def _moved(self, peak: float, period_s: float, phase: float = 0.0) -> int:
        """The integral of a rate that swells and ebbs between a third of `peak` and all of it."""
        t, w = self._t + 500.0, 2 * math.pi / period_s
        return int(peak * (0.67 * t - 0.33 / w * math.cos(w * t + phase)))

    async def status(self) -> Json:
        found = await super().status()
        troubled = self._is_troubled
        ssd_used = int(1.31e12) + self._moved(0.9 * GIB, 37)
        return found | {
            "version": "0.1.0",
            "mountpoint": "/mnt/models",
            "uptime_s": 273_844 + self._t,
            "cache_dir": "/nvme/mfs",
            "sources": [
                {
                    "name": "prod",
                    "url": "s3://models/prod",
                    "via": "http://cache.svc:8080",
                    "is_dragonfly": False,
                    "listed_directories": 431,
                    "last_refresh_at": time.time() - 12,
                    "last_error": None,
                },
                {
                    "name": "hub",
                    "url": "hf://sentence-transformers/all-MiniLM-L6-v2",
                    "via": None,
                    "is_dragonfly": False,
                    "listed_directories": 3,
                    "last_refresh_at": time.time() - 4000,
                    "last_error": "huggingface.co: 429 Too Many Requests; asked again in 60 s" if troubled else None,
                },
            ],
            "ssd": found["ssd"]
            | {
                "used_bytes": ssd_used,
                "budget_bytes": 2 << 40,
                "free_disk_bytes": 912 * GIB,
                "objects_count": 3104,
                "pinned_count": 24,
                "pinned_bytes": 272 * GIB,
                "sealed_count": 2871,
                "sealed_bytes": ssd_used * 9 // 10,
                "state": "ok",
                "hits_bytes": self._moved(2.3 * GIB, 53, 1.0),
            },
            "ram": found["ram"]
            | {
                "used_bytes": 31 * GIB,
                "budget_bytes": 32 * GIB,
                "slots_count": 8192,
                "slots_free": 214,
                "slots_leased": 117,
                "hits_bytes": self._moved(3.4 * GIB, 29, 2.0),
            },
            "origin": {
                "fetched_bytes": self._moved(1.15 * GIB, 41),
                "shared_bytes": 88 * GIB,
                "requests_count": 18_204_511,
                "errors_count": 37 if troubled else 0,
                "inflight": 27,
                "cache_bytes": self._moved(1.1 * GIB, 41) * 19 // 20,
                "direct_bytes": self._moved(1.1 * GIB, 41) // 20,
                "cache_faults": 2 if troubled else 0,
            },
            "reads": {"count": 88_112_930, "bytes": self._moved(6.1 * GIB, 31), "errors_count": 0, "waiting": 9},
            "open_files": 214,
            "passthrough": {"open_files": 171, "sealed_count": 2871, "note": ""},
            "kernel": {"read_ahead_kb": 4096, "max_background": 4096, "notes": []},
            "warnings": [
                "should this daemon be killed, the mount ends: Linux 6.6.12 cannot ask again what it did not answer "
                "(6.9 or later can)"
            ]
            if troubled
            else [],
        }

    async def overview(self, *, sort: str, match: str, count: int) -> Json:
        self._looks += 1
        rows = [self._row_of(number, name, size) for number, (name, size) in enumerate(self._models)]
        matching = sorted((row for row in rows if match.casefold() in row["path"].casefold()), key=ORDERS[sort])
        models = {"count": len(rows), "matched_count": len(matching), "rows": matching[:count]}
        waits = {
            "origin": {"count": 9120, "seconds": self._moved(4.0, 41)},
            "ssd": {"count": 310, "seconds": self._moved(0.4, 53)},
            "decode": {"count": 12, "seconds": 0.0},
            "slot": {"count": 44, "seconds": self._moved(0.7, 31)},
            "share": {"count": 0, "seconds": 0.0},
        }
        waits = {
            cause: row | {"seconds": row["seconds"] + self._t * 0.1 * (cause != "share")}
            for cause, row in waits.items()
        }
        return {"status": await self.status(), "models": models, "fetches": self._fetches(), "waits": waits}

    def _row_of(self, number: int, name: str, size: int) -> Json:
        cold = self._cold[name]
        loading = number in (0, 1, 11)
        share = (
            min(1.0, (self._t / 200) % 1.0 + 0.2) if loading else (1.0 if cold > 0.55 else 0.0 if cold < 0.35 else cold)
        )
        peaks = {0: 0.6, 1: 0.4, 11: 0.15}
        return {
            "path": name,
            "is_model": True,
            "size": size if number % 40 != 39 else None,
            "files_count": 12,
            "ssd_bytes": int(size * share),
            "ram_bytes": int(min(size, 9 * GIB) * (0.8 if loading else cold > 0.9)),
            "origin_bytes": self._moved(peaks[number] * GIB, 41) if loading else int(size * share * (cold > 0.4)),
            "pinned_count": 12 * (number in (6, 9)),
            "open_count": 16 if loading else 4 * (cold > 0.9),
            "fetching_count": 9 if loading else 0,
            "last_used_at": time.time() - (2 if loading else cold * 400_000),
            "waited_s": self._t * (1.8 if number == 11 else 0.6) if loading else 0.0,
        }

    def _fetches(self) -> Json:
        rows = []
        for place in range(27):
            name = _NAMES[(0, 1, 11)[place % 3]]
            start = (4 << 20) * (int(self._t * 3) + place * 7)
            since = 11.8 if place == 2 and self._is_troubled else (place * 37 % 50) / 100
            rows.append(
                {
                    "path": f"{name}/model-{place + 1:05d}-of-00030.safetensors",
                    "start": start,
                    "stop": start + (4 << 20),
                    "since_s": since,
                    "ahead": place % 3 == 1,
                    "from": "ssd" if place % 9 == 4 else "origin",
                }
            )
        rows.sort(key=lambda row: -row["since_s"])
        return {"count": len(rows), "queued_count": 512, "rows": rows}

    async def heat(self, path: str) -> Json:
        rng, files = random.Random(path), []
        for number in range(1, 13):
            have = min(96, int(96 * ((self._t / 30 + number / 12) % 1.3)))
            ssd = "".join(
                str(9 if place < have - 6 else rng.choice([0, 3, 6, 8]) if place < have else 0) for place in range(96)
            )
            ram = "".join("9" if have - 20 < place < have else "0" for place in range(96))
            files.append(
                {
                    "path": f"{path}/model-{number:05d}-of-00012.safetensors",
                    "size": 5 * GIB,
                    "ssd": ssd,
                    "ram": ram,
                    "ssd_bytes": int(5 * GIB * ssd.count("9") / 96),
                    "ram_bytes": int(5 * GIB * ram.count("9") / 96),
                    "pinned": False,
                    "open_handles": 1 if number < 5 else 0,
                }
            )
        files.append(
            {
                "path": f"{path}/config.json",
                "size": 892,
                "ssd": "9",
                "ram": "9",
                "ssd_bytes": 892,
                "ram_bytes": 892,
                "pinned": True,
                "open_handles": 0,
            }
        )
        return {"files": files, "left_out": 0}

    async def loads(self, path: str) -> Json:
        return {"loads": [made_up_load()]}

    async def latest_load(self, path: str, number: int) -> Json:
        return {"count": 1, "load": made_up_load() if number == 0 else None}


def made_up_load() -> Json:
    """A cold start of 38 s whose readers wait for the origin mostly, and in the middle for room in RAM."""
    rng, reads = random.Random(7), []
    for number in range(64):
        at = 1.2 + number * 0.5 + rng.random() * 0.4
        on = (
            "slot"
            if 14 < at < 19 and number % 2
            else "ssd"
            if number % 11 == 3
            else "decode"
            if number % 17 == 5
            else "origin"
        )
        reads.append(
            {
                "at": at,
                "waited_s": {"origin": 0.2 + rng.random() * 1.8, "slot": 0.9, "ssd": 0.08, "decode": 0.15}[on],
                "on": on,
                "path": f"llama-3.3-70b-instruct/model-{1 + number // 3:05d}-of-00030.safetensors",
                "start": number << 22,
                "stop": (number + 1) << 22,
            }
        )
    steps = [
        "open",
        "header",
        *["origin"] * 24,
        *["slot"] * 6,
        *["origin"] * 10,
        "ssd",
        *["origin"] * 18,
        "decode",
        *["page_cache"] * 8,
        *["origin"] * 4,
        "page_cache",
        "page_cache",
    ]
    step_s = 38.4 / len(steps)
    phases = {name: steps.count(name) * step_s for name in dict.fromkeys(steps)}
    return {
        "model": "llama-3.3-70b-instruct",
        "began_at": 1_795_946_000.0,
        "seconds": 38.4,
        "phases": phases,
        "reads": reads,
        "strip": {"step_s": step_s, "phases": steps},
        "left_out": 3107,
        "bytes": {"origin": 41 * GIB, "ssd": 2 * GIB, "ram": 0},
    }

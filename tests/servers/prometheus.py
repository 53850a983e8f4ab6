"""Debian's prometheus, a real one: scrapes what it is told, evaluates rules, answers queries; and its promtool.

Rules once a second and scrapes every other, instead of once a minute, so that tests need not wait.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.servers.process import ServerError, ServerProcess, free_port

PROGRAM, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
INTERVAL_S = 2
"""Between scrapes, and their deadline: a machine that does much else must not let them fail."""


class PrometheusServer:
    """One Prometheus with its data under `root`."""

    def __init__(self, root: Path, targets: Mapping[str, Sequence[str]], *, rules: Path | None = None) -> None:
        """targets: addresses by job."""
        self.root = root
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: ServerProcess | None = None
        root.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "global": {"scrape_interval": f"{INTERVAL_S}s", "scrape_timeout": f"{INTERVAL_S}s",
                       "evaluation_interval": "1s"},
            "rule_files": [str(rules)] if rules is not None else [],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
                for job, addresses in targets.items()
            ],
        }  # fmt: skip
        (root / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> None:
        """Start and return when it answers. Raises: ServerError."""
        if PROGRAM is None:
            raise ServerError("no prometheus: run tools/setup test")
        argv = [
            PROGRAM, f"--config.file={self.root}/prometheus.yml", f"--storage.tsdb.path={self.root}/data",
            f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn",
        ]  # fmt: skip
        self._process = ServerProcess("prometheus", argv, log=self.root / "prometheus.log")
        self._process.wait_until(self._is_ready)

    def stop(self) -> None:
        """Kill it."""
        if self._process:
            self._process.popen.kill()
            self._process.reap()
            self._process = None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query. Raises: ServerError with Prometheus' words for a bad expression."""
        try:
            found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        except urllib.error.HTTPError as error:
            raise ServerError(f"{expression}: {error.read().decode()}") from None
        return found

    def firing(self) -> set[tuple[str, str]]:
        """(alert, instance) of the alerts that fire now."""
        alerts = self._get("alerts")["alerts"]
        return {(a["labels"]["alertname"], a["labels"].get("instance", "")) for a in alerts if a["state"] == "firing"}

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped, with the last error of each."""
        found: list[dict[str, Any]] = self._get("targets")["activeTargets"]
        return found

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
        """Raises: ServerError if that does not come true."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise ServerError(f"{what}: not within {timeout_s:g} s; it fires {sorted(self.firing())}")
            time.sleep(0.1)

    def _get(self, name: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{name}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def _is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
        except OSError:
            return False
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def promtool(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run it. Raises: ServerError where there is none."""
    if PROMTOOL is None:
        raise ServerError("no promtool: run tools/setup test")
    argv = [PROMTOOL, *map(str, arguments)]
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=False)

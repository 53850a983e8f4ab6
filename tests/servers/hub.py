"""A Hugging Face Hub of our own: repositories, commits, moving refs, gates, signed addresses that expire, rate limits.

A stand-in, since the real one cannot be run here; the real huggingface_hub client is its conformance test. What it
answers stands in `tests.servers.hub_site`; this module holds the repositories and the switches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers.process import ServerError, free_port, wait_for_signal
from tests.servers.remote import Remote


class HubServer:
    """The hub at `endpoint`, its large files on another host.

    `token` may read everything; `other_token` is valid but let into no private or gated repository.
    """

    token = "hf_reader"
    other_token = "hf_stranger"

    def __init__(self, root: Path, *, port: int | None = None, ttl_s: float = 3600, page_entries: int = 1000) -> None:
        """Keep repositories under `root`.

        ttl_s: how long a signed address works. page_entries: entries per page of a tree listing.
        """
        self.root = root
        self.repos = root / "repos"
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._settings = {"ttl_s": ttl_s, "page_entries": page_entries}
        self._remote: Remote | None = None

    def start(self) -> None:
        """Start and return when both hosts listen. Raises: ServerError."""
        if self._remote:
            raise ServerError("the hub is already running")
        self.repos.mkdir(parents=True, exist_ok=True)
        tokens = {"token": self.token, "other_token": self.other_token}
        settings = {"repos": str(self.repos), "port": self.port, **tokens, **self._settings}
        self._remote = Remote("tests.servers.hub_site", log=self.root / "hub.log", settings=settings)

    def stop(self) -> None:
        """Kill it; `start` brings it back with the same repositories and port, and new signing keys."""
        if self._remote:
            self._remote.stop()
            self._remote = None

    def ensure_started(self) -> None:
        """Start unless running."""
        if not self._remote:
            self.start()

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        ref: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Add a commit holding exactly `files` (content, or a file to link to), point `ref` to it and return its id."""
        identity = hashlib.sha1()
        for path, content in sorted(files.items()):
            data = content.read_bytes() if isinstance(content, Path) else content
            identity.update(f"{path}\0{hashlib.sha256(data).hexdigest()}\0".encode())
        commit = identity.hexdigest()
        folder = self.repos / repo_id
        tree = folder / commit
        if not tree.exists():
            # Made aside and renamed: the hub may be answering meanwhile.
            new = Path(tempfile.mkdtemp(dir=self.root))
            for path, content in files.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    (new / path).symlink_to(content.resolve())
                else:
                    (new / path).write_bytes(content)
            folder.mkdir(parents=True, exist_ok=True)
            new.rename(tree)
        refs = self._description(repo_id).get("refs", {})
        self._describe(repo_id, {"refs": {**refs, ref: commit}, "private": private, "gated": gated})
        return commit

    def move_ref(self, repo_id: str, ref: str, commit: str) -> None:
        """Point a branch or tag to a commit that exists."""
        about = self._description(repo_id)
        self._describe(repo_id, {**about, "refs": {**about["refs"], ref: commit}})

    def set(self, *, ttl_s: float | None = None, page_entries: int | None = None) -> None:
        """Change a setting of the constructor for what is answered from now on."""
        changed = {"ttl_s": ttl_s, "page_entries": page_entries}
        self._settings |= {name: value for name, value in changed.items() if value is not None}
        self._call("set", **changed)

    def expire_urls(self) -> None:
        """Make every signed address handed out so far answer 403."""
        self._call("expire_urls")

    def limit_rate(self, count: int, *, wait_s: int = 1, host: str = "hub", header: str = "RateLimit") -> None:
        """Answer the next `count` requests to `host` ('hub' or 'cdn') with 429.

        header: where the wait is said, 'RateLimit' (`"api";r=0;t=1`, as the Hub does) or 'Retry-After'.
        """
        value = f'"api";r=0;t={wait_s}' if header == "RateLimit" else str(wait_s)
        self.reject(count, 429, host=host, headers={header: value})

    def reject(self, count: int, status: int, *, host: str = "hub", headers: Mapping[str, str] | None = None) -> None:
        """Answer the next `count` requests to `host` ('hub' or 'cdn') with this status; 0 ends it."""
        self._call("reject", host=host, count=count, status=status, headers=dict(headers or {}))

    def stats(self) -> dict[str, int]:
        """Requests per host ('hub', 'cdn') and per kind ('info', 'tree', 'refs', 'resolve', 'cached'), 'rejected',
        'refused' (by the CDN: expired, say), and body bytes ('hub_bytes', 'cdn_bytes'). Absent means none."""
        counts: dict[str, int] = self._call("stats")
        return counts

    def forget_stats(self) -> None:
        """Start counting anew."""
        self._call("forget_stats")

    def environ(self, token: str | None = None) -> dict[str, str]:
        """HF_* variables with which a child process finds this hub."""
        found = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**found, "HF_TOKEN": token} if token else found

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _call(self, command: str, **arguments: object) -> Any:
        if self._remote is None:
            raise ServerError("the hub is not running")
        return self._remote.call(command, **arguments)

    def _description(self, repo_id: str) -> dict[str, Any]:
        file = self.repos / repo_id / "repo.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def _describe(self, repo_id: str, about: Mapping[str, object]) -> None:
        new = self.root / "repo.json.new"
        new.write_text(json.dumps(about))
        os.replace(new, self.repos / repo_id / "repo.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder served as repository org/NAME, branch main")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    with HubServer(Path(tempfile.mkdtemp(prefix="hub-")), port=args.port) as hub:
        model = args.model.resolve()
        files = {str(file.relative_to(model)): file for file in model.rglob("*") if file.is_file()}
        commit = hub.commit(f"org/{model.name}", files)
        print(f"org/{model.name} at {commit}")
        for name, value in hub.environ(hub.token).items():
            print(f"export {name}={value}", flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()

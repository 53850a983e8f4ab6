"""The Hub stand-in's own process: answers the API, redirects large files to signed addresses on another host.

Run by `tests.servers.hub`, which writes the repositories as plain folders: `<org>/<name>/repo.json` beside one folder
of files per commit. Shapes follow huggingface_hub 2.4, whose real client is this server's conformance test.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers import remote, web

CDN_HOST = "127.0.0.2"
"""Another host than the hub's 127.0.0.1: clients must drop their token on the way."""

_LARGE_SUFFIXES = {".safetensors", ".bin", ".gguf", ".pt", ".onnx"}
_LARGE_BYTES = 100_000
_DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Site:
    """What both hosts know."""

    repos: Path
    port: int
    token: str
    other_token: str
    ttl_s: float
    page_entries: int
    signing_key: bytes = field(default_factory=lambda: os.urandom(16))
    blobs: dict[str, Path] = field(default_factory=dict)
    """CDN path -> file, filled when an address is handed out."""
    counts: Counter[str] = field(default_factory=Counter)
    rejections: dict[str, tuple[int, int, dict[str, str]]] = field(default_factory=dict)
    """'hub' or 'cdn' -> (how many more, status, headers)."""

    @property
    def hub_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signature(self, path: str, expires: str) -> str:
        return hmac.new(self.signing_key, f"{path}?{expires}".encode(), "sha256").hexdigest()

    def signed_url(self, path: str) -> str:
        expires = str(time.time() + self.ttl_s)
        query = {
            "X-Amz-Expires": f"{self.ttl_s:g}",
            "Expires": expires,
            "X-Amz-Signature": self.signature(path, expires),
        }
        return f"http://{CDN_HOST}:{self.port}{path}?{urllib.parse.urlencode(query)}"

    # Commands of the parent, called by `remote.obey`.

    def set(self, *, ttl_s: float | None = None, page_entries: int | None = None) -> None:
        self.ttl_s = self.ttl_s if ttl_s is None else ttl_s
        self.page_entries = self.page_entries if page_entries is None else page_entries

    def reject(self, *, host: str, count: int, status: int, headers: dict[str, str]) -> None:
        self.rejections[host] = (count, status, headers)

    def expire_urls(self) -> None:
        self.signing_key = os.urandom(16)

    def stats(self) -> dict[str, int]:
        return dict(self.counts)

    def forget_stats(self) -> None:
        self.counts.clear()


SITE: Site


@functools.lru_cache(maxsize=4096)
def _digests(path: Path, mtime_ns: int, size: int) -> tuple[str, str]:
    """(sha256, git blob id) of a file; the other arguments only name its version."""
    content, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            content.update(data)
            blob.update(data)
    return content.hexdigest(), blob.hexdigest()


def digests(path: Path) -> tuple[int, str, str]:
    """(size, sha256, git blob id)."""
    facts = path.stat()
    return facts.st_size, *_digests(path, facts.st_mtime_ns, facts.st_size)


def is_large(path: Path) -> bool:
    """Whether the Hub would keep this file outside git."""
    return path.suffix in _LARGE_SUFFIXES or path.stat().st_size > _LARGE_BYTES


class _Handler(web.Handler):
    host = ""

    def do_GET(self) -> None:
        SITE.counts[self.host] += 1
        left, status, headers = SITE.rejections.get(self.host, (0, 0, {}))
        if left > 0:
            SITE.rejections[self.host] = (left - 1, status, headers)
            SITE.counts["rejected"] += 1
            return self.answer(status, b"", list(headers.items()))
        url = urllib.parse.urlsplit(self.path)
        return self.route(url, dict(urllib.parse.parse_qsl(url.query)))

    def route(self, url: urllib.parse.SplitResult, query: dict[str, str]) -> None:
        raise NotImplementedError


class Hub(_Handler):
    """The API and `resolve`."""

    host = "hub"

    def route(self, url: urllib.parse.SplitResult, query: dict[str, str]) -> None:
        match [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "models", org, name]:
                self._in_repo(org, name, "info", "main", "", query)
            case ["api", "models", org, name, "refs"]:
                self._in_repo(org, name, "refs", "main", "", query)
            case ["api", "models", org, name, "revision", revision]:
                self._in_repo(org, name, "info", revision, "", query)
            case ["api", "models", org, name, "tree", revision, *rest]:
                self._in_repo(org, name, "tree", revision, "/".join(rest), query)
            case ["api", "resolve-cache", "models", org, name, revision, *rest]:
                self._in_repo(org, name, "cached", revision, "/".join(rest), query)
            case [org, name, "resolve", revision, *rest]:
                self._in_repo(org, name, "resolve", revision, "/".join(rest), query)
            case _:
                self._refuse(404, "NotFound", "Not found")

    def _refuse(self, status: int, code: str, message: str, commit: str = "") -> None:
        headers = [("X-Error-Code", code), ("X-Error-Message", message), ("Content-Type", "application/json")]
        if commit:
            headers.append(("X-Repo-Commit", commit))
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: object, commit: str, headers: web.Headers | None = None) -> None:
        facts = [("Content-Type", "application/json; charset=utf-8"), ("X-Repo-Commit", commit), *(headers or [])]
        self.answer(200, json.dumps(value).encode(), facts)

    def _in_repo(self, org: str, name: str, kind: str, revision: str, path: str, query: dict[str, str]) -> None:
        SITE.counts[kind] += 1
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", SITE.token, SITE.other_token):
            return self._refuse(401, "InvalidToken", "Invalid credentials in Authorization header")
        folder = SITE.repos / org / name
        repo = json.loads((folder / "repo.json").read_text()) if (folder / "repo.json").exists() else None
        if repo is None or (repo["private"] and given != SITE.token):
            return self._refuse(404 if given else 401, "RepoNotFound", "Repository not found")
        commit = repo["refs"].get(revision, revision)
        if not (folder / commit / ".").is_dir():
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repo["gated"] and kind in ("resolve", "cached") and given != SITE.token:
            message = f"Access to model {org}/{name} is restricted and you are not in the authorized list"
            return self._refuse(403 if given else 401, "GatedRepo", message, commit)
        if kind == "refs":
            return self._refs(repo, commit)
        if kind == "info":
            return self._info(f"{org}/{name}", repo, commit, folder / commit)
        if kind == "tree":
            return self._tree(commit, folder / commit, path, query)
        return self._file(f"{org}/{name}", kind, commit, folder / commit, path)

    def _refs(self, repo: dict[str, Any], commit: str) -> None:
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in sorted(repo["refs"].items())]
        self._json({"branches": branches, "tags": [], "converts": []}, commit)

    def _info(self, repo_id: str, repo: dict[str, Any], commit: str, tree: Path) -> None:
        facts = {
            "_id": commit[:24],
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": repo["private"],
            "gated": "auto" if repo["gated"] else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": _DATE,
            "createdAt": _DATE,
            "siblings": [{"rfilename": path} for path in files_of(tree)],
        }
        self._json(facts, commit)

    def _tree(self, commit: str, tree: Path, path: str, query: dict[str, str]) -> None:
        entries = tree_entries(tree, path, recursive=query.get("recursive", "").lower() in ("true", "1"))
        if path and not entries:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist", commit)
        start = int(query.get("cursor", "0"))
        stop = start + int(query.get("limit", SITE.page_entries))
        headers = []
        if stop < len(entries):
            following = urllib.parse.urlencode({**query, "cursor": str(stop)})
            address = f"{SITE.hub_url}{urllib.parse.urlsplit(self.path).path}?{following}"
            headers.append(("Link", f'<{address}>; rel="next"'))
        return self._json(entries[start:stop], commit, headers)

    def _file(self, repo_id: str, kind: str, commit: str, tree: Path, path: str) -> None:
        if path not in files_of(tree):
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        size, content, blob = digests(tree / path)
        headers = [("X-Repo-Commit", commit)]
        if kind == "cached":
            SITE.counts["hub_bytes"] += self.answer_file(tree / path, [*headers, ("ETag", f'"{blob}"')])
            return None
        headers.append(("X-Linked-Size", str(size)))
        if is_large(tree / path):
            cdn_path = f"/repos/{commit}/{content}"
            SITE.blobs[cdn_path] = tree / path
            linked = [("X-Linked-Etag", f'"{content}"'), ("Accept-Ranges", "bytes"), ("Vary", "Accept")]
            return self.answer(302, b"", [*headers, *linked, ("Location", SITE.signed_url(cdn_path))])
        # A relative redirect on the hub itself, where clients keep their token.
        location = f"/api/resolve-cache/models/{repo_id}/{commit}/{urllib.parse.quote(path)}?etag=%22{blob}%22"
        return self.answer(307, b"", [*headers, ("X-Linked-Etag", f'"{blob}"'), ("Location", location)])


class Cdn(_Handler):
    """Signed addresses of large files; like S3 it refuses a request that is authorised twice."""

    host = "cdn"

    def route(self, url: urllib.parse.SplitResult, query: dict[str, str]) -> None:
        if self.headers.get("Authorization"):
            return self._refuse(400, "InvalidArgument", "Only one auth mechanism allowed")
        expires = query.get("Expires", "0")
        if query.get("X-Amz-Signature") != SITE.signature(url.path, expires):
            return self._refuse(403, "SignatureDoesNotMatch", "The signature does not match")
        if time.time() > float(expires):
            return self._refuse(403, "AccessDenied", "Request has expired")
        etag = ("ETag", f'"{url.path.rpartition("/")[2]}"')
        SITE.counts["cdn_bytes"] += self.answer_file(SITE.blobs[url.path], [etag])
        return None

    def _refuse(self, status: int, code: str, message: str) -> None:
        SITE.counts["refused"] += 1
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.answer(status, body.encode(), [("Content-Type", "application/xml")])


def files_of(tree: Path) -> list[str]:
    """Paths of all files below `tree`, sorted."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), tree) for folder, _, names in os.walk(tree) for name in names
    )


def tree_entries(tree: Path, below: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Entries of the tree API: files with their ids, and the directories on the way."""
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path in files_of(tree):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            size, content, blob = digests(tree / path)
            entries[path] = {"type": "file", "oid": blob, "size": size, "path": path}
            if is_large(tree / path):
                entries[path]["lfs"] = {"oid": content, "size": size, "pointerSize": 134}
    return [entries[path] for path in sorted(entries)]


def main() -> None:
    global SITE
    settings = remote.read_settings()
    SITE = Site(**(settings | {"repos": Path(settings["repos"])}))
    web.serve(Hub, "127.0.0.1", SITE.port)
    web.serve(Cdn, CDN_HOST, SITE.port)
    remote.obey({n: getattr(SITE, n) for n in ("set", "reject", "expire_urls", "stats", "forget_stats")})


if __name__ == "__main__":
    main()

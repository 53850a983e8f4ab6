"""Models on the Hugging Face Hub: `hf://org/name[@revision]`.

Version: sha256 (LFS) or git blob id of the content, read at the commit the revision meant when it was listed. A branch
that moves shows with the next listing; what is open keeps its commit, which the Hub keeps too.
Requests for a first listing: two, and one more per further 1000 entries; one less if the revision is a commit. Then all
directories are known. For a file's first read two (where is it; the bytes), afterwards one per range.

Traps: the Hub limits how often addresses may be asked for, so they are kept until they expire and renewed when the CDN
fails or refuses. The token goes to the Hub only, never to the CDN. Files have no modification time there. Xet-backed
files arrive as plain bytes through the same redirect.
"""

from __future__ import annotations

import re
import reprlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from mfs.errors import MfsError, NotFoundError, StoreError, TransientStoreError
from mfs.fetch.links import next_url
from mfs.fetch.redirects import Hop, follow, next_hop
from mfs.fetch.retry import TRANSIENT_STATUSES, Hold, Rest, wished_pause_s, with_retries
from mfs.fetch.route import Route, Shared
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.sources import hf_cache
from mfs.sources.base import Page
from mfs.sources.bounds import parse_json, size_of
from mfs.sources.hf_access import (
    HUB_ORIGINS,
    HUB_URL,
    error_of,
    expiry_s,
    hub_endpoint,
    hub_token,
    is_refusal,
    parse_hf_url,
)
from mfs.sources.options import SourceOptions
from mfs.sources.paging import Trail
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, Entry, EntryKind, ObjectId

ADDRESSES_MAX = 4096
"""Addresses of files remembered; at the limit all are forgotten, which costs one request per file in use."""

KEPT_NAMES_MAX = 20_000
"""Of a commit, in memory, some 10 MB: so a look for changes asks the Hub, whose limit all nodes share, one question."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class _Address(NamedTuple):
    hop: Hop
    expires_s: float
    """time.time() value."""


class HfSource:
    """One repository at a branch, tag or commit. Thread-safe."""

    def __init__(self, repo: str, revision: str, options: SourceOptions) -> None:
        self._repo = repo
        self._revision = revision
        self._endpoint = hub_endpoint(options.endpoint_url)
        self._is_told_token = bool(options.token)
        self._token = options.token or hub_token()
        self._is_cache = options.layout == "hub-cache"
        self._transport = Transport(connections_max=options.connections_max)
        self._route = Route(self._transport, options.cache)
        self._hold = Hold(f"the Hub at {self._endpoint}")
        self._closed = threading.Event()
        self._addresses: dict[tuple[str, str], _Address] = {}
        self._asking: dict[tuple[str, str], threading.Lock] = {}
        """Held by who asks for a file's address; others that want the same file wait for his answer."""
        self._last_tree: tuple[str, tuple[Page, ...]] | None = None
        """A commit, and what `_tree` found of it."""
        self._guard = threading.Lock()
        """Around changes of both tables, never while the Hub is asked."""
        self.identity = f"hf://{repo}" if self._endpoint == HUB_URL else f"hf://{repo}@{self._endpoint}"
        if self._is_cache:
            self.identity += "#hub-cache"  # another tree, with other paths

    @property
    def address(self) -> str:
        """The repository's page; see `Source.address`."""
        return f"{self._endpoint}/{self._repo}"

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Pin the revision and yield all directories at `path` and below; see `Source.list`."""
        where = f"hf://{self._repo}@{self._revision}"
        commit, is_gated = self._pin(where, deadline_s)
        listed = self._tree(commit, where, deadline_s)
        found: Iterator[Page] = iter(listed)
        if self._is_cache:
            found = iter(hf_cache.cache_pages(found, where, self._revision, commit))
        pages = [page for page in found if not path or page[0] == path or page[0].startswith(f"{path}/")]
        if not pages:
            raise NotFoundError(f"{where}: no directory {path!r}")
        if is_gated:
            self._check_access(commit, listed, where, deadline_s)
        yield from pages

    def _tree(self, commit: str, where: str, deadline_s: float) -> tuple[Page, ...]:
        """All directories of a commit, which never change: the last one's are kept, unless they are large."""
        last = self._last_tree
        if last is not None and last[0] == commit:
            return last[1]
        tree = TreeBuilder(where, "")
        trail = Trail(where)
        page: Hop | None = Hop(f"{self._api('tree', commit)}?recursive=true")
        while page:
            trail.ask(page.url)
            reply, answered = self._get(page, where, deadline_s)
            count = _add_page(tree, reply.body, commit, where)
            trail.see(reply.body if count else b"")
            following = next_url(reply.headers, answered.url)
            page = self._page_at(following, answered) if following else None
        pages = tuple(tree.pages())
        is_small = sum(len(entries) for _, entries in pages) <= KEPT_NAMES_MAX
        self._last_tree = (commit, pages) if is_small else None
        return pages

    def _check_access(self, commit: str, pages: Iterable[Page], where: str, deadline_s: float) -> None:
        """The Hub lists a gated repository for everyone: asking for a file says now what reading would say later."""
        files = [f"{folder}/{e.name}" if folder else e.name for folder, found in pages for e in found
                 if e.kind is EntryKind.FILE]  # fmt: skip
        if files:
            # The weights' own address, which their first reader then finds known.
            path = next((file for file in files if file.endswith(".safetensors")), files[0])
            what = f"access to {where}"
            with_retries(lambda: self._address(commit, path, where, deadline_s), what=what, deadline_s=deadline_s,
                         stopped=self._closed)  # fmt: skip

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from the file at its commit; see `Source.get_range`."""
        if self._is_cache and hf_cache.fill_ref(obj, span, out):
            return
        path = hf_cache.repository_path(obj.path) if self._is_cache else obj.path
        commit = obj.locator
        if not _COMMIT.fullmatch(commit):
            raise StoreError(f"{obj}: expected a commit as its locator, got {commit!r}")
        where = f"hf://{self._repo}@{commit[:12]}/{path}"

        rest = Rest(span, out, is_exact=True)

        def send(hop: Hop) -> Reply:
            headers = self._headers(hop, is_file=True)
            # Our token is for the Hub alone; and what the Hub sends itself is small, and counted by it.
            shared = None if headers or hop.is_home else Shared(obj.cache_id, hop.url, {})
            return rest.take(lambda part, view: self._route.read_range(
                hop.url, part, out=view, size=obj.size, headers=headers, name=where, shared=shared,
                deadline_s=deadline_s,
            ))  # fmt: skip

        def fetch(address: _Address) -> tuple[Reply, Hop]:
            try:
                return follow(address.hop, send)
            except MfsError:  # whatever it was: the next try asks the Hub, which may know another that lives
                if not address.hop.is_home:
                    self._forget(commit, path, address)
                raise

        def attempt() -> None:
            token = self._token
            address, is_new = self._address(commit, path, where, deadline_s)
            reply, hop = fetch(address)
            # The address has died before its time, which stores say as 400 too, or the token since it was asked for.
            if reply.status in (400, 401, 403, 404, 410) and (not is_new or self._renew_token(token)):
                self._forget(commit, path, address)
                address, _ = self._address(commit, path, where, deadline_s)
                reply, hop = fetch(address)
            if reply.status not in (200, 206):
                self._forget(commit, path, address)
                raise self._error(reply, where)
            if hop != address.hop:
                self._addresses[commit, path] = _Address(hop, expiry_s(hop.url))

        if not span:
            return
        what = f"{where}: bytes {span.start}-{span.stop}"
        with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._closed)

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._closed.set()
        self._route.close()
        self._transport.close()

    def _pin(self, where: str, deadline_s: float) -> tuple[str, bool]:
        """The commit that the revision means now, and whether the Hub says that the repository is gated."""
        if _COMMIT.fullmatch(self._revision):
            return self._revision, False
        reply, _ = self._get(Hop(self._api("revision", self._revision)), where, deadline_s)
        try:
            found = parse_json(reply.body)
            commit, is_gated = found["sha"], bool(found.get("gated"))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise StoreError(f"{where}: expected the revision's commit, got {reply.body[:60]!r}: {e!r}") from e
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise StoreError(f"{where}: expected a commit of 40 hex digits, got {commit!r}")
        return commit, is_gated

    def _address(self, commit: str, path: str, where: str, deadline_s: float) -> tuple[_Address, bool]:
        """Where a file's bytes are, and whether that was asked just now. One request per file, however many wait."""
        key = (commit, path)
        known = self._addresses.get(key)
        if known and time.time() < known.expires_s:
            return known, False
        with self._guard:
            if len(self._asking) >= ADDRESSES_MAX:
                self._asking.clear()  # what is being asked now may be asked twice then
            lock = self._asking.setdefault(key, threading.Lock())
        if not lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TransientStoreError(f"{where}: its address was not known before the deadline")
        try:
            known = self._addresses.get(key)
            if known and time.time() < known.expires_s:
                return known, False
            hop = Hop(f"{self._endpoint}/{self._repo}/resolve/{commit}/{quote(path, safe='/-_.~')}")
            reply = self._with_token(lambda: self._transport.request(
                hop.url, method="HEAD", headers=self._headers(hop, is_file=True), deadline_s=deadline_s
            ))  # fmt: skip
            there = next_hop(hop, reply)
            if there is None and reply.status != 200:
                raise self._error(reply, where)
            address = _Address(there or hop, expiry_s((there or hop).url))
            with self._guard:
                if len(self._addresses) >= ADDRESSES_MAX:
                    self._addresses.clear()
                self._addresses[key] = address
            return address, True
        finally:
            lock.release()

    def _forget(self, commit: str, path: str, address: _Address) -> None:
        """Forget an address, unless somebody has already renewed it."""
        with self._guard:
            if self._addresses.get((commit, path)) == address:
                del self._addresses[commit, path]

    def _get(self, start: Hop, where: str, deadline_s: float) -> tuple[Reply, Hop]:
        """An answer 200 of the API and who gave it; renamed repositories and moved hubs are followed."""

        def send(hop: Hop) -> Reply:
            return self._transport.request(hop.url, headers=self._headers(hop), deadline_s=deadline_s)

        def attempt() -> tuple[Reply, Hop]:
            answered = start

            def ask() -> Reply:
                nonlocal answered
                reply, answered = follow(start, send)
                return reply

            reply = self._with_token(ask)
            if reply.status != 200:
                raise self._error(reply, where)
            return reply, answered

        return with_retries(attempt, what=f"listing {where}", deadline_s=deadline_s, stopped=self._closed)

    def _page_at(self, url: str, answered: Hop) -> Hop:
        """Where to ask for the page that a Link names: at the host that named it, if that is its own, else at our hub.

        A mirror passes on the Links of the hub behind it, which name that hub: we may not reach it, and the token is
        not for it. The same path and query of the mirror are meant.
        """
        parts = urlsplit(url)
        home = urlsplit(self._endpoint)
        there = parse_target(url).origin
        if there == parse_target(answered.url).origin != parse_target(self._endpoint).origin:
            return Hop(url, answered.is_home)
        below = parts.path if parts.path.startswith(f"{home.path}/") else f"{home.path}{parts.path}"
        return Hop(parts._replace(scheme=home.scheme, netloc=home.netloc, path=below).geturl())

    def _with_token(self, ask: Callable[[], Reply]) -> Reply:
        """The answer; asked for once more if it is a refusal and another token has come meanwhile.

        Where the Hub has asked to be left alone, it is: by all threads, for whichever of them it said so.
        """
        self._hold.check()
        token = self._token
        reply = ask()
        if is_refusal(reply) and self._renew_token(token):
            reply = ask()
        if reply.status in TRANSIENT_STATUSES:
            self._hold.note(wished_pause_s(reply.headers))
        return reply

    def _renew_token(self, refused: str | None) -> bool:
        """Whether there is another token than the one that was refused: whoever rotates it writes it into its file."""
        if self._token == refused and not self._is_told_token:
            self._token = hub_token()
        return self._token != refused

    def _api(self, kind: str, revision: str) -> str:
        return f"{self._endpoint}/api/models/{self._repo}/{kind}/{quote(revision, safe='')}"

    def _headers(self, hop: Hop, *, is_file: bool = False) -> dict[str, str]:
        """is_file: on the way to a file's bytes a mirror may lead to the Hub, token and all, as in huggingface_hub."""
        is_ours = hop.is_home or (is_file and parse_target(hop.url).origin in HUB_ORIGINS)
        return {"Authorization": f"Bearer {self._token}"} if self._token and is_ours else {}

    def _error(self, reply: Reply, where: str) -> Exception:
        return error_of(reply, where, self._repo, self._endpoint, has_token=self._token is not None)


def _add_page(tree: TreeBuilder, body: bytes, commit: str, where: str) -> int:
    """Put one page of the tree API into the tree; how many entries it had. Raises: StoreError if it is none."""
    try:
        items = parse_json(body)
        if not isinstance(items, list):
            raise ValueError("no list")
    except ValueError as e:
        raise StoreError(f"{where}: expected a page of the repository's tree, got {body[:60]!r}: {e}") from e
    odd_count = 0
    for item in items:
        try:
            kind, path = item["type"], item["path"]
            if kind == "file":
                tree.add_file(path, _entry(item, commit))
            elif kind == "directory":
                tree.add_directory(path)
        except (KeyError, TypeError, AttributeError) as e:
            odd_count += 1
            tree.leave_out(reprlib.repr(item), f"no entry of a tree: {e!r}")
    if items and odd_count == len(items):
        raise StoreError(f"{where}: expected a page of the repository's tree, got {body[:60]!r}")
    return len(items)


def _entry(item: dict[str, Any], commit: str) -> Entry:
    """Raises: KeyError, TypeError, AttributeError for what is none."""
    if lfs := item.get("lfs"):
        sha256 = lfs["oid"].removeprefix("sha256:")
        return Entry("", EntryKind.FILE, size_of(lfs["size"]), 0, sha256, f"sha256:{sha256}", commit)
    return Entry("", EntryKind.FILE, size_of(item["size"]), 0, item["oid"].strip(), None, commit)


def open_url(url: str, options: SourceOptions) -> HfSource:
    """The repository that an hf:// URL names. Raises: UsageError."""
    repo, revision = parse_hf_url(url)
    return HfSource(repo, revision, options)

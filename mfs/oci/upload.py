"""Blobs into a registry: asked for first, mounted from another repository where they are there, else sent in pieces.

A piece that fails is asked about, and the upload goes on from where the registry says it stands; where it does not know
the upload any more, from the beginning. Where a piece is too large for it, the next ones are smaller. What it has in
some repository it may mount without being told in which. A registry keeps a blob only under the digest of what it got,
so what a network or a changing file does to it is an error there and never a wrong blob. Two uploads of one blob are
both right.

Traps: docker-registry 2.8 appends whatever a PATCH brings, wherever it says it belongs, so none is sent twice unasked;
'Range: 0-0' is its answer for nothing and for one byte; and of an upload whose piece was cut, or whose answer was lost,
it knows nothing any more (404), so that blob begins anew. Where nothing of a piece had come it goes on.
Source: distribution-spec 1.1, "Pushing blobs": POST and PUT, chunked, mounting from another repository.
"""

from __future__ import annotations

import random
import re
import time
from enum import StrEnum
from urllib.parse import quote, urljoin

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, StoreError, TransientStoreError
from mfs.fetch.redirects import REDIRECT_STATUSES
from mfs.fetch.retry import FIRST_PAUSE_S, PAUSE_S_MAX, TRANSIENT_STATUSES
from mfs.fetch.told import tell_retry
from mfs.fetch.transport import Reply
from mfs.oci.auth import Scopes
from mfs.oci.blob import Advance, Blob, blob_of
from mfs.oci.client import RegistryClient
from mfs.sources.base import Source

PIECE_BYTES = 32 << 20
"""Of one request. A blob up to this size takes two requests; memory is this much for each upload under way."""
PIECE_BYTES_MAX = 256 << 20
"""What a registry may wish for as its least (`OCI-Chunk-Min-Length`)."""
PIECE_BYTES_MIN = 64 << 10
"""What pieces shrink to, by quarters, where they are too large for the registry or a proxy before it (413)."""
ACCESS_S = 45.0
"""Until it is known whether one may push at all."""
REQUEST_S = 300.0
"""Until a request with a piece is answered: 32 MiB at 1 Mbit/s. Silence is noticed much sooner (`fetch.wire`)."""
TRIES_MAX = 6
"""In a row that bring an upload no further."""

_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,19})", re.ASCII)


class How(StrEnum):
    """How a blob came to be in a repository."""

    REUSED = "reused"
    """It was there."""
    MOUNTED = "mounted"
    """It was in another repository of the registry."""
    SENT = "sent"


class _LostError(MfsError):
    """The registry does not know the upload any more."""


class _StandsError(TransientStoreError):
    """The registry took nothing of a piece, and said where the upload stands."""


class _TooLargeError(MfsError):
    """A piece was too large for the registry."""


class Uploader:
    """Brings blobs into one repository. Thread-safe."""

    def __init__(self, client: RegistryClient, source: Source) -> None:
        """source: of the files that blobs name."""
        self._client = client
        self._source = source
        self._mount_from: tuple[str, ...] = ()
        self._finds_itself = True
        """Whether the registry may be asked to mount a blob from wherever it has it."""
        self._piece_bytes = PIECE_BYTES_MAX
        """Larger ones were refused."""
        self._uploads = f"{client.api}/blobs/uploads/"
        self.scopes: Scopes = (f"repository:{client.reference.repository}:pull,push",)

    def mount_from(self, name: str) -> None:
        """Take over from this repository of the registry what it has, from now on."""
        if name != self._client.reference.repository:
            self._mount_from = (*self._mount_from, name)

    def stop(self) -> None:
        """End what is under way in any thread with StoreError, soon and for good."""
        self._client.close()

    def bring(self, blob: Blob, advance: Advance = lambda count: None) -> How:
        """See that the repository has the blob. `advance` counts what is sent, each byte once.

        Raises: AccessError, ChangedError, StoreError.
        """
        where = f"{self._client.reference.identity}: {blob.path}"
        if self.has(blob.digest, where):
            return How.REUSED
        for name in self._mount_from:
            if self._is_mounted(blob, name, where):
                return How.MOUNTED
        return How.SENT if self._send(blob, advance, where) else How.MOUNTED

    def check_access(self) -> None:
        """Begin an upload and give it up: whether the registry answers, and lets us push. Some seconds to ACCESS_S.

        Raises: AccessError, StoreError.
        """
        where = f"{self._client.reference.identity}: whether it may be pushed to"
        deadline_s = time.monotonic() + ACCESS_S

        def attempt() -> str:
            reply = self._client.send("POST", self._uploads, self.scopes, body=b"", deadline_s=deadline_s)
            if reply.status != 202:
                raise self._client.error_of(reply, where)
            return self._location(reply, self._uploads, where)

        self._cancel(self._client.retried(attempt, where, deadline_s))

    def has(self, digest: str, where: str) -> bool:
        """Whether the repository has a blob. Raises: AccessError, StoreError."""

        def attempt() -> bool:
            url = f"{self._client.api}/blobs/{digest}"
            reply = self._client.send("HEAD", url, self.scopes, deadline_s=deadline_s)
            if reply.status in (404, 405, 501):  # one that knows no HEAD is sent it again
                return False
            if reply.status != 200 and reply.status not in REDIRECT_STATUSES:  # to where it is stored
                raise self._client.error_of(reply, where)
            return True

        deadline_s = time.monotonic() + REQUEST_S
        return self._client.retried(attempt, f"{where}: whether it is there", deadline_s)

    def _is_mounted(self, blob: Blob, name: str, where: str) -> bool:
        """Ask the registry to take the blob over from another repository; it may not be willing, or not have it."""

        def attempt() -> bool:
            url = f"{self._uploads}?mount={blob.digest}&from={quote(name, safe='')}"
            scopes = (*self.scopes, f"repository:{name}:pull")
            try:
                reply = self._client.send("POST", url, scopes, body=b"", deadline_s=deadline_s)
            except AccessError:  # we may push here, but not read there
                self._mount_from = tuple(other for other in self._mount_from if other != name)
                return False
            if reply.status == 202:
                self._cancel(self._location(reply, url, where))
            elif reply.status in TRANSIENT_STATUSES:
                raise self._client.error_of(reply, where)
            return reply.status == 201

        deadline_s = time.monotonic() + REQUEST_S
        return self._client.retried(attempt, f"{where}: mounting it from {name}", deadline_s)

    def _send(self, blob: Blob, advance: Advance, where: str) -> bool:
        """False where nothing needed to be sent: the registry had it elsewhere."""
        upload: _Upload | None = None
        best, tries_count, has_restarted, bound_s = 0, 0, False, FIRST_PAUSE_S
        while True:
            try:
                if upload is None:
                    upload = self._begin(blob, where)
                    if upload is None:
                        return False
                elif upload.is_in_doubt:
                    self._ask(upload, blob.nbytes, where)
                while not upload.is_done:
                    self.check_going(where)
                    self._next(upload, blob, where)
                    if upload.offset > best:
                        advance(upload.offset - best)
                        best, tries_count, bound_s = upload.offset, 0, FIRST_PAUSE_S
                return True
            except _LostError as error:
                upload, last = None, TransientStoreError(str(error))
            except _TooLargeError:
                assert upload is not None
                upload.is_in_doubt = True
                continue  # not for ever: each time the pieces are a quarter
            except TransientStoreError as error:
                last = error
                if upload is not None:
                    upload.is_in_doubt = not isinstance(error, _StandsError)
            except IntegrityError:
                if has_restarted:
                    raise
                # Once more: an answer that was lost may have left bytes twice.
                has_restarted, upload = True, None
                continue
            tries_count += 1
            if tries_count >= TRIES_MAX:
                raise TransientStoreError(
                    f"{where}: given up after {tries_count} attempts that brought nothing: {last}"
                )
            pause_s = random.uniform(0, bound_s) + min(60.0, last.retry_after_s or 0.0)
            bound_s = min(PAUSE_S_MAX, 2 * bound_s)
            tell_retry(last)
            if self._client.stopped.wait(pause_s):
                raise StoreError(f"{where}: the push was ended")

    def _begin(self, blob: Blob, where: str) -> _Upload | None:
        """A new upload; None where the registry has mounted the blob instead."""
        if self._finds_itself:
            reply = self._ask_for(f"{self._uploads}?mount={blob.digest}", "POST", body=b"")
            if reply.status == 201:
                return None
            self._finds_itself = reply.status in TRANSIENT_STATUSES or reply.status == 202
        if not self._finds_itself:  # it does not know what that means
            reply = self._ask_for(self._uploads, "POST", body=b"")
        if reply.status != 202:
            raise self._client.error_of(reply, where)
        least = _least(reply)
        piece_bytes = max(least, min(PIECE_BYTES, self._piece_bytes))
        return _Upload(self._location(reply, self._uploads, where), piece_bytes, least)

    def check_going(self, where: str) -> None:
        """Raises: StoreError once the push was ended."""
        if self._client.stopped.is_set():
            raise StoreError(f"{where}: the push was ended")

    def _next(self, upload: _Upload, blob: Blob, where: str) -> None:
        """Send what comes next: all of a small blob, a piece of a large one, or the word that it is whole."""
        left = blob.nbytes - upload.offset
        is_last = upload.offset == 0 and left <= upload.piece_bytes
        if not is_last and left:
            stop = min(blob.nbytes, upload.offset + upload.piece_bytes)
            body = blob.read(self._source, upload.offset, stop)
            headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{upload.offset}-{stop - 1}"}
            reply = self._ask_for(upload.url, "PATCH", headers, body)
            stands = _stands(reply)
            if reply.status not in (202, 204) and not (reply.status == 416 and stands is not None):
                raise self._refusal(reply, upload, where)
            if reply.headers.get("Location"):
                upload.url = self._location(reply, upload.url, where)
            start, upload.offset = upload.offset, stop if stands is None else min(stands, stop)
            if upload.offset <= start:
                raise _StandsError(
                    f"{where}: the registry took nothing of a piece ({reply.status}): it has {upload.offset} bytes"
                )
            return
        body = blob.read(self._source, upload.offset, blob.nbytes)
        mark = "&" if "?" in upload.url else "?"
        url = f"{upload.url}{mark}digest={quote(blob.digest, safe=':')}"
        try:
            reply = self._ask_for(url, "PUT", {"Content-Type": "application/octet-stream"}, body)
            if reply.status == 400:
                self._check_unchanged(blob, where)
                raise IntegrityError(f"{where}: the registry got other bytes than were sent ({reply.body[:120]!r})")
            if reply.status not in (201, 204):
                raise self._refusal(reply, upload, where)
        except (TransientStoreError, _LostError):
            if not self.has(blob.digest, where):  # the answer was lost, perhaps not what it said
                raise
        upload.offset, upload.is_done = blob.nbytes, True

    def _check_unchanged(self, blob: Blob, where: str) -> None:
        """Raises: ChangedError if the file is no longer what was hashed."""
        now = blob_of(blob.pieces, self._source, blob.path, lambda count: self.check_going(where))
        if now.digest != blob.digest:
            raise ChangedError(f"{where}: changed while it was pushed; push again once nobody writes there")

    def _ask(self, upload: _Upload, nbytes: int, where: str) -> None:
        """Where the upload stands, after an answer was lost."""
        reply = self._ask_for(upload.url, "GET")
        if reply.status in TRANSIENT_STATUSES:
            raise self._client.error_of(reply, where)
        stands = _stands(reply)
        if reply.status != 204 or stands is None:
            raise _LostError(f"{where}: the registry does not know the upload any more (status {reply.status})")
        upload.url = self._location(reply, upload.url, where)
        upload.offset = stands
        if upload.offset > nbytes:
            raise _LostError(f"{where}: the registry has {upload.offset} bytes of {nbytes}")
        upload.is_in_doubt = False

    def _refusal(self, reply: Reply, upload: _Upload, where: str) -> MfsError:
        smaller = upload.piece_bytes // 4
        if reply.status == 413 and smaller >= max(PIECE_BYTES_MIN, upload.least_bytes):
            upload.piece_bytes = self._piece_bytes = smaller
            return _TooLargeError(where)
        if reply.status == 413:
            return StoreError(
                f"{where}: pieces of {upload.piece_bytes} bytes are too large for the registry, or for a proxy before "
                "it (status 413); raise its limit, in nginx client_max_body_size"
            )
        if reply.status in (404, 410, 416):
            return _LostError(f"{where}: the registry lost the upload (status {reply.status})")
        return self._client.error_of(reply, where)

    def _location(self, reply: Reply, url: str, where: str) -> str:
        place = reply.headers.get("Location")
        if not place:
            raise StoreError(f"{where}: the registry does not say where to upload to: no Location")
        return self._client.settled(urljoin(url, place))

    def _cancel(self, url: str) -> None:
        try:
            self._ask_for(url, "DELETE")
        except MfsError:
            pass  # it expires there

    def _ask_for(self, url: str, method: str, headers: dict[str, str] | None = None,
                 body: bytes | bytearray | None = None) -> Reply:  # fmt: skip
        deadline_s = time.monotonic() + REQUEST_S
        return self._client.send(method, url, self.scopes, headers=headers, body=body, deadline_s=deadline_s)


class _Upload:
    """One upload under way."""

    def __init__(self, url: str, piece_bytes: int, least_bytes: int) -> None:
        """least_bytes: of a piece, by the registry."""
        self.url = url
        self.piece_bytes = piece_bytes
        self.least_bytes = least_bytes
        self.offset = 0
        self.is_in_doubt = False
        self.is_done = False


def _least(reply: Reply) -> int:
    """Bytes that a piece must have at least, but for the last."""
    wished = reply.headers.get("OCI-Chunk-Min-Length", "")
    return min(int(wished), PIECE_BYTES_MAX) if wished.isascii() and wished.isdigit() else 0


def _stands(reply: Reply) -> int | None:
    """The byte that an upload goes on from, by its Range; None where the answer does not say."""
    match = _RANGE.fullmatch(reply.headers.get("Range", "").strip())
    if match is None:
        return None
    return int(match[1]) + 1 if int(match[1]) else 0

"""Models in an OCI registry: `oci://host/repository[:tag][@digest]`, by range, nothing pulled first.

Version: the layer's digest, and the place in it where the layer is a tar. So what is open stays readable when a tag
moves, as long as the registry keeps the blob. A raw layer's digest is its file's sha256, which `mfs verify` checks over
the whole; a range cannot be checked against it. Manifests are checked against their digests, compressed layers whole.
Requests for a first listing: one, beside being let in; later one HEAD while the tag has not moved. For a tar layer one
more per large member. For a blob's first read two where the registry redirects, then one per range.

Without a tag the tags are directories, each listed when somebody looks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from mfs.errors import NotFoundError, StoreError, TransientStoreError
from mfs.fetch.retry import Rest, with_retries
from mfs.oci import tar
from mfs.oci.artifact import BadLayerError, Descriptor, Manifest, Place, choose, parse_document, parse_locator
from mfs.oci.client import RegistryClient
from mfs.oci.files import add_files
from mfs.oci.media import Packing
from mfs.oci.reference import Reference, is_tag, parse_reference
from mfs.oci.unpacked import Fetch, UnpackedLayers
from mfs.sources.base import Page
from mfs.sources.options import SourceOptions
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, ObjectId

INDEX_DEPTH_MAX = 3
"""Indexes of indexes followed."""
KEPT_MAX = 8
"""Listings of manifests kept, by digest: a tag that comes back or has not moved need not be read again."""
KEPT_ENTRIES_MAX = 100_000
"""Of all listings that are kept, together."""
WARM_CONNECTIONS = 3
MISSED_MAX = 3
"""Times that a registry may say it lacks a layer: docker-registry 2.8 does, for an instant, while somebody pushes the
same one again."""

Pages = Sequence[Page]

_FALLBACK = "sha256-"
"""Begins the tags under which referrers stand where a registry has none: no versions of anything."""


class OciSource:
    """One repository, or one tag or manifest of it. Thread-safe."""

    def __init__(self, reference: Reference, options: SourceOptions) -> None:
        self._reference = reference
        self.identity = reference.identity
        self._client = RegistryClient(reference, connections_max=options.connections_max, cache=options.cache)
        self._unpacked = UnpackedLayers(
            options.cache_directory, self._client.stopped, elsewhere=options.unpack_directory
        )
        self._kept: OrderedDict[str, tuple[int, Pages]] = OrderedDict()
        self._guard = threading.Lock()
        self._is_warm = False

    @property
    def address(self) -> str:
        """The registry's API; see `Source.address`."""
        return f"{self._reference.base_url}/v2/"

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Resolve the tag once and yield all directories of its manifest at `path` and below; see `Source.list`."""
        if not self._is_warm:
            self._is_warm = True
            self._client.transport.preconnect(self._client.api, WARM_CONNECTIONS, deadline_s=deadline_s)
        if self._reference.name is None:
            tag, _, inner = path.partition("/")
            if not tag:
                yield from self._tag_pages(deadline_s)
                return
            if not is_tag(tag):
                raise NotFoundError(f"{self._reference}: no tag {tag!r}")
            found = self._pages(tag, f"{self.identity}:{tag}", deadline_s)
            prefix, path = f"{tag}/", inner
        else:
            found, prefix = self._pages(self._reference.name, str(self._reference), deadline_s), ""
        wanted = [page for page in found if not path or page[0] == path or page[0].startswith(f"{path}/")]
        if not wanted:
            raise NotFoundError(f"{self._reference}: no directory {path!r}")
        for folder, entries in wanted:
            yield f"{prefix}{folder}".rstrip("/") if prefix else folder, entries

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from the layer that holds this version; see `Source.get_range`."""
        place = parse_locator(obj.locator)
        where = f"{self.identity}/{obj.path}"
        if obj.size != place.size:
            raise StoreError(f"{where}: expected {obj.size} bytes, listed were {place.size}")
        if span:
            self._read(place, span.start, out, where, deadline_s)

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._client.close()
        self._unpacked.close()

    def _tag_pages(self, deadline_s: float) -> Iterator[Page]:
        where = str(self._reference)
        tree = TreeBuilder(where, "")
        for tag in self._client.tags(where, deadline_s=deadline_s):
            if not tag.startswith(_FALLBACK):
                tree.add_unlisted_directory(tag)
        yield from tree.pages()

    def _pages(self, name: str, where: str, deadline_s: float) -> Pages:
        """The tree of a manifest, from memory where its digest is known."""
        if is_tag(name):
            with self._guard:
                is_worth_asking = bool(self._kept)
            digest = self._client.digest_now(name, where, deadline_s=deadline_s) if is_worth_asking else None
        else:
            digest = name
        if digest and (kept := self._kept_pages(digest)):
            return kept
        document = self._client.document(digest or name, where, deadline_s=deadline_s)
        tree = TreeBuilder(where, "")
        manifest = self._manifest(document.body, where, deadline_s)
        allowance = tar.Allowance(where, deadline_s)

        def members(layer: Descriptor, packing: Packing) -> Sequence[tar.Member]:
            return self._members(layer, packing, allowance, where, deadline_s)

        add_files(tree, manifest, members, where)
        is_whole = not tree.left_out.count
        pages = tuple(tree.pages())
        if is_whole:  # what was left out may have been for a reason that passes
            self._keep(document.digest, len(tree), pages)
        return pages

    def _keep(self, digest: str, count: int, pages: Pages) -> None:
        with self._guard:
            self._kept[digest] = (count, pages)
            while self._kept and (
                len(self._kept) > KEPT_MAX or sum(kept[0] for kept in self._kept.values()) > KEPT_ENTRIES_MAX
            ):
                self._kept.popitem(last=False)

    def _kept_pages(self, digest: str) -> Pages | None:
        with self._guard:
            found = self._kept.get(digest)
            if found is None:
                return None
            self._kept.move_to_end(digest)
            return found[1]

    def _manifest(self, body: bytes, where: str, deadline_s: float) -> Manifest:
        for _ in range(INDEX_DEPTH_MAX):
            found = parse_document(body, where)
            if isinstance(found, Manifest):
                return found
            body = self._client.document(choose(found, where).digest, where, deadline_s=deadline_s).body
        raise StoreError(f"{where}: an index of indexes, {INDEX_DEPTH_MAX} deep: nothing of it is read")

    def _members(self, layer: Descriptor, packing: Packing, allowance: tar.Allowance, where: str,
                 deadline_s: float) -> Sequence[tar.Member]:  # fmt: skip
        named = f"{where}: layer {layer.digest[:19]}"
        if packing is Packing.RAW:
            raise StoreError(f"{named} of type {layer.media_type!r:.80}: expected a tar")
        nbytes = layer.size
        if packing is not Packing.TAR:
            fetch = self._fetch(layer.digest, layer.size, where)
            nbytes = self._unpacked.nbytes(layer.digest, packing, layer.size, fetch, named, deadline_s=deadline_s)
        place = Place(packing, layer.digest, layer.size, 0, nbytes)

        def read(start: int, stop: int) -> bytes:
            out = bytearray(stop - start)
            self._read(place, start, memoryview(out), named, deadline_s)
            return bytes(out)

        try:
            return tuple(tar.members(read, nbytes, allowance))
        except BadLayerError as error:
            raise BadLayerError(f"{named}: {error}") from None

    def _read(self, place: Place, start: int, out: memoryview, where: str, deadline_s: float) -> None:
        """Fill `out` from `start` of the file at this place."""
        at = place.offset + start
        if place.packing in (Packing.GZIP, Packing.ZSTD):
            self._unpacked.read(place.layer, place.packing, place.layer_bytes,
                                self._fetch(place.layer, place.layer_bytes, where), at, out, where,
                                deadline_s=deadline_s)  # fmt: skip
        else:
            self._read_layer(place.layer, place.layer_bytes, at, out, where, deadline_s, is_file=True)

    def _fetch(self, digest: str, nbytes: int, where: str) -> Fetch:
        return lambda start, out, deadline_s: self._read_layer(digest, nbytes, start, out, where, deadline_s)

    def _read_layer(
        self, digest: str, nbytes: int, at: int, out: memoryview, where: str, deadline_s: float, *,
        is_file: bool = False,
    ) -> None:  # fmt: skip
        """is_file: the bytes are a file's as they stand there."""
        if at + len(out) > nbytes:
            raise StoreError(f"{where}: bytes {at}-{at + len(out)} of a layer of {nbytes}")
        missed_count = 0
        rest = Rest(ByteRange(at, at + len(out)), out, is_exact=is_file)

        def read(part: ByteRange, view: memoryview) -> None:
            self._client.read_blob(digest, nbytes, part.start, view, where, deadline_s=deadline_s)

        def attempt() -> None:
            nonlocal missed_count
            try:
                rest.take(read)
            except NotFoundError as error:
                missed_count += 1
                if missed_count < MISSED_MAX:
                    raise TransientStoreError(str(error)) from error
                raise

        what = f"{where}: bytes {at}-{at + len(out)}"
        with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._client.stopped)


def open_url(url: str, options: SourceOptions) -> OciSource:
    """The repository, tag or manifest that an oci:// URL names. Raises: UsageError."""
    return OciSource(parse_reference(url), options)

"""Who vouches for a revision: OpenSSF Model Signing bundles, made and checked with elliptic-curve keys.

FORMAT.md, "Signatures". A bundle states two things in one signed text: the sha256 of each of the model's files, which
is all that foreign verifiers look at, and which manifest of which model it is about. That manifest's id proves its
bytes, those name chunks, a chunk's id proves its table and the table each frame: so whoever has checked the one bundle
knows whatever range he reads to be vouched for.

No network, and no part of a file is read: the manifest has the digests. `cryptography` is imported when something is
signed or checked, so that others need not have it (decisions/0018 has why it is not the reference implementation).
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfs.errors import AccessError, ConfigError, IntegrityError, MfsError, NotFoundError, UsageError
from mfs.registry.layout import signature_key
from mfs.registry.manifest import Manifest, manifest_id, parse_manifest
from mfs.sources.bounds import parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from mfs.registry.store import Store

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

IGNORED = (".git", ".gitattributes", ".github", ".gitignore")
"""What at the top of a model no verifier of this format looks at; it is in the manifest, and so vouched for here."""

KEY_BYTES_MAX = 1 << 20
"""A key is a page of text; anything longer is another file given by mistake."""

BUNDLE_BYTES_SPARE = 64 << 10
"""A bundle repeats of a manifest its paths and digests, in base64 and at worst six characters for each of two bytes."""

_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curve -> the hash that signatures with it are made over, as the reference implementation has them."""


class Signer:
    """A private key. Reading it is all the I/O; made first, so that a wrong key is said before anything is pushed."""

    def __init__(self, key_path: Path, password: str | None = None) -> None:
        """key_path: PEM, a key on P-256, P-384 or P-521. password: of a key that is protected by one.

        Raises: ConfigError, one line, if it cannot be used.
        """
        serialization = _cryptography("serialization")
        body = _key_bytes(key_path)
        try:
            key = serialization.load_pem_private_key(body, password.encode() if password else None)
        except TypeError:  # a password where none is wanted, or none where one is
            missing = (
                "wants a password: set MFS_KEY_PASSWORD" if not password else "has no password: unset MFS_KEY_PASSWORD"
            )
            raise ConfigError(f"key {key_path} {missing}") from None
        except ValueError as error:
            what = (
                "is a public key; signing needs the private one"
                if b"PUBLIC KEY" in body
                else f"cannot be read: {error}"
            )
            raise ConfigError(f"key {key_path} {what}") from None
        _check_curve(key.public_key(), f"key {key_path}")
        self._key: ec.EllipticCurvePrivateKey = key
        self.fingerprint = _fingerprint(key.public_key())
        """See `Verifier.fingerprint`."""

    def sign(self, model: str, body: bytes) -> bytes:
        """The bundle that vouches for a manifest.

        model: what it is published as. Raises: IntegrityError if `body` is no manifest, UsageError.
        """
        files = signed_files(parse_manifest(body))
        return self.sign_files(model, files, {"mfs.model": model, "mfs.manifest": f"sha256:{manifest_id(body)}"})

    def sign_files(self, name: str, files: Sequence[tuple[str, str]], annotations: Mapping[str, str]) -> bytes:
        """The bundle that vouches for files, (path, sha256) in the order of their paths, under a name.

        Raises: UsageError if there are none.
        """
        payload = json.dumps(_statement(name, files, annotations), separators=(",", ":")).encode()
        signature = self._key.sign(_signed_bytes(payload), _algorithm(self._key.public_key()))
        bundle = {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": self.fingerprint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
        return json.dumps(bundle, separators=(",", ":")).encode() + b"\n"

    def put(self, store: Store, model: str, body: bytes, *, deadline_s: float) -> str:
        """Sign a manifest and store the bundle beside it, before any tag is moved to it: its key.

        Replaces what this key signed before. Raises: AccessError, StoreError.
        """
        key = signature_key(model, manifest_id(body), f"{self.fingerprint}.sig")
        store.write(key, self.sign(model, body), deadline_s=deadline_s)
        return key


class Verifier:
    """A public key that revisions must be signed with. Safe to use from several threads."""

    def __init__(self, key_path: Path) -> None:
        """key_path: PEM. Raises: ConfigError, one line, if it cannot be used."""
        body = _key_bytes(key_path)
        if b"PRIVATE KEY" in body:
            raise ConfigError(f"key {key_path} is a private key, which no reader should have; its public half is made "
                              f"by openssl pkey -in {key_path} -pubout")  # fmt: skip
        key = self._key = parse_public_key(body, f"key {key_path}")
        self.path = key_path
        self.fingerprint = _fingerprint(key)
        """64 hex digits: sha256 of the public key as PEM, as bundles name it; signatures are stored under it."""

    def check(self, store: Store, model: str, body: bytes, *, deadline_s: float) -> bytes:
        """See that this key vouches for a manifest, read from `store` as one of `model`: the bundle that says so.

        Raises: AccessError if it is not signed, or by other keys; IntegrityError if anything was changed since;
            StoreError.
        """
        digest = manifest_id(body)
        where = f"{model}@sha256:{digest[:12]}"
        try:
            key = signature_key(model, digest, f"{self.fingerprint}.sig")
            bundle = store.read(key, bytes_max=_bundle_bytes_max(body), deadline_s=deadline_s)
        except NotFoundError:
            raise AccessError(f"{where}: {self._lacking(store, model, digest, deadline_s)}") from None
        self.check_bundle(bundle, model, body)
        return bundle

    def _lacking(self, store: Store, model: str, digest: str, deadline_s: float) -> str:
        others: list[str] = []
        with suppress(MfsError):  # not every store lists; then less can be said
            others = list(store.names(signature_key(model, digest, ""), deadline_s=deadline_s))
        if others:
            named = ", ".join(name[:12] for name in others[:4])
            return f"signed by another key ({named}), not by {self.path} ({self.fingerprint[:12]})"
        return f"not signed; a signature by {self.path} is required: 'mfs sign' adds one"

    def check_bundle(self, bundle: bytes, model: str, body: bytes) -> None:
        """See that a bundle was made with this key for this manifest of this model. Raises: IntegrityError."""
        digest = manifest_id(body)
        where = f"{model}@sha256:{digest[:12]}: its signature"
        if len(bundle) > _bundle_bytes_max(body):
            raise IntegrityError(f"{where} has {len(bundle)} bytes, for a manifest of {len(body)}: no signature of it")
        try:
            statement = parse_json(self._payload(parse_json(bundle)))
            if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
                raise ValueError(f"of type {statement['predicateType']!r:.80}, expected {PREDICATE_TYPE}")
            (subject,) = statement["subject"]
            stated = subject.get("annotations") or {}
            named = stated.get("mfs.model"), stated.get("mfs.manifest")
        except _Invalid:
            raise IntegrityError(
                f"{where} was not made with {self.path} ({self.fingerprint[:12]}), or was changed"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{where} is no bundle: {type(error).__name__}: {str(error)[:200]}") from None
        if named != (model, f"sha256:{digest}"):
            raise IntegrityError(
                f"{where} is for {named[0]!r:.80}@{str(named[1])[:19]}: it was brought here from there"
            )

    def _payload(self, top: dict[str, Any]) -> bytes:
        """The signed text of a bundle. Raises: _Invalid if this key did not sign it, ValueError and its like."""
        from cryptography.exceptions import InvalidSignature

        envelope = top["dsseEnvelope"]
        if top["mediaType"] != BUNDLE_TYPE or envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"a {top['mediaType']!r:.80} of {envelope['payloadType']!r:.80}")
        (signed,) = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        try:
            signature = base64.b64decode(signed["sig"], validate=True)
            self._key.verify(signature, _signed_bytes(payload), _algorithm(self._key))
        except InvalidSignature:
            raise _Invalid from None
        return payload


class _Invalid(Exception):
    """The signature does not match."""


def _bundle_bytes_max(body: bytes) -> int:
    return 8 * len(body) + BUNDLE_BYTES_SPARE


def _statement(name: str, resources: Sequence[tuple[str, str]], annotations: Mapping[str, str]) -> dict[str, Any]:
    """What is signed. Source: in-toto Statement v1; OpenSSF Model Signing 1.0, sections 5 and 6."""
    if not resources:
        raise UsageError(f"{name}: no file that a signature could be about")
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in resources)).hexdigest()
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {
                "name": name,
                "digest": {"sha256": root},
                "annotations": dict(annotations),
            }
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(IGNORED),
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": digest} for path, digest in resources],
        },
    }  # fmt: skip


def signed_files(manifest: Manifest) -> list[tuple[str, str]]:
    """(path, sha256) of the files that a bundle lists, in the order of their paths."""
    return [(file.path, file.sha256) for file in manifest.files if file.path.partition("/")[0] not in IGNORED]


def _signed_bytes(payload: bytes) -> bytes:
    """What a signature is made over. Source: DSSE 1.0, "PAE"."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _algorithm(key: ec.EllipticCurvePublicKey) -> ec.ECDSA:
    curves, hashes = _cryptography("asymmetric.ec"), _cryptography("hashes")
    made: ec.ECDSA = curves.ECDSA(getattr(hashes, _CURVES[key.curve.name])())
    return made


def parse_public_key(body: bytes, what: str) -> ec.EllipticCurvePublicKey:
    """A key to check signatures with. body: PEM. what: the key, in errors. Raises: ConfigError if it is none."""
    try:
        key = _cryptography("serialization").load_pem_public_key(body)
    except ValueError as error:
        raise ConfigError(f"{what} cannot be read: {error}") from None
    _check_curve(key, what)
    return key  # type: ignore[no-any-return]


def _check_curve(key: Any, what: str) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        raise ConfigError(
            f"{what} is {curve or type(key).__name__}: expected an elliptic-curve key on P-256, P-384 or "
            f"P-521, as made by openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
        )


def _fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    serialization = _cryptography("serialization")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _key_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            body = file.read(KEY_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"key {path} cannot be read: {error.strerror}") from error
    if len(body) > KEY_BYTES_MAX:
        raise ConfigError(f"key {path} is longer than {KEY_BYTES_MAX} bytes: not a key")
    return body


def _cryptography(module: str) -> Any:
    """A module of `cryptography.hazmat.primitives`. Raises: ConfigError if it is not installed."""
    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.{module}")
    except ImportError:
        raise ConfigError("signatures need the package cryptography: pip install 'mfs[sign]'") from None

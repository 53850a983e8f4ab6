"""Bundles over manifests: who accepts them, and that nothing changed or brought from elsewhere passes."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from mfs.errors import AccessError, ConfigError, IntegrityError, UsageError
from mfs.registry import chunk
from mfs.registry.manifest import Chunk, File, Manifest
from mfs.registry.signing import Signer, Verifier
from mfs.registry.web_store import open_place
from mfs.sources.options import SourceOptions
from tests.registry.keys import KeyPair, make_keys
from tests.registry.made import soon
from tests.registry.places import FolderPlace, S3Place
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

FILES = {
    "config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "tokenizer/a.json": b"[1]",
    "tokenizer-b.json": b"[2]", ".gitattributes": b"*.safetensors filter=lfs\n", "empty": b"", "名 前.txt": b"name",
}  # fmt: skip


def manifest_of(files: dict[str, bytes]) -> bytes:
    """The manifest of a model with these files, each one chunk."""
    chunks, made = [], []
    for path, content in sorted(files.items()):
        indexes: tuple[int, ...] = ()
        if content:
            chunk_id = chunk.chunk_id(len(content), chunk.digests_of(memoryview(content)))
            indexes = (len(chunks),)
            chunks.append(Chunk(chunk_id, len(content), len(content) + 104))
        made.append(File(path, len(content), hashlib.sha256(content).hexdigest(), indexes))
    return Manifest("2026-11-29T12:00:00Z", tuple(chunks), tuple(made)).encode()


BODY = manifest_of(FILES)


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return make_keys(tmp_path, "key")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: str(curve.name))
def test_what_is_signed_is_accepted(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    pair = make_keys(tmp_path, "key", curve=curve)
    signer, verifier = Signer(pair.private), Verifier(pair.public)
    verifier.check_bundle(signer.sign("llama", BODY), "llama", BODY)
    assert signer.fingerprint == verifier.fingerprint == hashlib.sha256(pair.public.read_bytes()).hexdigest()


def model_signing(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The reference implementation, as people run it."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_reference_implementation_accepts_it(tmp_path: Path, keys: KeyPair) -> None:
    folder, bundle = tmp_path / "llama", tmp_path / "llama.sig"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    bundle.write_bytes(Signer(keys.private).sign("llama", BODY))
    verify = ("verify", "key", folder, "--signature", bundle, "--public_key", keys.public)
    done = model_signing(*verify)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "config.json").write_bytes(b"{ }")
    assert model_signing(*verify).returncode != 0


def changed(bundle: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A bundle whose signed text was changed, and nothing else."""
    top = json.loads(bundle)
    statement = json.loads(base64.b64decode(top["dsseEnvelope"]["payload"]))
    change(statement)
    top["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(top).encode()


class TestRefused:
    def test_another_manifest(self, keys: KeyPair) -> None:
        other = manifest_of(FILES | {"config.json": b"{ }"})
        bundle = Signer(keys.private).sign("llama", BODY)
        with pytest.raises(IntegrityError, match="was brought here from there"):
            Verifier(keys.public).check_bundle(bundle, "llama", other)

    def test_equal_files_cut_into_other_chunks(self, keys: KeyPair) -> None:
        """Whoever reads by range trusts the chunks: digests of whole files alone must not be enough."""
        manifest = json.loads(BODY)
        manifest["chunks"][0][0] = "0" * 64
        bundle = Signer(keys.private).sign("llama", BODY)
        with pytest.raises(IntegrityError):
            Verifier(keys.public).check_bundle(bundle, "llama", json.dumps(manifest).encode())

    def test_the_same_revision_under_another_name(self, keys: KeyPair) -> None:
        bundle = Signer(keys.private).sign("llama-tiny", BODY)
        with pytest.raises(IntegrityError, match="is for 'llama-tiny'@sha256:"):
            Verifier(keys.public).check_bundle(bundle, "llama", BODY)

    def test_another_key(self, tmp_path: Path, keys: KeyPair) -> None:
        bundle = Signer(make_keys(tmp_path, "other").private).sign("llama", BODY)
        with pytest.raises(IntegrityError, match="was not made with"):
            Verifier(keys.public).check_bundle(bundle, "llama", BODY)

    def test_another_text_under_a_good_signature(self, keys: KeyPair) -> None:
        def rename(statement: dict[str, Any]) -> None:
            statement["subject"][0]["annotations"]["mfs.model"] = "llama"

        bundle = changed(Signer(keys.private).sign("llama-tiny", BODY), rename)
        with pytest.raises(IntegrityError, match="was not made with"):
            Verifier(keys.public).check_bundle(bundle, "llama", BODY)

    def test_a_bundle_of_the_reference_implementation_over_the_files(self, tmp_path: Path, keys: KeyPair) -> None:
        """It says nothing of a manifest, so no reader by range can use it."""
        folder, bundle = tmp_path / "llama", tmp_path / "model.sig"
        folder.mkdir()
        (folder / "config.json").write_bytes(b"{}")
        done = model_signing("sign", "key", folder, "--signature", bundle, "--private_key", keys.private)
        assert done.returncode == 0, done.stdout + done.stderr
        with pytest.raises(IntegrityError, match=r"is for None@None"):
            Verifier(keys.public).check_bundle(bundle.read_bytes(), "llama", manifest_of({"config.json": b"{}"}))

    @pytest.mark.parametrize(
        "bundle",
        [b"", b"null", b"[]", b"{}", b'{"dsseEnvelope": 1}', b"\xff", b"[" * 50_000,
         b'{"mediaType": 1, "dsseEnvelope": {"payloadType": "x"}}'],
    )  # fmt: skip
    def test_what_is_no_bundle(self, keys: KeyPair, bundle: bytes) -> None:
        with pytest.raises(IntegrityError, match="is no bundle") as caught:
            Verifier(keys.public).check_bundle(bundle, "llama", BODY)
        assert len(str(caught.value)) < 500

    def test_one_that_is_too_long_to_be_parsed(self, keys: KeyPair) -> None:
        with pytest.raises(IntegrityError, match="has 1000000 bytes, for a manifest of"):
            Verifier(keys.public).check_bundle(b" " * 1_000_000, "llama", BODY)

    @pytest.mark.parametrize("count", [0, 2])
    def test_not_exactly_one_signature(self, keys: KeyPair, count: int) -> None:
        top = json.loads(Signer(keys.private).sign("llama", BODY))
        top["dsseEnvelope"]["signatures"] *= count
        with pytest.raises(IntegrityError, match="is no bundle"):
            Verifier(keys.public).check_bundle(json.dumps(top).encode(), "llama", BODY)

    def test_a_signature_for_something_else_by_the_same_key(self, keys: KeyPair) -> None:
        bundle = json.loads(Signer(keys.private).sign("llama", BODY))
        bundle["dsseEnvelope"]["payloadType"] = "text/plain"
        with pytest.raises(IntegrityError, match="is no bundle"):
            Verifier(keys.public).check_bundle(json.dumps(bundle).encode(), "llama", BODY)


class TestKeys:
    def test_one_with_a_password(self, tmp_path: Path) -> None:
        pair = make_keys(tmp_path, "key", password=b"hush")
        Verifier(pair.public).check_bundle(Signer(pair.private, "hush").sign("llama", BODY), "llama", BODY)
        with pytest.raises(ConfigError, match="wants a password: set MFS_KEY_PASSWORD"):
            Signer(pair.private)
        with pytest.raises(ConfigError, match="cannot be read"):
            Signer(pair.private, "hash")
        with pytest.raises(ConfigError, match="has no password: unset MFS_KEY_PASSWORD"):
            Signer(make_keys(tmp_path, "open").private, "hush")

    def test_the_wrong_half(self, keys: KeyPair) -> None:
        with pytest.raises(ConfigError, match="is a public key; signing needs the private one"):
            Signer(keys.public)
        with pytest.raises(ConfigError, match=r"is a private key, .*openssl pkey -in .* -pubout"):
            Verifier(keys.private)

    def test_what_is_no_key(self, tmp_path: Path) -> None:
        for content in (b"", b"ssh-ed25519 AAAA me\n", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"x" * (2 << 20)):
            file = tmp_path / "key"
            file.write_bytes(content)
            for kind in (Signer, Verifier):
                with pytest.raises(ConfigError, match=str(file)):
                    kind(file)
        with pytest.raises(ConfigError, match="No such file"):
            Verifier(tmp_path / "none")

    def test_other_algorithms(self, tmp_path: Path) -> None:
        for options in (["ED25519"], ["RSA"], ["EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"]):
            private, public = tmp_path / "key.pem", tmp_path / "key.pub"
            subprocess.run(
                ["openssl", "genpkey", "-algorithm", *options, "-out", private], check=True, capture_output=True
            )
            subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
            with pytest.raises(ConfigError, match="expected an elliptic-curve key"):
                Signer(private)
            with pytest.raises(ConfigError, match="expected an elliptic-curve key"):
                Verifier(public)

    def test_without_the_package(self, keys: KeyPair) -> None:
        program = (
            "import sys; sys.modules['cryptography'] = None\n"
            "from pathlib import Path\nfrom mfs.registry.signing import Verifier\n"
            f"try: Verifier(Path({str(keys.public)!r}))\nexcept Exception as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "signatures need the package cryptography: pip install 'mfs[sign]'\n"


def test_the_vector() -> None:
    """What FORMAT.md describes, as it was written once and must be read for ever."""
    folder = Path(__file__).parent / "vectors" / "signature"
    body = (folder / "manifest.json").read_bytes()
    Verifier(folder / "key.pub").check_bundle((folder / "model.sig").read_bytes(), "llama", body)
    with pytest.raises(IntegrityError):
        Verifier(folder / "key.pub").check_bundle((folder / "model.sig").read_bytes(), "alpaca", body)


def test_nothing_to_vouch_for(keys: KeyPair) -> None:
    with pytest.raises(UsageError, match="no file that a signature could be about"):
        Signer(keys.private).sign("llama", manifest_of({".gitattributes": b""}))


class TestInAStore:
    """`Signer.put` and `Verifier.check` over what a registry stands on."""

    @pytest.fixture(params=["folder", "s3"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path, swift: SwiftServer, s3_bucket: str,
              monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderPlace | S3Place]:  # fmt: skip
        if request.param == "folder":
            yield FolderPlace(tmp_path / "reg")
            return
        place = S3Place(swift, s3_bucket, monkeypatch)
        yield place
        place.close()

    def test_signed_by_two_keys(self, tmp_path: Path, place: FolderPlace | S3Place) -> None:
        """As while a key is exchanged for another."""
        store = place.store()
        for name in ("old", "new", "new"):
            pair = KeyPair(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub")
            pair = pair if pair.public.exists() else make_keys(tmp_path, name)
            Signer(pair.private).put(store, "llama", BODY, deadline_s=soon())
        for name in ("old", "new"):
            Verifier(tmp_path / f"{name}.pub").check(store, "llama", BODY, deadline_s=soon())
        store.close()

    def test_what_is_missing_or_wrong(self, tmp_path: Path, keys: KeyPair, place: FolderPlace | S3Place) -> None:
        store, verifier = place.store(), Verifier(keys.public)
        with pytest.raises(AccessError, match=r"llama@sha256:[0-9a-f]{12}: not signed; .*'mfs sign' adds one"):
            verifier.check(store, "llama", BODY, deadline_s=soon())
        other = Signer(make_keys(tmp_path, "other").private)
        brought = other.put(store, "llama", BODY, deadline_s=soon())
        with pytest.raises(AccessError, match=rf"signed by another key \({other.fingerprint[:12]}\), not by"):
            verifier.check(store, "llama", BODY, deadline_s=soon())
        place.put(brought.replace(other.fingerprint, verifier.fingerprint), place.get(brought) or b"")
        with pytest.raises(IntegrityError, match="was not made with"):
            verifier.check(store, "llama", BODY, deadline_s=soon())
        store.close()

    def test_read_from_a_web_server(self, tmp_path: Path, keys: KeyPair, nginx: NginxServer) -> None:
        root = nginx.files / uuid.uuid4().hex
        root.mkdir()
        store, written = open_place(f"{nginx.url}{root.name}", SourceOptions()), FolderPlace(root).store()
        with pytest.raises(AccessError, match="not signed"):
            Verifier(keys.public).check(store, "llama", BODY, deadline_s=soon())
        other = make_keys(tmp_path, "other")
        Signer(other.private).put(written, "llama", BODY, deadline_s=soon())
        with pytest.raises(AccessError, match="signed by another key"):
            Verifier(keys.public).check(store, "llama", BODY, deadline_s=soon())
        Verifier(other.public).check(store, "llama", BODY, deadline_s=soon())
        store.close()

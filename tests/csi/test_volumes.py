"""Publish, read, unpublish: what the kubelet asks of the driver, in every order."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mfs.csi import csi_pb2 as csi
from mfs.csi.server import DRIVER
from tests.csi.conftest import FILES
from tests.csi.driver import MODES, Driver, publish_request, wait_for, workload
from tests.mount import touching
from tests.registry.keys import make_keys


def refused(call: Callable[..., Any], *arguments: Any, **more: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **more)
    return caught.value.code(), caught.value.details()


def test_who_we_are(driver: Driver) -> None:
    info = driver.identity.GetPluginInfo(csi.GetPluginInfoRequest())
    assert info.name == DRIVER
    assert info.vendor_version
    assert not driver.identity.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest()).capabilities
    assert driver.node.NodeGetInfo(csi.NodeGetInfoRequest()).node_id == "node-1"
    kinds = [each.rpc.type for each in driver.node.NodeGetCapabilities(csi.NodeGetCapabilitiesRequest()).capabilities]
    assert kinds == [csi.NodeServiceCapability.RPC.GET_VOLUME_STATS, csi.NodeServiceCapability.RPC.VOLUME_CONDITION]


def test_from_publish_to_unpublish_and_everything_twice(driver: Driver, models: Path) -> None:
    driver.unpublish("a")  # of what was never there
    for _ in range(2):
        target = driver.publish("a", {"source": str(models)})
        assert driver.pod_mounts == ["a"]
    with workload(target) as (pod, inside):
        assert pod.call(touching.read, f"{inside}/llama/w.bin") == FILES["llama/w.bin"]
        assert pod.call(touching.failure, "mkdir", f"{inside}/x") == "EROFS"
    [pid] = driver.pids
    for _ in range(2):
        driver.unpublish("a")
        assert driver.pod_mounts == []
        assert not target.exists()
    assert driver.keys == []
    assert driver.left() == []
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_volumes_that_are_alike_share_a_daemon(driver: Driver, models: Path) -> None:
    alike = [driver.publish(name, {"source": str(models)}) for name in ("a", "b")]
    assert len(driver.pids) == 1
    other = driver.publish("c", {"source": str(models), "ramSize": "64M", "timeout": "7s"})
    assert len(driver.pids) == 2
    driver.unpublish("a")
    for target in (alike[1], other):
        with workload(target) as (pod, inside):
            assert pod.call(touching.digest, f"{inside}/llama/w.bin")
    driver.unpublish("b")
    driver.unpublish("c")
    assert driver.keys == []
    assert driver.left() == []


def test_stats_and_condition(driver: Driver, models: Path) -> None:
    target = driver.publish("a", {"source": str(models)})
    with workload(target) as (pod, inside):
        pod.call(touching.tree, inside)
    found = driver.stats("a")
    assert not found.volume_condition.abnormal
    units = {usage.unit: usage.total for usage in found.usage}
    assert units[csi.VolumeUsage.BYTES] == sum(map(len, FILES.values()))
    assert units[csi.VolumeUsage.INODES] >= len(FILES)
    assert refused(driver.stats, "b")[0] is grpc.StatusCode.NOT_FOUND
    driver.unpublish("a")
    assert refused(driver.stats, "a")[0] is grpc.StatusCode.NOT_FOUND


def test_other_arguments_at_the_same_place(driver: Driver, models: Path) -> None:
    driver.publish("a", {"source": str(models)})
    code, said = refused(driver.publish, "a", {"source": str(models), "timeout": "9s"})
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "unpublish it first" in said
    assert driver.pod_mounts == ["a"]


def test_what_cannot_be_published(driver: Driver, models: Path) -> None:
    """Each with the code that the specification has for it, a line that says what to do, and nothing left."""

    def request(change: Callable[[Any], None]) -> csi.NodePublishVolumeRequest:
        made = publish_request("a", str(driver.pods / "a"), {"source": str(models)}, {})
        change(made)
        return made

    def context(**attributes: str) -> Callable[[Any], None]:
        return lambda made: made.volume_context.update(attributes)

    def secrets(**given: str) -> Callable[[Any], None]:
        return lambda made: made.secrets.update(given)

    block = csi.VolumeCapability(
        block=csi.VolumeCapability.BlockVolume(), access_mode=MODES(mode=MODES.SINGLE_NODE_WRITER)
    )
    wrong: list[tuple[Callable[[Any], Any], str]] = [
        (lambda made: made.ClearField("volume_id"), "volume_id is missing"),
        (lambda made: setattr(made, "volume_id", "x" * 129), "longer than 128"),
        (lambda made: made.ClearField("target_path"), "target_path is missing"),
        (lambda made: setattr(made, "target_path", "pods/a"), "absolute path"),
        (lambda made: setattr(made, "target_path", "/pods/../a"), "without"),
        (lambda made: made.ClearField("volume_capability"), "volume_capability is missing"),
        (lambda made: made.volume_capability.CopyFrom(block), "no block devices"),
        (lambda made: made.volume_capability.ClearField("access_mode"), "no access mode"),
        (lambda made: setattr(made, "readonly", False), "readOnly: true"),
        (lambda made: setattr(made.volume_capability.mount, "fs_type", "ext4"), "leave it out"),
        (lambda made: made.volume_capability.mount.mount_flags.append("exec=1"), "not known"),
        (lambda made: made.volume_context.pop("source"), "source is missing"),
        (context(source="ftp://x/y"), "not a source"),
        (context(source="/etc"), "no sources"),
        (context(source=f"{models}/../.."), "no sources"),
        (context(source="mfs+file:///etc/x/y"), "no sources"),
        (context(source="https://me:hush@host/x/"), "Secret"),
        (context(profile="admin"), "'profile' is not known"),
        (context(ramSize="64G"), "allows 64M"),
        (context(ramSize="lots"), "not a size"),
        (context(ramSize="1K"), "at least"),
        (context(unsigned="yes"), "true or false"),
        (context(umask="9"), "octal"),
        (context(roleArn="arn:aws:iam::1:role/x"), "tokenRequests"),
        (context(source="hf://a/b", endpointUrl="nowhere"), "endpoint_url"),
        (context(via="cache:8080"), "via is 'cache:8080': expected http://host:port"),
        (context(via="http://a:1", dragonfly="http://b:1"), "both set"),
        (context(source="mfs+s3://b/r", requireSignature="bm8ga2V5"), "requireSignature: the key cannot be read"),
        (
            context(requireSignature=make_keys(models.parent, "key").public.read_text().replace("\n", " ")),
            "of a registry",
        ),
        (secrets(AWS_ACCESS_KEY_ID="hush"), "belong together"),
        (secrets(PASSWORD="hush"), "'PASSWORD' is not known"),
        (secrets(HF_TOKEN="hu\nsh"), "control characters"),
    ]
    for change, words in wrong:
        code, said = refused(driver.node.NodePublishVolume, request(change), timeout=30)
        assert (code, words in said) == (grpc.StatusCode.INVALID_ARGUMENT, True), said
        assert "hush" not in said
    missing = {"source": str(models / "none")}
    assert refused(driver.publish, "a", missing)[0] in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
    for asked in (csi.NodeUnpublishVolumeRequest(volume_id="a"), csi.NodeUnpublishVolumeRequest(target_path="/x")):
        assert refused(driver.node.NodeUnpublishVolume, asked)[0] is grpc.StatusCode.INVALID_ARGUMENT
    nothing = csi.NodeGetVolumeStatsRequest(volume_id="a")
    assert refused(driver.node.NodeGetVolumeStats, nothing)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert driver.pod_mounts == []
    assert driver.keys == []
    assert driver.left() == []
    assert "hush" not in driver.log


def test_links_in_a_folder_do_not_lead_out_of_what_is_allowed(driver: Driver, models: Path) -> None:
    (models.parent / "node").mkdir()
    (models.parent / "node" / "key").write_text("canary")
    (models / "team" / "m").mkdir(parents=True)
    (models / "team" / "m" / "config.json").write_text("{}")
    (models / "team" / "key").symlink_to(models.parent / "node" / "key")
    (models / "team" / "node").symlink_to("../../node")
    (models / "team" / "latest").symlink_to("m")
    (models / "link").symlink_to("team")
    for name, source in (("a", "team"), ("b", "link")):
        driver.publish(name, {"source": str(models / source)})
        assert sorted(os.listdir(driver.pods / name)) == ["latest", "m"]
        assert (driver.pods / name / "latest" / "config.json").read_text() == "{}"
    (models / "link").unlink()
    (models / "link").symlink_to(models.parent / "node")
    assert "no sources" in refused(driver.publish, "c", {"source": str(models / "link")})[1]


def test_calls_about_one_target_at_once(driver: Driver, models: Path) -> None:
    """One is done; others are done after it, or told to come again."""
    request = publish_request("a", str(driver.pods / "a"), {"source": str(models)}, {})
    calls = [driver.node.NodePublishVolume.future(request, timeout=60) for _ in range(8)]
    codes = [call.code() for call in calls]
    assert grpc.StatusCode.OK in codes
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.ABORTED}
    assert driver.pod_mounts == ["a"]


def test_many_volumes_at_once(driver: Driver, models: Path) -> None:
    names = [f"v{number}" for number in range(12)]

    def asked(name: str) -> csi.NodePublishVolumeRequest:
        return publish_request(name, str(driver.pods / name), {"source": str(models)}, {})

    calls = [driver.node.NodePublishVolume.future(asked(name), timeout=60) for name in names]
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    assert driver.pod_mounts == sorted(names)
    assert len(driver.pids) == 1
    requests = [csi.NodeUnpublishVolumeRequest(volume_id=name, target_path=str(driver.pods / name)) for name in names]
    ends = [driver.node.NodeUnpublishVolume.future(request, timeout=60) for request in requests]
    assert {call.code() for call in ends} == {grpc.StatusCode.OK}
    assert driver.keys == []
    assert driver.left() == []


def test_calls_that_wait_do_not_keep_us_from_saying_that_we_live(driver: Driver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = {"source": f"http://127.0.0.1:{silent.getsockname()[1]}/x/", "timeout": "1h"}
        requests = [publish_request(name, str(driver.pods / name), source, {}) for name in map(str, range(40))]
        calls = [driver.node.NodePublishVolume.future(request, timeout=40) for request in requests]
        assert wait_for(lambda: sum(call.done() for call in calls) >= 16)  # there is no place for them
        assert driver.identity.Probe(csi.ProbeRequest(), timeout=20).ready.value
        refused_now = [call for call in calls if call.done()]
        assert {call.code() for call in refused_now} == {grpc.StatusCode.ABORTED}
        assert len(refused_now) < len(calls)
        for call in calls:
            call.cancel()


def test_what_a_call_could_not_end_is_ended_later(driver: Driver, models: Path) -> None:
    driver.publish("a", {"source": str(models)})
    [noted] = (driver.place / "state" / "volumes").iterdir()
    noted.unlink()  # as a call does whose next step, ending the daemon, then fails
    assert wait_for(lambda: driver.keys == [])

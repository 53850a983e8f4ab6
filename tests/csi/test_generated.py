"""What is generated is of the proto beside it, and says on the wire what the specification says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mfs.csi import csi_pb2 as csi

ROOT = Path(__file__).parents[2]


def test_the_files_are_of_this_proto(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", f"--python_out={tmp_path}",
         f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", "mfs/csi/csi.proto"],
        cwd=ROOT, check=True, timeout=60,
    )  # fmt: skip
    for name in ("csi_pb2.py", "csi_pb2.pyi", "csi_pb2_grpc.py"):
        assert (tmp_path / "mfs" / "csi" / name).read_text() == (ROOT / "mfs" / "csi" / name).read_text(), (
            f"{name}: run tools/csi"
        )


def test_numbers_of_the_specification() -> None:
    """Fields by hand from csi.proto of version 1.12: a request of the kubelet's, byte for byte."""
    request = csi.NodePublishVolumeRequest(
        volume_id="v", target_path="/t", readonly=True, secrets={"k": "s"}, volume_context={"a": "b"},
        volume_capability=csi.VolumeCapability(
            mount=csi.VolumeCapability.MountVolume(fs_type="f", mount_flags=["ro"]),
            access_mode=csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY),
        ),
    )  # fmt: skip
    capability = b"\x12\x07\x0a\x01f\x12\x02ro" + b"\x1a\x02\x08\x03"
    expected = b"\x0a\x01v" + b"\x22\x02/t" + b"\x2a%c%b" % (len(capability), capability) + b"\x30\x01"
    expected += b"\x3a\x06\x0a\x01k\x12\x01s" + b"\x42\x06\x0a\x01a\x12\x01b"
    assert request.SerializeToString(deterministic=True) == expected
    usage = csi.VolumeUsage(available=1, total=2, used=3, unit=csi.VolumeUsage.BYTES)
    stats = csi.NodeGetVolumeStatsResponse(
        usage=[usage], volume_condition=csi.VolumeCondition(abnormal=True, message="m")
    )
    assert stats.SerializeToString() == (b"\x0a\x08\x08\x01\x10\x02\x18\x03\x20\x01" + b"\x12\x05\x08\x01\x12\x01m")
    names = {number: name for name, number in csi.NodeServiceCapability.RPC.Type.items()}
    assert names == {
        0: "UNKNOWN", 1: "STAGE_UNSTAGE_VOLUME", 2: "GET_VOLUME_STATS", 3: "EXPAND_VOLUME", 4: "VOLUME_CONDITION",
        5: "SINGLE_NODE_MULTI_WRITER", 6: "VOLUME_MOUNT_GROUP",
    }  # fmt: skip
    assert csi.DESCRIPTOR.services_by_name["Node"].full_name == "csi.v1.Node"

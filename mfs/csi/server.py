"""The gRPC door: messages in, `mfs.csi.node` does it, errors out as the specification's codes.

What is logged of a call is its name, volume and outcome: never its context or its secrets.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import grpc

from mfs import __version__
from mfs.csi import csi_pb2 as csi
from mfs.csi import csi_pb2_grpc as services
from mfs.csi.node import BusyError, Node, TakenError
from mfs.errors import (
    AccessError,
    ConfigError,
    MfsError,
    NotFoundError,
    RoomError,
    StoreError,
    UsageError,
)
from mfs.shown import clean

log = logging.getLogger(__name__)

DRIVER = "csi.mfs.dev"
"""Name of the driver, as the CSIDriver object has it."""
_THREADS, _CALLS_MAX = 64, 128  # more than calls that wait, see `node`: whether we live is always answered
_MESSAGE_BYTES_MAX = 4 << 20
_GRACE_S = 10.0
_CODES: tuple[tuple[type[MfsError], grpc.StatusCode], ...] = (
    (BusyError, grpc.StatusCode.ABORTED),
    (TakenError, grpc.StatusCode.ALREADY_EXISTS),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (RoomError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (StoreError, grpc.StatusCode.UNAVAILABLE),
)
_READERS = {
    csi.VolumeCapability.AccessMode.SINGLE_NODE_READER_ONLY,
    csi.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY,
}
_FLAGS = {"ro", "nosuid", "nodev"}
"""Mount flags that say what is so anyway."""
_FS_TYPES = {"", "fuse.mfs", "mfs"}


class IdentityService(services.IdentityServicer):
    """Who we are."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=DRIVER, vendor_version=__version__)

    def GetPluginCapabilities(
        self, request: csi.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginCapabilitiesResponse:
        return csi.GetPluginCapabilitiesResponse()

    def Probe(self, request: csi.ProbeRequest, context: grpc.ServicerContext) -> csi.ProbeResponse:
        answer = csi.ProbeResponse()
        answer.ready.value = self._node.is_ready
        return answer


class NodeService(services.NodeServicer):
    """Volumes on this node."""

    def __init__(self, node: Node, node_id: str) -> None:
        self._node = node
        self._node_id = node_id

    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        with _answered("publish", request.volume_id, context):
            _check_capability(request)
            self._node.publish(
                request.volume_id, request.target_path, _arguments(request), dict(request.volume_context),
                dict(request.secrets), patience_s=context.time_remaining(),
            )  # fmt: skip
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        with _answered("unpublish", request.volume_id, context):
            self._node.unpublish(request.volume_id, request.target_path)
        return csi.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetVolumeStatsResponse:
        with _answered("stats", request.volume_id, context, is_quiet=True):
            if not request.volume_id or not request.volume_path:
                raise UsageError("volume_id and volume_path are both needed")
            found = self._node.stats(request.volume_id, request.volume_path)
        answer = csi.NodeGetVolumeStatsResponse()
        answer.volume_condition.abnormal = bool(found.fault)
        answer.volume_condition.message = found.words
        if found.fault not in ("unanswered", "stale"):
            for unit, count in (
                (csi.VolumeUsage.BYTES, found.files_bytes), (csi.VolumeUsage.INODES, found.files_count)
            ):  # fmt: skip
                answer.usage.add(unit=unit, total=count, used=count, available=0)
        return answer

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetCapabilitiesResponse:
        answer = csi.NodeGetCapabilitiesResponse()
        for kind in (csi.NodeServiceCapability.RPC.GET_VOLUME_STATS, csi.NodeServiceCapability.RPC.VOLUME_CONDITION):
            answer.capabilities.add().rpc.type = kind
        return answer

    def NodeGetInfo(self, request: csi.NodeGetInfoRequest, context: grpc.ServicerContext) -> csi.NodeGetInfoResponse:
        return csi.NodeGetInfoResponse(node_id=self._node_id)


def _check_capability(request: csi.NodePublishVolumeRequest) -> None:
    """Raises: UsageError unless a read-only file system is wanted."""
    if not request.HasField("volume_capability"):
        raise UsageError("volume_capability is missing")
    capability = request.volume_capability
    if capability.WhichOneof("access_type") != "mount":
        raise UsageError("volume_capability wants no file system: volumes of this driver are no block devices")
    mode = capability.access_mode.mode
    if mode == csi.VolumeCapability.AccessMode.UNKNOWN:
        raise UsageError("volume_capability has no access mode")
    if not request.readonly and mode not in _READERS:
        raise UsageError("volumes of this driver are read-only: set readOnly: true")
    if capability.mount.fs_type not in _FS_TYPES:
        raise UsageError(f"fs_type is {capability.mount.fs_type!r:.40}: leave it out")
    flags = sorted(set(capability.mount.mount_flags) - _FLAGS)
    if flags:
        raise UsageError(f"mount flag {flags[0]!r:.40} is not known: expected some of {', '.join(sorted(_FLAGS))}")


def _arguments(request: csi.NodePublishVolumeRequest) -> str:
    """What a second publish at the same place is compared by, beside the context."""
    capability = request.volume_capability
    return f"{request.readonly} {capability.access_mode.mode} {sorted(capability.mount.mount_flags)}"


@contextmanager
def _answered(name: str, volume_id: str, context: grpc.ServicerContext, *, is_quiet: bool = False) -> Iterator[None]:
    """Errors within become the call's status."""
    began_s = time.monotonic()
    shown = clean(volume_id)[:128]
    try:
        yield
    except MfsError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
        log.warning("%s of volume %s: %s: %s", name, shown, code.name, error)
        _refuse(context, code, str(error))
    except Exception as error:
        log.exception("%s of volume %s failed", name, shown)
        _refuse(
            context, grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; the driver's log says more"
        )
    else:
        if not is_quiet:
            log.info("%s of volume %s: done in %.2f s", name, shown, time.monotonic() - began_s)


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, details: str) -> NoReturn:
    context.abort(code, details)
    raise AssertionError("abort raises")


def serve(node: Node, node_id: str, endpoint: str) -> grpc.Server:
    """A server that answers at `endpoint`, 'unix:///path'. Raises: ConfigError, UsageError if it cannot."""
    path = _socket_path(endpoint)
    _clear_away(path)
    server = grpc.server(
        ThreadPoolExecutor(_THREADS), maximum_concurrent_rpcs=_CALLS_MAX,
        options=[("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX), ("grpc.so_reuseport", 0)],
    )  # fmt: skip
    services.add_IdentityServicer_to_server(IdentityService(node), server)
    services.add_NodeServicer_to_server(NodeService(node, node_id), server)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        server.start()
    except RuntimeError as error:
        raise ConfigError(f"--endpoint {endpoint}: cannot be listened at") from error
    finally:
        os.umask(before)
    return server


def stop(server: grpc.Server) -> None:
    """Answer what is under way, for some seconds, and nothing more."""
    server.stop(_GRACE_S).wait()


def _socket_path(endpoint: str) -> Path:
    path = endpoint.removeprefix("unix://")
    if path == endpoint or not path.startswith("/"):
        raise UsageError(f"--endpoint is {endpoint!r}: expected unix:///path/to/csi.sock")
    return Path(path)


def _clear_away(path: Path) -> None:
    """Remove the socket of a driver that was killed. Raises: ConfigError if one answers there."""
    if not path.parent.is_dir():
        raise ConfigError(f"--endpoint: {path.parent} is no directory: create it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"--endpoint: {path}: {error.strerror}") from error
    raise ConfigError(f"--endpoint: somebody answers at {path} already")

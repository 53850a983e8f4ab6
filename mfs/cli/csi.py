"""`mfs csi` and `mfs keep`: what runs on each node of a Kubernetes cluster."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mfs.cli.page import Page
from mfs.cli.values import SIZE
from mfs.errors import ConfigError

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command(
    cls=Page,
    short_help="Serve volumes to Kubernetes: a CSI node driver.",
    sections={
        "Examples": """\
mfs csi --endpoint unix:///csi/csi.sock --node-id "$NODE" --state-dir /var/lib/mfs/csi \\
        --cache-dir /nvme/mfs --keeper /run/mfs/keeper.sock""",
        "Volume attributes": """\
source           a URL as 'mfs mount' takes it; required
endpointUrl, region, unsigned, requesterPays, layout, roleArn
via, dragonfly   a cache that nodes share, for this volume
requireSignature a public key itself, as PEM without line breaks: of a registry, show
                 only what was signed with it
cacheSize, ramSize, timeout, refresh, connections, materialize, uid, gid, umask
     as the options of 'mfs mount' of these names; sizes up to the node's
     readOnly: true must be set. Folders of the node are refused, other than
     below --folders.""",
        "Secrets": """\
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN    S3
HF_TOKEN                                                       the Hub
.dockerconfigjson                                              OCI registries
username, password                                             HTTP
     They reach the volume's daemon as files in memory. A Secret that was rotated is
     used from the next publish on, which the kubelet repeats (requiresRepublish).""",
        "Daemons": """\
Volumes of one source, with the same attributes and secrets, share a daemon and its
caches; with secrets, only within a namespace. Daemons outlive this driver: the next one
finds them. Where they are killed with it, as when its pod is replaced, it takes their
mounts up from what 'mfs keep' holds, and readers wait meanwhile (Linux 6.9).""",
        "Needs": "pip install 'mfs[csi]'; root, /dev/fuse, mounts that propagate to the host.",
    },
)
@click.option("--endpoint", required=True, metavar="unix:///PATH", help="Where the kubelet asks.")
@click.option("--node-id", required=True, help="Name of this node.")
@click.option("--state-dir", required=True, type=_DIRECTORY, help="What is published, and the daemons' mount points.")
@click.option("--secrets-dir", type=_DIRECTORY, help="Where secrets stand, on tmpfs.  [the runtime directory's 'csi']")
@click.option("--cache-dir", type=_DIRECTORY, help="Below which volumes have their SSD caches.")
@click.option("--cache-size", type=SIZE, default="100G", show_default=True, help="Budget of each of them.")
@click.option("--ram-size", type=SIZE, default="1G", show_default=True, help="RAM tier of a daemon, at most.")
@click.option("--folders", type=_DIRECTORY, multiple=True, help="Let volumes be folders below this one; repeatable.")
@click.option("--via", metavar="URL", help="A cache that nodes share, for volumes that name none: see 'mfs mount'.")
@click.option("--dragonfly", metavar="URL", help="The same, where it is Dragonfly's dfdaemon.")
@click.option("--keeper", type=click.Path(path_type=Path), help="Socket of 'mfs keep'.")
def csi(
    endpoint: str,
    node_id: str,
    state_dir: Path,
    secrets_dir: Path | None,
    cache_dir: Path | None,
    cache_size: int,
    ram_size: int,
    folders: tuple[Path, ...],
    via: str | None,
    dragonfly: str | None,
    keeper: Path | None,
) -> None:
    """Serve CSI's Identity and Node services at a Unix socket, until told to stop; volumes stay then.

    Ephemeral inline volumes and static PersistentVolumes, read-only. Nothing needs a controller.
    """
    import signal
    import threading

    from mfs.config import check_caches
    from mfs.control import runtime
    from mfs.csi.node import Node, check_cache
    from mfs.csi.state import State
    from mfs.csi.volume import Limits
    from mfs.logs import set_up_logging

    try:
        from mfs.csi import server
    except ImportError as error:
        raise ConfigError(f"'mfs csi' needs grpcio and protobuf: pip install 'mfs[csi]' ({error})") from error
    check_caches("mfs csi", via, dragonfly)
    set_up_logging("INFO", "mfs-csi")
    if cache_dir is not None:
        check_cache(cache_dir)
    state = State(state_dir)
    node = Node(
        state, secrets_dir or runtime.create_directory() / "csi", cache_dir=cache_dir, keeper=keeper,
        limits=Limits(cache_size, ram_size, tuple(folders), via, dragonfly),
    )  # fmt: skip
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    node.recover()
    door = server.serve(node, node_id, endpoint)
    looking = threading.Thread(target=node.watch, daemon=True)
    looking.start()
    told.wait()
    node.stop()
    server.stop(door)


@click.command(
    cls=Page,
    short_help="Keep mounts' descriptors while 'mfs csi' is replaced.",
    sections={
        "Examples": "mfs keep /run/mfs/keeper.sock",
        "Files": """\
SOCKET           datagrams as systemd's NOTIFY_SOCKET gets them
SOCKET's stem with .take
                 where a driver takes a mount's descriptors up""",
    },
)
@click.argument("socket", type=click.Path(path_type=Path))
def keep(socket: Path) -> None:
    """Listen at SOCKET and keep what holders of mounts give, as systemd's FD store does, until told to stop.

    While one process has a mount's descriptors, the mount does not end, whoever else is killed: its readers wait.
    """
    from mfs import children

    path = os.path.abspath(socket)
    if not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"{os.path.dirname(path)} is no directory: create it")
    command = children.python("-m", "mfs.keeper", path)
    os.execve(command[0], command, children.environment())  # a small process: nothing of what we have imported

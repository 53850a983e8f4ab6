"""The command tree, and the front page of its help."""

from __future__ import annotations

from typing import Any

import click

from mfs.cli import (
    apply,
    browse,
    csi,
    diff,
    doctor,
    estimate,
    explain,
    kserve,
    look,
    metrics,
    mount,
    push,
    registry,
    settings,
    shell,
    sign,
    status,
    tiers,
    top,
    triton,
    umount,
    watch,
)
from mfs.cli.page import EXIT_STATUS, Front

_GROUPS = (
    ("Mount", ("mount", "umount")),
    ("Look", ("ls", "stat", "status", "top", "page", "watch", "explain", "metrics")),
    ("Move", ("prefetch", "evict", "pin", "unpin", "refresh", "verify", "apply")),
    ("Registry", ("push", "sign", "tag", "rollback", "log", "diff", "rm", "gc", "fsck")),
    ("Plan", ("doctor", "estimate")),
    ("Set up", ("config", "csi", "keep", "kserve-init", "triton", "completion", "version")),
)
_SECTIONS = {
    "Examples": """\
mfs mount s3://models/prod /mnt/models --cache-dir /nvme/mfs --cache-size 500G
mfs ls /mnt/models
mfs prefetch /mnt/models/llama
mfs status /mnt/models
mfs umount /mnt/models""",
    "Exit status": EXIT_STATUS,
    "Files": """\
/run/mfs, $XDG_RUNTIME_DIR/mfs or /tmp/mfs-UID
     control sockets and records of running mounts, and their logs where no
     --log-file is given""",
    "Environment": """\
AWS_*, HF_TOKEN, HF_ENDPOINT, HTTPS_PROXY, …   as the sources' own tools read them
OTEL_*           OpenTelemetry's own; an endpoint switches traces on ('mfs[trace]')
NO_COLOR         no colours
MFS_RUNTIME_DIR  another place for sockets and records""",
}


class _Front(Front):
    groups = _GROUPS
    sections = _SECTIONS


@click.group(cls=_Front, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 92})
@click.option("--debug", is_flag=True, help="Show where an error comes from (a traceback).")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=shell.print_version,
    help="Same as 'version'.",
)
def cli(**_: Any) -> None:
    """Mount remote model registries as ordinary read-only files.

    Bytes come from the origin when they are first read and stay in an SSD and a RAM tier. Give any command paths
    under a mount; the shell completes them. 'mfs COMMAND --help' is each command's manual page.
    """


for _command in (
    mount.mount, umount.umount, look.ls, look.stat, status.status, top.top, browse.page, watch.watch, explain.explain,
    metrics.metrics,
    tiers.prefetch, tiers.evict, tiers.pin, tiers.unpin, tiers.refresh, tiers.verify, apply.apply, push.push,
    sign.sign, diff.diff, registry.tag, registry.rollback, registry.log, registry.rm, registry.gc, registry.fsck,
    doctor.doctor, estimate.estimate, settings.config, csi.csi, csi.keep, kserve.kserve_init, triton.triton,
    shell.completion, shell.version,
):  # fmt: skip
    cli.add_command(_command)

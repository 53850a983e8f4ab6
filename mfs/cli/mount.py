"""`mfs mount`: settle the settings, clear a stale mount away, start the daemon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfs.cli.page import Page
from mfs.cli.registries import REACHING
from mfs.cli.run import warn
from mfs.cli.targets import TREE_PATH, absolute, source_url
from mfs.cli.text import clean, count
from mfs.cli.values import DURATION, SIZE, Parsed
from mfs.errors import UsageError

if TYPE_CHECKING:
    from mfs.config import MountConfig

_TAKE_OVER_S = 120.0  # starting, the handover's own deadlines, and what the old daemon saves first
_START_GRACE_S = 60.0  # beside the origin's own deadline: a large cache's tables take their time


def _umask(text: str) -> int:
    from mfs.config_file import parse_umask

    return parse_umask(text)


class _Setting(click.Option):
    """An option that sets one field of MountConfig; unset, it leaves the field to the file or to its default there."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        assert record is not None
        assert self.name is not None
        default = _default_text(self.name)
        return record[0], f"{record[1]}  [{default}]" if default else record[1]


def _default_text(field: str) -> str:
    """The default of a field of MountConfig as a person would write it; '' where there is none to say."""
    from mfs.config import MountConfig
    from mfs.units import exact_size, format_duration

    value = getattr(MountConfig, field)
    if value is None or value is False or value == ():
        return ""
    if field.endswith("_bytes"):
        return exact_size(value)
    if field.endswith("_s"):
        return format_duration(value)
    return f"{value:03o}" if field == "umask" else str(value)


_UMASK = Parsed("octal", _umask)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _flag(name: str, option: str, help: str) -> click.Option:
    return _Setting([name, option], is_flag=True, default=None, help=help)  # None: not given, unlike False


_SOURCE_OPTIONS = [
    *(click.Option([name, option], default=None, **more) for name, option, more in REACHING),
    click.Option(
        ["--layout"],
        type=click.Choice(["plain", "hub-cache"]),
        help="hub-cache: show an hf:// source as huggingface_hub's cache does (see below).",
    ),
    click.Option(
        ["--via"],
        metavar="URL",
        help="Ask this caching HTTP proxy for bytes, before the origin (see below).",
    ),
    click.Option(
        ["--dragonfly"],
        metavar="URL",
        help="Ask Dragonfly's dfdaemon for bytes, before the origin.",
    ),
    click.Option(
        ["--require-signature"],
        type=TREE_PATH,
        metavar="KEY",
        help="Of a registry, show only revisions signed with this public key.",
    ),
]
_MOUNT_OPTIONS = [
    _Setting(["--cache-dir"], type=TREE_PATH, help="Where the SSD tier lives; several mounts may share it."),
    _Setting(["cache_bytes", "--cache-size"], type=SIZE, help="Budget of the SSD tier."),
    _Setting(["ram_bytes", "--ram-size"], type=SIZE, help="Budget of the RAM tier."),
    _Setting(["timeout_s", "--timeout"], type=DURATION, help="Until a read that the origin does not answer fails."),
    _Setting(["refresh_s", "--refresh"], type=DURATION, help="Look for changes this often, not only on 'mfs refresh'."),
    _Setting(
        ["connections_count", "--connections"],
        type=int,
        help="Ranges in flight for one model; a source has twice that.",
    ),
    _Setting(["workers_count", "--workers"], type=int, help="Fetcher processes."),
    _Setting(
        ["materialize", "--materialize"],
        multiple=True,
        metavar="PATTERN",
        default=None,
        help="Bring files in whole at open, and keep them while open; repeatable. See below.",
    ),
    _flag("cache_fsync", "--cache-fsync", "Force bytes to the disk before they count."),
    _flag("cache_shared", "--cache-shared", "Trust a cache directory that other users own or can write to."),
    _flag("allow_other", "--allow-other", "Let other users read the mount."),
    _Setting(["--uid"], type=int, help="Owner of all files, instead of you."),
    _Setting(["--gid"], type=int, help="Group of all files, instead of yours."),
    _Setting(["--umask"], type=_UMASK, help="Permission bits taken away."),
    _Setting(
        ["--page-addr"], metavar="HOST:PORT", help="Serve a page for a browser there; 'mfs page' says its address."
    ),
    _Setting(["--log-file"], type=TREE_PATH, help="Append the daemon's log here."),
    _Setting(["--log-level"], type=click.Choice(["debug", "info", "warning", "error"]), help="How much to log."),
    _Setting(
        ["--log-format"],
        type=click.Choice(["auto", "text", "json"]),
        help="Lines for people or JSON; auto: by whether it is a terminal.",
    ),
    _Setting(
        ["metrics_addr", "--metrics-addr"],
        metavar="HOST:PORT",
        help="Answer Prometheus there, at /metrics; whoever can connect is told.",
    ),
    _flag("foreground", "--foreground", "Stay in the foreground (systemd, containers)."),
]


@click.command(
    cls=Page,
    short_help="Mount a source; return when it can be used.",
    params=[*_SOURCE_OPTIONS, *_MOUNT_OPTIONS],
    usages=(
        "[OPTIONS] SOURCE MOUNTPOINT",
        "[OPTIONS] --config FILE [MOUNTPOINT]",
        "--handover [OPTIONS] [SOURCE] MOUNTPOINT",
    ),
    sections={
        "Sources": """\
s3://BUCKET[/PREFIX]             any S3 server; credentials as for boto3 and the AWS CLI
hf://ORG/NAME[@REVISION]         the Hugging Face Hub; HF_TOKEN for private repositories
http://HOST/PATH/, https://…     a folder with an index; the server must support ranges
oci://HOST/REPOSITORY[:TAG]      an OCI registry: ModelPack, Docker's models, modelcars;
                                 credentials as for docker; without TAG all tags
/DIRECTORY, file:///DIRECTORY    a local folder
mfs+s3://BUCKET/REGISTRY[/MODEL[:TAG]], mfs+file://…, mfs+http(s)://…
     a registry that 'mfs push' fills: its models, each with its tags; or the
     tags of one model; or the revision that a tag means, or …/MODEL@sha256:…""",
        "Examples": """\
mfs mount s3://models/prod /mnt/models --cache-dir /nvme/mfs --cache-size 500G --ram-size 32G
mfs mount hf://sentence-transformers/all-MiniLM-L6-v2 /mnt/minilm
mfs mount s3://models /mnt/models --endpoint-url http://minio:9000 --profile minio
mfs mount mfs+s3://models/registry /mnt/models    /mnt/models/llama/prod follows its tag
mfs mount --config /etc/mfs.toml --foreground
mfs mount --handover /mnt/models                  upgrade the daemon; open files go on
mfs mount --handover /mnt/models --ram-size 64G   the same mount with another setting
mfs mount --handover --config /etc/mfs.toml       read the file again (systemd: ExecReload)""",
        "Materialize": """\
--materialize llama            all files below any directory 'llama'
--materialize 'prod/*/1/*'     a pattern with '/' is meant from the root of the mount
--materialize '**'             everything
     For servers that map weights and answer for months: a page that an origin
     refuses later kills the process (SIGBUS); this way open fails, or nothing
     does. open waits for the whole file. Files must fit into --cache-size, or
     without --cache-dir into three quarters of --ram-size.""",
        "Many nodes": """\
--via http://cache:8080              nginx, varnish: one for all nodes, or one a node
--dragonfly http://127.0.0.1:4001    the proxy of Dragonfly's dfdaemon
     Bytes of files are asked of the cache, everything else of the origin. What
     the cache lacks, lies about or does not bring in time comes from the origin.
     No password and no long-lived token goes through it: sources that want one
     with each range are read directly. Its configuration must leave the query
     out of logs and keys: RECIPES.md has one for nginx and one for varnish.""",
        "Hub cache": """\
mfs mount hf://org/name /mnt/hub --layout hub-cache
HF_HUB_CACHE=/mnt/hub HF_HUB_OFFLINE=1 python server.py
     from_pretrained("org/name") then reads from the mount. Several
     repositories side by side: [sources.*] with layout = "hub-cache".""",
        "Sizes and times": """\
64M, 500G, 1.5T: binary units (1G is 2**30 bytes); a plain number is bytes
250ms, 30s, 5m, 1h; a plain number is seconds""",
        "Files": """\
/run/mfs, $XDG_RUNTIME_DIR/mfs or /tmp/mfs-UID
     control sockets, and logs where no --log-file is given
FILE of --config: see 'mfs config check --help'""",
        "Environment": """\
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, …
HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_ENDPOINT
DOCKER_CONFIG    the directory of docker's config.json, instead of ~/.docker
HTTPS_PROXY, HTTP_PROXY, NO_PROXY (names, addresses, ranges)
SSL_CERT_FILE, REQUESTS_CA_BUNDLE; for S3 AWS_CA_BUNDLE or its ca_bundle
NOTIFY_SOCKET    told READY=1 when the mount can be used (systemd Type=notify), and given the
                 mount's descriptors to keep (FileDescriptorStoreMax=)
WATCHDOG_USEC    told WATCHDOG=1 three times as often, as long as the daemon answers
LISTEN_FDS       the descriptors again, with --foreground: the mount goes on""",
    },
)
@click.argument("source", required=False)
@click.argument("mountpoint", required=False, type=TREE_PATH)
@click.option("--handover", is_flag=True, help="Take the mount over from the daemon that serves it.")
@click.option(
    "--config", "config_file", type=_FILE, metavar="FILE", help="Read settings from a TOML file; options win."
)
def mount(source: str | None, mountpoint: str | None, config_file: Path | None, handover: bool, **options: Any) -> None:
    """Mount SOURCE at MOUNTPOINT, an empty directory, and return when it can be used.

    With --config, several sources appear side by side, each under its own name. A mount left by a daemon that
    crashed is replaced. Only headers, small files and what is read cross the network.

    With --handover a new daemon takes a mount over that is in use. Its settings are those of the running one, other
    than the options given; sources, owner and access stay as they are. Readers wait for milliseconds; whatever fails
    leaves the old daemon serving. Needs Linux 6.9.
    """
    from mfs.config import check_paths
    from mfs.control import fdstore
    from mfs.launch import become_daemon, start_daemon, store_name

    if handover:
        _take_over(source, mountpoint, config_file, options)
        return
    settings = _settings(source, mountpoint, config_file, options)
    if settings.foreground and (held := fdstore.received(store_name(settings))):
        become_daemon(settings, held=held)
    check_paths(settings, is_replacing=_is_dead(str(settings.mountpoint)))
    if settings.foreground:
        become_daemon(settings)
    for warning in start_daemon(settings, deadline_s=2 * settings.timeout_s + _START_GRACE_S, told=warn):
        warn(warning)
    print(_success(settings))


def _take_over(source: str | None, mountpoint: str | None, config_file: Path | None, options: dict[str, Any]) -> None:
    from mfs.cli.targets import connect
    from mfs.control import mountinfo
    from mfs.control.runtime import find_mount
    from mfs.handover import Heir, door_path
    from mfs.launch import become_daemon, start_daemon

    settings = None
    if config_file is not None or mountpoint is not None:
        settings = _settings(source, mountpoint, config_file, options)
        place = str(settings.mountpoint)
    elif source is not None:
        place = absolute(source, "MOUNTPOINT")
    else:
        raise UsageError("--handover needs the MOUNTPOINT; see 'mfs mount --help'")
    served = find_mount(place)
    if served.place.path:
        raise UsageError(f"{place} lies inside a mount: name its mount point, {served.place.mount.mountpoint}")
    connect(served)  # says it well if the daemon is gone
    with Heir(door_path(served.socket)) as heir:
        if settings is None:
            settings = _changed(heir.config, options)
        settings = replace(
            settings, mountpoint=Path(mountinfo.real_mountpoint(place)), foreground=bool(options["foreground"])
        )
        heir.check_same(settings)
        if settings.foreground:
            become_daemon(settings, heir=heir)
        for warning in start_daemon(settings, deadline_s=_TAKE_OVER_S, heir=heir, told=warn):
            warn(warning)
        print(clean(f"{place} taken over from pid {heir.pid} (mfs {heir.version})"))


def _changed(config: MountConfig, options: dict[str, Any]) -> MountConfig:
    """The running mount's settings with the options given."""
    given = _given(options)
    for option in _SOURCE_OPTIONS:
        if option.name in given:
            raise UsageError(f"{option.opts[0]}: how the sources are reached cannot change while mounted")
    return _with_a_tier(replace(config, **given), given)


def _with_a_tier(config: MountConfig, given: dict[str, Any]) -> MountConfig:
    """Whoever gives a size believes that there is a cache, and would find out by the bill. Raises: UsageError."""
    if config.cache_dir is None and "cache_bytes" in given:
        raise UsageError("--cache-size is of the SSD tier, and there is none: say --cache-dir, too")
    return config


def _given(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    for name in ("cache_dir", "log_file", "require_signature"):
        if name in given:
            given[name] = Path(absolute(given[name], f"--{name.replace('_', '-')}"))
    return given


def _settings(
    source: str | None, mountpoint: str | None, config_file: Path | None, options: dict[str, Any]
) -> MountConfig:
    """The configuration that file and command line make together."""
    from mfs import config_file as files
    from mfs.config import MountConfig, SourceConfig

    given = _given(options)
    of_source = {name: given.pop(name) for name in [option.name for option in _SOURCE_OPTIONS] if name in given}
    if config_file is not None:
        if mountpoint is not None:
            raise UsageError("with --config, name only the mount point: the sources stand in the file")
        if source is not None:  # the one argument given: click fills from the left
            given["mountpoint"] = Path(absolute(source, "MOUNTPOINT"))
        return _with_a_tier(files.load(config_file, mount=given, source=of_source), given)
    if source is None or mountpoint is None:
        raise UsageError("SOURCE and MOUNTPOINT are both needed; see 'mfs mount --help'")
    place = Path(absolute(mountpoint, "MOUNTPOINT"))
    return _with_a_tier(MountConfig(place, (SourceConfig(source_url(source), **of_source),), **given), given)


def _is_dead(mountpoint: str) -> bool:
    """Whether a mount stands here whose daemon crashed: ours takes its place once it can.

    Raises: ConfigError if it lives.
    """
    from mfs.cli.targets import is_listening
    from mfs.control import detach, leftovers, mountinfo, runtime

    real = mountinfo.real_mountpoint(mountpoint)
    mounted = mountinfo.mount_at(real)
    if mounted is None or not mounted.is_mfs:
        return False
    served = runtime.find_mount(real)
    if not detach.is_stale(mounted, served.record, is_listening=is_listening(served)):
        raise leftovers.living(real, served.record)
    return True


def _success(settings: MountConfig) -> str:
    from mfs.shown import mask_url

    if len(settings.sources) == 1 and not settings.sources[0].name:
        what = mask_url(settings.sources[0].url)
    else:
        names = ", ".join(source.name for source in settings.sources)
        what = f"{count(len(settings.sources), 'source')} ({names})"
    place = settings.mountpoint
    return clean(f"{what} mounted at {place}; look with 'mfs status {place}', end with 'mfs umount {place}'")

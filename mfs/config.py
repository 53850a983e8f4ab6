"""What a mount is told: frozen settings, checked when they are made, handed from the command line to the daemon.

`mfs.config_file` reads them from TOML. Only `check_paths` does I/O; nothing here reads the environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfs import __version__
from mfs.cache.directory import check_directory
from mfs.control import mountinfo
from mfs.errors import ConfigError, StoreError
from mfs.shown import MASK, mask_url
from mfs.sources.base import name_fault
from mfs.sources.folder import folder_path
from mfs.sources.hf_cache import directory_name
from mfs.types import CHUNK_BYTES
from mfs.units import exact_size, parse_address, parse_local_address

RAM_SLOTS_COUNT_MIN = 16
"""The RAM tier refuses fewer (`mfs.cache.ram`, whose test keeps the two equal); said here before anything starts."""

LAYOUTS = ("plain", "hub-cache")
SIGNED_SCHEMES = ("mfs+s3", "mfs+file", "mfs+http", "mfs+https")
"""Sources whose revisions can be signed (`registry.layout.SCHEMES`, whose test keeps the two equal)."""
FIXED = ("mountpoint", "allow_other", "uid", "gid", "umask")
"""Settings of a mount that the kernel holds, or has told readers: they stay as long as it is mounted."""
_CACHE_ADDRESS = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?/?")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "text", "json")


@dataclass(frozen=True)
class SourceConfig:
    """One origin of models and how to reach it."""

    url: str
    """'s3://bucket/prefix', 'hf://org/name[@revision]', 'oci://host/repository[:tag]', 'http(s)://host/path/',
    'file:///dir' or '/dir'; a registry of ours 'mfs+s3://bucket/registry[/model[:tag]]', 'mfs+file://…',
    'mfs+http(s)://…'."""
    name: str = ""
    """Directory of the mount it appears in; '' is the mount's root, legal only for a mount's one source."""
    endpoint_url: str | None = None
    """Server to ask instead of the service's own; None leaves it to the environment (AWS_ENDPOINT_URL, HF_ENDPOINT)."""
    profile: str | None = None
    """Section of the AWS configuration files; None is boto3's own choice."""
    region: str | None = None
    """AWS region; None is boto3's own choice."""
    unsigned: bool = False
    """Send S3 requests without a signature, for public buckets. Off: a missing credential should be said."""
    requester_pays: bool = False
    """Pay for S3 requests and traffic, for buckets whose owner does not. Off: nobody spends money without saying so."""
    token: str | None = field(default=None, repr=False)
    """Bearer token (Hub, HTTP); None leaves it to the environment. Secret: masked wherever it is printed."""

    layout: str = "plain"
    """One of LAYOUTS. 'hub-cache' shows an hf:// source as huggingface_hub's cache would; its directory of the mount is
    then called 'models--org--name', whatever `name` says."""
    via: str | None = None
    """A caching HTTP proxy that many nodes share, 'http://host:port': ranges of files are asked of it first. None: each
    node asks the origin."""
    dragonfly: str | None = None
    """The same, where it is Dragonfly's dfdaemon."""
    require_signature: Path | None = None
    """File with a public key: of a registry, show only what was signed with it. None: show everything."""
    beneath: Path | None = None
    """Real path of the directory that a folder, or a registry in one, may not lead out of, by links or otherwise. None:
    whoever put a link there is trusted. Set where strangers name folders (`mfs csi`)."""

    def options(self, mountpoint: str = "", cache_directory: str = "") -> dict[str, Any]:
        """How it is reached, as `sources.SourceOptions` takes it, and plain values can cross to a worker.

        mountpoint, cache_directory: of the mount, '' without one.
        """
        return {
            "mountpoint": mountpoint, "cache_directory": cache_directory,
            "endpoint_url": self.endpoint_url, "profile": self.profile, "region": self.region,
            "unsigned": self.unsigned, "requester_pays": self.requester_pays, "token": self.token,
            "layout": self.layout, "via": self.via, "dragonfly": self.dragonfly,
            "require_signature": os.fspath(self.require_signature) if self.require_signature else None,
            "beneath": os.fspath(self.beneath or ""),
        }  # fmt: skip

    def __post_init__(self) -> None:
        label = f"source {self.name!r}" if self.name else "source"
        if not self.url:
            raise ConfigError(
                f"{label} has no url: expected s3://…, hf://…, oci://…, http(s)://…, /directory or mfs+s3://…"
            )
        if not self.url.startswith("/") and not re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]*", self.url):
            raise ConfigError(f"{label}: url is {mask_url(self.url)!r}: expected no control characters, and UTF-8")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"{label}: layout is {self.layout!r}: expected one of {', '.join(LAYOUTS)}")
        if self.layout == "hub-cache":
            if not self.url.startswith("hf://"):
                raise ConfigError(f"{label}: layout 'hub-cache' is for hf:// sources, got {mask_url(self.url)}")
            repo = self.url.removeprefix("hf://").rstrip("/").partition("@")[0]
            object.__setattr__(self, "name", directory_name(repo))
        if self.require_signature is not None:
            if not self.url.startswith(tuple(f"{scheme}://" for scheme in SIGNED_SCHEMES)):
                raise ConfigError(
                    f"{label}: a signature can be required of a registry (mfs+s3://… and the like) only, "
                    f"got {mask_url(self.url)}"
                )
            _check_path(f"{label}: require_signature", self.require_signature)
        if self.beneath is not None:
            _check_path(f"{label}: beneath", self.beneath)
        check_caches(label, self.via, self.dragonfly)
        fault = name_fault(self.name) if self.name else None
        if fault:
            raise ConfigError(f"source name {self.name!r} cannot be a directory of the mount: {fault}")
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{label}: endpoint_url is {mask_url(self.endpoint_url)!r}: expected http://… or https://…"
            )


@dataclass(frozen=True)
class MountConfig:
    """Everything one daemon needs to know."""

    mountpoint: Path
    """Absolute path of the directory that becomes the tree."""
    sources: tuple[SourceConfig, ...]
    """At least one; in the order given."""
    cache_dir: Path | None = None
    """Where the SSD tier lives; may be shared by mounts. None: no SSD tier, every cold read goes to the origin."""
    cache_bytes: int = 100 << 30
    """Budget of the SSD tier. Default: holds a few models, and fits the system disk of a usual GPU machine."""
    ram_bytes: int = 1 << 30
    """Budget of the RAM tier, taken whole at start. Default: a window for streaming; for readers through the kernel
    the page cache is the tier that keeps whole models."""
    timeout_s: float = 30.0
    """Seconds until a read that the origin does not answer becomes EIO. Default: outlasts a server's restart, but
    not a person's patience."""
    refresh_s: float | None = None
    """Seconds between looks at the sources for changes. None: only `mfs refresh` looks; served models stay still."""
    workers_count: int = 2
    """Fetcher processes. Default: one moves 3.5 GB/s on loopback, the second covers its pauses."""
    connections_count: int = 16
    """Ranges in flight for one model, all workers together; for all models of a source twice that (`workers.shares`).
    Default: hides 20 ms of latency at 25 Gbit/s with 4 MiB parts."""
    materialize: tuple[str, ...] = ()
    """Patterns of files that are brought in whole when they are opened, and kept as long as they are open; see
    `mfs.materialize.matches`. None: files stay lazy."""
    allow_other: bool = False
    """Let users other than the mounting one read the tree. Off, as everywhere in FUSE."""
    uid: int | None = None
    """Owner of all files; None: whoever mounts."""
    gid: int | None = None
    """Group of all files; None: of whoever mounts."""
    umask: int = 0o022
    """Permission bits taken away from the files' modes (files 0444, directories 0555 at most: the tree is
    read-only)."""
    log_file: Path | None = None
    """Where the daemon logs; None: its standard error."""
    log_level: str = "info"
    """One of LOG_LEVELS."""
    log_format: str = "auto"
    """One of LOG_FORMATS. Default: a person's on a terminal, JSON lines everywhere else."""
    metrics_addr: str | None = None
    """HOST:PORT to answer Prometheus on; None: metrics come through the control socket alone."""
    page_addr: str | None = None
    """HOST:PORT of this machine alone, where the daemon serves a page for a browser. None: it serves none."""
    foreground: bool = False
    """The daemon stays with the terminal or service manager that started it."""
    cache_fsync: bool = False
    """Force bytes to the disk before they count. Off: every block is verified when read back, so a power cut
    costs a refetch, not wrong bytes."""
    cache_shared: bool = False
    """Take a cache directory that other users own or can write to. Off: they would decide what readers get."""

    def __post_init__(self) -> None:
        """Checks that need no I/O. Raises: ConfigError."""
        _check_sources(self.sources)
        _check_path("mountpoint", self.mountpoint)
        if self.log_file is not None:
            _check_path("log_file", self.log_file)
            if _is_inside(self.log_file, self.mountpoint):
                raise ConfigError(f"log file {self.log_file} lies inside the mount point: choose a path outside it")
        if self.cache_dir is not None:
            _check_path("cache_dir", self.cache_dir)
            _check_apart(self.cache_dir, self.mountpoint)
            _check_least("SSD budget (--cache-size, cache_size)", self.cache_bytes, CHUNK_BYTES, "one chunk")
        slots = f"{RAM_SLOTS_COUNT_MIN} slots of {exact_size(CHUNK_BYTES)}"
        _check_least("RAM budget (--ram-size, ram_size)", self.ram_bytes, RAM_SLOTS_COUNT_MIN * CHUNK_BYTES, slots)
        _check_between("timeout", self.timeout_s, 0.1, 86_400, "seconds")
        if self.refresh_s is not None:
            _check_between("refresh", self.refresh_s, 1, 366 * 86_400, "seconds")
        _check_between("workers", self.workers_count, 1, 64, "processes")
        _check_between("connections", self.connections_count, 1, 1024, "ranges in flight")
        _check_between("umask", self.umask, 0, 0o777, "")
        for name, number in (("uid", self.uid), ("gid", self.gid)):
            if number is not None:
                _check_between(name, number, 0, 2**32 - 2, "")
        for pattern in self.materialize:
            if not pattern.strip("/") or any(part in (".", "..") for part in pattern.split("/")):
                raise ConfigError(
                    f"materialize is {pattern!r}: expected a pattern of paths in the mount, such as 'llama', "
                    f"'prod/*/1/*.safetensors' or '**'"
                )
        if self.page_addr is not None:
            try:
                parse_local_address(self.page_addr)
            except ValueError as error:
                raise ConfigError(f"page address: {error}") from None
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level is {self.log_level!r}: expected one of {', '.join(LOG_LEVELS)}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format is {self.log_format!r}: expected one of {', '.join(LOG_FORMATS)}")
        if self.metrics_addr is not None:
            try:
                parse_address(self.metrics_addr)
            except ValueError as error:
                raise ConfigError(f"metrics_addr: {error}") from error

    def to_json(self) -> str:
        """One line of JSON with everything, secrets too: for other daemons of the mount, not for eyes.

        Those may be of another release: so it says which wrote it, and what is `chosen` of it.
        """
        sources = [{**dataclasses.asdict(source), "chosen": list(chosen(source))} for source in self.sources]
        told = {**dataclasses.asdict(self), "sources": sources, "chosen": list(chosen(self)), "release": __version__}
        return json.dumps(told, default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> MountConfig:
        """Inverse of `to_json`, checked again. Settings of another release that nobody chose are left out.

        Raises: ConfigError, also for chosen ones that mean nothing here: a signature that is required, say, must not
            be forgotten.
        """
        try:
            values = json.loads(text)
            release = values.pop("release", "another release")
            unknown = [*_take_unknown(cls, values), *(name for source in values["sources"]
                       for name in _take_unknown(SourceConfig, source))]  # fmt: skip
            if unknown:
                raise ConfigError(
                    f"the mount has settings of mfs {release} that mean nothing to mfs {__version__}: "
                    f"{', '.join(dict.fromkeys(unknown))}; install {release} again, or unmount and mount without them"
                )
            sources = tuple(_source(source) for source in values.pop("sources"))
            for name in ("mountpoint", "cache_dir", "log_file"):
                if values[name] is not None:
                    values[name] = Path(values[name])
            values["materialize"] = tuple(values["materialize"])
            return cls(sources=sources, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a mount configuration: {error}") from error

    def identity(self) -> str:
        """Equal for settings that make the same mount to the kernel and to readers; 16 hexadecimal digits.

        Other releases must find the same: what was kept of a mount under this name serves no other.
        """
        told = [*(getattr(self, name) for name in FIXED), *map(chosen, places(self))]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=os.fspath).encode()).hexdigest()[:16]

    def masked(self) -> dict[str, Any]:
        """The settings as JSON values for people and `mfs config`, secrets replaced by '***'."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=os.fspath))
        for source in values["sources"]:
            if source["token"] is not None:
                source["token"] = MASK
            for name in ("url", "endpoint_url"):
                if source[name] is not None:
                    source[name] = mask_url(source[name])
        return values


def _source(values: dict[str, Any]) -> SourceConfig:
    paths: dict[str, Any] = {
        name: Path(path) for name in ("require_signature", "beneath") if (path := values.pop(name, None))
    }
    return SourceConfig(**values, **paths)


def _take_unknown(kind: type, values: dict[str, Any]) -> list[str]:
    """Take out of settings what another release has added; the names of those that somebody chose."""
    picked = set(values.pop("chosen", values))
    unknown = [name for name in values if name not in {field.name for field in dataclasses.fields(kind)}]
    for name in unknown:
        del values[name]
    return [name for name in unknown if name in picked]


def chosen(config: SourceConfig | MountConfig) -> dict[str, Any]:
    """What of settings is not the default: the same in releases that know more of them."""
    fields = dataclasses.fields(config)
    return {f.name: value for f in fields if (value := getattr(config, f.name)) != f.default}


def places(config: MountConfig) -> list[SourceConfig]:
    """The sources without what only opens them."""
    opening: dict[str, Any] = {
        "profile": None, "region": None, "unsigned": False, "requester_pays": False, "token": None,
        "via": None, "dragonfly": None,
    }  # fmt: skip
    return [dataclasses.replace(source, **opening) for source in config.sources]


def check_paths(config: MountConfig, *, is_replacing: bool = False) -> None:
    """Look at the disk: can the mount point be mounted on, can the cache be written? Creates the cache directory.

    is_replacing: a dead mount of ours stands at the mount point, and stays until this one can take its place.
    Raises: ConfigError with one line. Never stats a mount that stands at the mount point already.
    """
    mountpoint = mountinfo.real_mountpoint(str(config.mountpoint))
    mounted = mountinfo.mount_at(mountpoint)
    if mounted is not None and not is_replacing:
        raise ConfigError(f"{mountpoint} is mounted already ({mounted.fstype}, {mounted.source}): unmount it first")
    if not is_replacing:
        check_mountpoint(Path(mountpoint))
    check_cache_dir(config)


def check_cache_dir(config: MountConfig) -> None:
    """Create the cache directory, if one is wanted, and see that it can be written; that no folder lies in it, or in a
    mount. Raises: ConfigError.
    """
    for source in config.sources:
        if source.url.startswith(("/", "file:")):
            _check_outside(folder_path(source.url), config)
    if config.cache_dir is not None:
        cache_dir = Path(os.path.realpath(config.cache_dir))
        _check_apart(cache_dir, Path(mountinfo.real_mountpoint(str(config.mountpoint))))
        place = mountinfo.locate(str(cache_dir))
        if place is not None:
            raise ConfigError(
                f"cache directory {cache_dir} lies in the mfs mount {place.mount.mountpoint}: "
                f"choose a directory on a local disk"
            )
        with suppress(StoreError):  # its disk fails, or is full: that may pass, and until then the mount does without
            check_directory(cache_dir, shared=config.cache_shared)


def _check_outside(folder: str, config: MountConfig) -> None:
    """That a folder lies neither in a mount of ours nor in the mount's own cache: trees that hold or feed themselves.

    What it holds of either it does not show, see `sources.fence`. Raises: ConfigError, UsageError.
    """
    real = mountinfo.real_mountpoint(folder)
    place = mountinfo.locate(real)
    if place is not None:
        raise ConfigError(f"source {folder} lies in the mfs mount {place.mount.mountpoint}: name what that one shows")
    if _is_inside(Path(real), Path(mountinfo.real_mountpoint(str(config.mountpoint)))):
        raise ConfigError(
            f"source {folder} lies inside the mount point {config.mountpoint}: choose another mount point"
        )
    if config.cache_dir is None:
        return
    for above in (Path(real), *Path(real).parents):  # by what it is, not by name: it may be bound to another place
        is_cache = False
        with contextlib.suppress(OSError):  # one of the two is not there
            is_cache = above.samefile(config.cache_dir)
        if is_cache:
            raise ConfigError(f"source {folder} lies in the cache directory {config.cache_dir}: choose another cache")


def check_mountpoint(mountpoint: Path) -> None:
    """Raises: ConfigError unless this is an empty directory."""
    try:
        with os.scandir(mountpoint) as entries:
            first = next(entries, None)
    except FileNotFoundError:
        raise ConfigError(f"mount point {mountpoint} does not exist: create it with mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise ConfigError(f"mount point {mountpoint} is not a directory") from None
    except OSError as error:
        raise ConfigError(f"mount point {mountpoint} cannot be read: {error.strerror}") from error
    if first is not None:
        raise ConfigError(
            f"mount point {mountpoint} is not empty (it holds {first.name!r}): mounting would hide that; "
            f"choose an empty directory"
        )


def _check_sources(sources: Iterable[SourceConfig]) -> None:
    names = [source.name for source in sources]
    if not names:
        raise ConfigError("no source: name one on the command line or in a [sources.NAME] table of the config file")
    if len(names) > 1 and "" in names:
        raise ConfigError("a source without a name must be the only one: give each of several sources its own name")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two sources are named {twice!r}: each needs its own directory of the mount")


def check_caches(label: str, via: str | None, dragonfly: str | None) -> None:
    """Of a cache that nodes share. label: whose it is, in errors. Raises: ConfigError."""
    if via is not None and dragonfly is not None:
        raise ConfigError(f"{label}: via and dragonfly are both set: expected one cache")
    for key, address in (("via", via), ("dragonfly", dragonfly)):
        found = _CACHE_ADDRESS.fullmatch(address) if address is not None else None
        if address is not None and (found is None or int(found[1] or 1) not in range(1, 1 << 16)):
            raise ConfigError(
                f"{label}: {key} is {mask_url(address)!r}: expected http://host:port or https://host:port"
            )


def _check_path(what: str, path: Path) -> None:
    if not path.is_absolute() or "\0" in str(path):
        raise ConfigError(f"{what} is {str(path)!r}: expected an absolute path")


def _check_apart(cache_dir: Path, mountpoint: Path) -> None:
    if _is_inside(cache_dir, mountpoint):
        raise ConfigError(f"cache directory {cache_dir} lies inside the mount point {mountpoint}: choose another")
    if _is_inside(mountpoint, cache_dir):
        raise ConfigError(f"mount point {mountpoint} lies inside the cache directory {cache_dir}: choose another")


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether `path` is `directory` or below it, as written (links are `check_paths`' business)."""
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(directory))


def _check_least(what: str, value: int, least: int, meaning: str) -> None:
    if value < least:
        raise ConfigError(f"{what} is {value} bytes: expected at least {exact_size(least)} ({meaning})")


def _check_between(what: str, value: float, least: float, most: float, unit: str) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{what} is {value:g}: expected {least:g} to {most:,g} {unit}".rstrip())

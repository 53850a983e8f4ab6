"""The TOML file of a mount, read into keyword arguments for `mfs.config`.

    [mount]
    mountpoint = "/mnt/models"
    cache_dir = "/nvme/mfs"
    cache_size = "500G"          # binary units; a plain integer is bytes
    ram_size = "32G"
    refresh = "30s"              # a plain number is seconds
    materialize = ["llama/*"]    # files brought in whole when they are opened, and kept meanwhile

    [sources.prod]               # appears as /mnt/models/prod
    url = "s3://models/prod"
    profile = "inference"

Unknown keys are errors: a misspelt budget that is silently ignored is found at three in the morning.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mfs.config import MountConfig, SourceConfig
from mfs.errors import ConfigError
from mfs.units import exact_size, parse_duration, parse_size

FILE_BYTES_MAX = 1 << 20
"""A configuration is a page of text; anything longer is another file given by mistake."""


def load(file: Path, *, mount: dict[str, Any], source: dict[str, Any]) -> MountConfig:
    """Read `file` and lay the command line over it.

    mount, source: fields of MountConfig and SourceConfig given on the command line; `source` holds for every source.
    Raises: ConfigError naming the file and the key.
    """
    settings, sources = read(file)
    settings |= mount
    if "mountpoint" not in settings:
        raise ConfigError(f"{file}: no mountpoint: give it on the command line or as mountpoint in the [mount] table")
    try:
        return MountConfig(sources=tuple(SourceConfig(**(fields | source)) for fields in sources), **settings)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of MountConfig that `file` sets, and those of each SourceConfig. Raises: ConfigError."""
    document = read_document(file)
    check_keys(document, ("mount", "sources"), f"{file}: ")
    settings = _table(document.get("mount", {}), _MOUNT_KEYS, f"{file}: [mount] ", file.parent)
    tables = document.get("sources", {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{file}: sources is {tables!r}: expected tables named [sources.NAME]")
    sources = []
    for name, table in tables.items():
        fields = _table(table, _SOURCE_KEYS, f"{file}: [sources.{name}] ", file.parent)
        if "url" not in fields:
            raise ConfigError(f"{file}: [sources.{name}] has no url")
        sources.append(fields | {"name": name})
    return settings, sources


def read_document(file: Path) -> dict[str, Any]:
    """What a TOML file says. Raises: ConfigError."""
    try:
        with open(file, "rb") as opened:
            text = opened.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise ConfigError(f"{file} is longer than {FILE_BYTES_MAX} bytes: not a configuration file")
        return tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error


def dump(masked: dict[str, Any]) -> str:
    """`MountConfig.masked()` as the file that would say the same; masked secrets stay masked."""
    lines = ["[mount]", *_lines(masked, _MOUNT_KEYS)]
    for source in masked["sources"]:
        # A source at the mount's root has no name, which a file cannot say: it stands there as a comment.
        header = f"[sources.{_toml(source['name'])}]" if source["name"] else "# at the root of the mount"
        lines += ["", header, *_lines(source, _SOURCE_KEYS)]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any], keys: dict[str, _Key]) -> list[str]:
    lines = []
    for key, (field, convert) in keys.items():
        value = values[field]
        if value is None or (convert is _patterns and not value):
            continue
        if convert is _size:
            value = exact_size(value)
        elif convert is parse_umask:
            value = f"{value:03o}"
        lines.append(f"{key} = {_toml(value)}")
    return lines


def _toml(value: Any) -> str:
    """JSON's numbers, true, false and strings are TOML's, but for surrogate pairs and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(table: Any, keys: dict[str, _Key], where: str, folder: Path) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}is {table!r}: expected a table")
    check_keys(table, keys, where)
    fields = {}
    for key, value in table.items():
        field, convert = keys[key]
        try:
            converted = convert(value)
        except ValueError as error:
            raise ConfigError(f"{where}{key}: {error}") from error
        if isinstance(converted, Path):
            converted = folder.absolute() / converted  # relative paths mean beside the file, wherever one stands
        fields[field] = converted
    return fields


def check_keys(table: dict[str, Any], legal: Any, where: str) -> None:
    """Raises: ConfigError for a key that is not among the legal ones, with the one that may be meant."""
    for key in table:
        if key not in legal:
            near = get_close_matches(key, legal, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"legal are {', '.join(sorted(legal))}"
            raise ConfigError(f"{where}has no key {key!r}: {hint}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {value!r}: expected a string")
    return value


def _secret(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a string")  # not what it is: somebody pasted a token there
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is {value!r}: expected true or false")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is {value!r}: expected a whole number")
    return value


def _patterns(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"is {value!r}: expected a pattern or a list of patterns")
    return tuple(map(_text, value))


def _path(value: Any) -> Path:
    if not _text(value):
        raise ValueError("is empty: expected a path")
    return Path(value).expanduser()


def _size(value: Any) -> int:
    return parse_size(value) if isinstance(value, str) else parse_size(str(_integer(value)))


def _duration(value: Any) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {value!r}: expected seconds or a form like '30s'")
    return float(value)


def parse_umask(value: Any) -> int:
    """Permission bits from '022' (octal, as everywhere) or a TOML integer such as 0o022. Raises: ValueError."""
    if isinstance(value, str):
        if not value or not set(value.removeprefix("0o")) <= set("01234567"):
            raise ValueError(f"is {value!r}: expected octal digits such as '022'")
        return int(value, 8)
    return _integer(value)


_Key = tuple[str, Callable[[Any], Any]]
_MOUNT_KEYS: dict[str, _Key] = {
    "mountpoint": ("mountpoint", _path),
    "cache_dir": ("cache_dir", _path),
    "cache_size": ("cache_bytes", _size),
    "cache_fsync": ("cache_fsync", _flag),
    "cache_shared": ("cache_shared", _flag),
    "ram_size": ("ram_bytes", _size),
    "timeout": ("timeout_s", _duration),
    "refresh": ("refresh_s", _duration),
    "workers": ("workers_count", _integer),
    "connections": ("connections_count", _integer),
    "materialize": ("materialize", _patterns),
    "allow_other": ("allow_other", _flag),
    "uid": ("uid", _integer),
    "gid": ("gid", _integer),
    "umask": ("umask", parse_umask),
    "page_addr": ("page_addr", _text),
    "log_file": ("log_file", _path),
    "log_level": ("log_level", _text),
    "log_format": ("log_format", _text),
    "metrics_addr": ("metrics_addr", _text),
    "foreground": ("foreground", _flag),
}
_SOURCE_KEYS: dict[str, _Key] = {
    "url": ("url", _text),
    "endpoint_url": ("endpoint_url", _text),
    "profile": ("profile", _text),
    "region": ("region", _text),
    "unsigned": ("unsigned", _flag),
    "requester_pays": ("requester_pays", _flag),
    "token": ("token", _secret),
    "layout": ("layout", _text),
    "via": ("via", _text),
    "dragonfly": ("dragonfly", _text),
    "require_signature": ("require_signature", _path),
    "beneath": ("beneath", _path),
}

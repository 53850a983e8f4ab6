"""A volume's secrets: files in memory, in a directory of their own, to which its daemon's environment points.

Every source looks at its file again when it is refused, so a Secret that was rotated is written here and nobody mounts
again. Nothing of it stands in an argument, an environment or the state; the directory must be on tmpfs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from mfs import children
from mfs.errors import ConfigError, UsageError

_TMPFS, _RAMFS = 0x01021994, 0x858458F6  # statfs(2)
_AWS = {
    "AWS_ACCESS_KEY_ID": "aws_access_key_id",
    "AWS_SECRET_ACCESS_KEY": "aws_secret_access_key",
    "AWS_SESSION_TOKEN": "aws_session_token",
}
_HUB, _DOCKER, _USER, _PASSWORD = "HF_TOKEN", ".dockerconfigjson", "username", "password"
NAMES = (*_AWS, _HUB, _DOCKER, _USER, _PASSWORD)
"""Keys of a Secret that are understood; the last three as in Secrets of types dockerconfigjson and basic-auth."""
_VALUE_BYTES_MAX = 64 << 10
_FOREIGN = ("AWS_", "HF_", "HUGGING")
_KEPT = {"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE", "HF_ENDPOINT"}
_OTHERS = {"DOCKER_CONFIG", "NETRC", "HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}
_SERVICE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE")
_libc = ctypes.CDLL(None, use_errno=True)


def check(secrets: Mapping[str, str]) -> None:
    """Raises: UsageError naming a key that is not known or whose value cannot be one; never the value."""
    for name, value in secrets.items():
        if name not in NAMES:
            raise UsageError(f"secret {name!r:.80} is not known: expected some of {', '.join(NAMES)}")
        printable = value.isprintable() if name != _DOCKER else "\0" not in value
        if not value or len(value.encode()) > _VALUE_BYTES_MAX or not printable:
            raise UsageError(f"secret {name} is empty, too long or holds control characters")
    _check_pair(secrets, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    _check_pair(secrets, _USER, _PASSWORD)


def _check_pair(secrets: Mapping[str, str], one: str, other: str) -> None:
    if (one in secrets) != (other in secrets):
        raise UsageError(f"secrets {one} and {other} belong together: one of them is missing")


def check_memory(directory: Path) -> None:
    """Raises: ConfigError unless files in this directory never reach a disk."""
    if _file_system(directory) not in (_TMPFS, _RAMFS):
        raise ConfigError(
            f"secrets directory {directory} is not in memory: expected a directory on tmpfs, such as /run/mfs/csi "
            f"(in a pod: an emptyDir with medium Memory, or the host's /run)"
        )


def _file_system(directory: Path) -> int:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(directory), buffer) != 0:
        error = ctypes.get_errno()
        raise ConfigError(f"secrets directory {directory}: {os.strerror(error)}")
    kind: int = struct.unpack_from("l", buffer)[0]
    return kind


def write(directory: Path, url: str, secrets: Mapping[str, str], token: str) -> None:
    """Make the files say this from now on, each in one turn. url: of the source, whose host a password is for.

    token: of a service account, '' without one.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    aws = [f"{name} = {secrets[key]}" for key, name in _AWS.items() if key in secrets]
    _put(directory / "aws-credentials", "\n".join(["[default]", *aws, ""]) if aws else "")
    _put(directory / "hf-token", secrets.get(_HUB, ""))
    _put(directory / "config.json", secrets.get(_DOCKER, ""))
    write_token(directory, token)
    login = ""
    if _USER in secrets:
        user, password = _quoted(secrets[_USER]), _quoted(secrets[_PASSWORD])
        login = f"machine {urlsplit(url).hostname or ''} login {user} password {password}\n"
    _put(directory / ".netrc", login)


def write_token(directory: Path, token: str) -> None:
    """Make the token of a service account this one, and leave the rest."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _put(directory / "web-identity-token", token)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _put(file: Path, text: str) -> None:
    if not text:
        file.unlink(missing_ok=True)
        return
    try:
        if file.read_text() == text:
            return
    except OSError:
        pass
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as opened:
        opened.write(text)
    new.replace(file)


def drop(directory: Path) -> None:
    """Forget them."""
    shutil.rmtree(directory, ignore_errors=True)


def environment(directory: Path, *, is_isolated: bool, role: str) -> dict[str, str]:
    """Of a daemon. is_isolated: nothing of the driver's own credentials is in it, only the files of `directory`."""
    found = children.environment()
    for name in _SERVICE:
        found.pop(name, None)
    if not is_isolated:
        return found
    for name in list(found):
        if (name.startswith(_FOREIGN) and name not in _KEPT) or name in _OTHERS:
            del found[name]
    found |= {
        "HOME": str(directory),
        "AWS_SHARED_CREDENTIALS_FILE": str(directory / "aws-credentials"),
        "AWS_CONFIG_FILE": str(directory / "aws-config"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "HF_TOKEN_PATH": str(directory / "hf-token"),
        "DOCKER_CONFIG": str(directory),
    }
    if role:
        found |= {
            "AWS_ROLE_ARN": role,
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(directory / "web-identity-token"),
            "AWS_ROLE_SESSION_NAME": "mfs",
        }
    return found

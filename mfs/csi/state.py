"""What the driver must know after a crash: which volume is published where, and with which daemon. Never a secret.

    salt                keys are made with it; 0600
    lock                held by the driver as long as it lives
    volumes/HASH.json   Published, HASH of volume and target; written before anything is mounted at the target
    daemons/KEY.json    Served; written before the daemon is started
    mounts/KEY          where the daemon of a key is mounted
    logs/KEY.log        what it says, cut to its end when it is long

Each file is written beside its place and renamed into it, so that it is whole or not there. Of a volume whose target
is not mounted when the driver starts nothing is kept: whoever wants it publishes it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from mfs.errors import ConfigError, StoreError

T = TypeVar("T", "Published", "Served")
_SALT_BYTES = 32
_LOG_BYTES_MAX, _LOG_KEPT_BYTES = 8 << 20, 1 << 20


@dataclass(frozen=True)
class Published:
    """One volume at one target."""

    volume_id: str
    target: str
    key: str
    """Of its daemon."""
    arguments: str
    """A digest of what it was published with, secrets aside."""
    secrets: str = ""
    """A salted digest of the secrets that it came with last, '' for none."""


@dataclass(frozen=True)
class Served:
    """What a daemon is started with, should it have to be once more."""

    config: str
    """`MountConfig.to_json`; without secrets."""
    is_isolated: bool
    """See `Volume.is_isolated`."""
    role: str
    """See `Volume.role`."""
    secrets: str = ""
    """A salted digest of the secrets that the daemon has now, '' for none."""


class State:
    """The driver's directory. One driver at a time; several threads, each with its own names.

    Methods raise StoreError where the disk fails: what cannot be read now is not said to be gone.
    """

    def __init__(self, directory: Path) -> None:
        """Raises: ConfigError if it cannot be written, or another driver has it."""
        self.directory = directory = Path(os.path.realpath(directory))  # as mountinfo has it
        try:
            for name in ("volumes", "daemons", "mounts", "logs", "keys"):
                (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise ConfigError(
                    f"state directory {directory} is another driver's, which runs: end it first"
                ) from None
            self.salt = self._salt()
        except OSError as error:
            raise ConfigError(f"state directory {directory} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Leave it to another driver."""
        os.close(self._lock)

    def _salt(self) -> bytes:
        file = self.directory / "salt"
        if not file.exists():
            _write(file, secrets.token_hex(_SALT_BYTES))
        return bytes.fromhex(file.read_text())

    def mountpoint(self, key: str) -> Path:
        """Where a daemon is mounted."""
        return self.directory / "mounts" / key

    def log_file(self, key: str) -> Path:
        """Where a daemon logs."""
        return self.directory / "logs" / f"{key}.log"

    def key_file(self, key: str) -> Path:
        """Where the public key stands that a daemon's source is signed with, if it must be."""
        return self.directory / "keys" / f"{key}.pem"

    def put_key(self, key: str, pem: str) -> None:
        """Note it, before the daemon is."""
        _write(self.key_file(key), pem)

    def volumes(self) -> Iterator[Published]:
        """All that is said to be published; what has no meaning is taken away."""
        folder = self.directory / "volumes"
        for name in sorted(_names(folder)):
            with _checked(folder / name):
                found = _read(folder / name, Published)
                if found is None:
                    (folder / name).unlink(missing_ok=True)
            if found is not None:
                yield found

    def volume(self, volume_id: str, target: str) -> Published | None:
        """What is published here."""
        file = self._file(volume_id, target)
        with _checked(file):
            found = _read(file, Published)
        return found if found and (found.volume_id, found.target) == (volume_id, target) else None

    def put(self, volume: Published) -> None:
        """Note a volume that is about to be mounted."""
        _write(self._file(volume.volume_id, volume.target), json.dumps(asdict(volume)))

    def drop(self, volume_id: str, target: str) -> None:
        """Forget a volume that is mounted no more."""
        file = self._file(volume_id, target)
        with _checked(file):
            file.unlink(missing_ok=True)

    def daemons(self) -> list[str]:
        """The keys of all daemons that were started and not ended, also of such as nothing else is known of."""
        noted = {name.removesuffix(".json") for name in _names(self.directory / "daemons")}
        with _checked(self.directory / "mounts"):
            return sorted(noted | set(os.listdir(self.directory / "mounts")))

    def served(self, key: str) -> Served | None:
        """What the daemon of a key is started with."""
        file = self.directory / "daemons" / f"{key}.json"
        with _checked(file):
            return _read(file, Served)

    def put_served(self, key: str, served: Served) -> None:
        """Note a daemon that is about to be started."""
        _write(self.directory / "daemons" / f"{key}.json", json.dumps(asdict(served)))

    def drop_served(self, key: str) -> None:
        """Forget a daemon that has ended, with its log and its key."""
        file = self.directory / "daemons" / f"{key}.json"
        with _checked(file):
            file.unlink(missing_ok=True)
            self.key_file(key).unlink(missing_ok=True)
            self.log_file(key).unlink(missing_ok=True)

    def cut_logs(self) -> None:
        """Leave the end of logs that are long. Daemons append; what one says in this very moment may be lost."""
        folder = self.directory / "logs"
        with _checked(folder):
            for file in folder.iterdir():
                with file.open("r+b") as opened:
                    if os.fstat(opened.fileno()).st_size <= _LOG_BYTES_MAX:
                        continue
                    opened.seek(-_LOG_KEPT_BYTES, os.SEEK_END)
                    opened.readline()
                    kept = opened.read()
                    opened.truncate(0)
                    opened.seek(0)
                    opened.write(kept)

    def _file(self, volume_id: str, target: str) -> Path:
        name = hashlib.sha256(f"{volume_id}\0{target}".encode()).hexdigest()[:32]
        return self.directory / "volumes" / f"{name}.json"


@contextmanager
def _checked(file: Path) -> Iterator[None]:
    """Raises: StoreError for what the disk says."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"state {file}: {error.strerror}") from error


def _names(folder: Path) -> list[str]:
    with _checked(folder):
        return [name for name in os.listdir(folder) if name.endswith(".json")]


def _read(file: Path, kind: type[T]) -> T | None:
    """None for what is not there, or has no meaning. What a later release has added is left out."""
    try:
        found = json.loads(file.read_bytes())
        known = {field.name for field in fields(kind)}
        return kind(**{name: value for name, value in found.items() if name in known})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None


def _write(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.new")
    with _checked(file):
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)

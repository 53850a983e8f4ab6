"""Starting a daemon and waiting for its word; or becoming one.

Where a service manager or a keeper has the descriptors of a mount whose holder was killed too, it goes on with them
(`mfs.control.fdstore`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mfs import children
from mfs.config import MountConfig
from mfs.control import fdstore, mountinfo, runtime
from mfs.control.ready import daemon_arguments
from mfs.errors import ConfigError, StoreError, TransientStoreError, from_wire
from mfs.logs import message_of

if TYPE_CHECKING:
    from mfs.handover import Heir

DAEMON_MODULE = "mfs.holder"
_WATCHDOG = ("WATCHDOG_USEC", "WATCHDOG_PID")
_END_S = 10.0
_ANSWER_BYTES_MAX = 1 << 20


def start_daemon(
    config: MountConfig, *, deadline_s: float, module: str = DAEMON_MODULE, heir: Heir | None = None,
    environment: Mapping[str, str] | None = None, held: Sequence[int] = (),
    told: Callable[[str], None] = lambda text: None,
) -> list[str]:  # fmt: skip
    """Start a daemon in a session of its own and wait until its tree can be used. Returns its warnings.

    deadline_s: seconds until a daemon that says nothing is ended.
    heir: connected to the daemon that hands its mount over to this one, which inherits its standard error, if it had no
        log file, and of its environment what we do not set ourselves (credentials, say).
    environment: the daemon's, whole; None makes one of ours.
    held: the descriptors of a mount that nobody serves, to go on with; they stay the caller's. A daemon that does not
        serve is then killed with its holder, before either can give the mount up: whoever kept it keeps it.
    told: called with what the daemon waits for, if it takes long.
    Raises: the error that the daemon reports; StoreError if it dies, with the last line of its log;
        TransientStoreError if it stays silent.
    An interrupt or SIGTERM while waiting ends the daemon.
    """
    if heir is not None and config.log_file is None:
        log = os.dup(heir.stderr)
    else:
        config, log = _with_log_file(config)
    log_start = os.fstat(log).st_size
    environment = _environment(heir, is_main=False) if environment is None else {**environment, **_UTF8}
    answer, answer_write = os.pipe()
    config_fd = _memory_file(config.to_json())
    try:
        process = subprocess.Popen(
            [*_command(module), *_arguments(module, config, 0, answer_write, heir, held)],
            stdin=config_fd, stdout=log, stderr=log, pass_fds=[answer_write, *held], start_new_session=True,
            cwd=children.CWD, env=environment,
        )  # fmt: skip
    finally:
        for fd in (config_fd, answer_write, log):
            os.close(fd)
    try:
        with _terminated():
            warnings = _wait(answer, process, config, log_start, deadline_s, told)
    except BaseException:
        if held:
            _kill_all(process)
        else:
            _end(process)
        raise
    finally:
        os.close(answer)
    process.returncode = 0  # it outlives us, and nobody waits for it: Popen need not warn about that
    return warnings


@contextmanager
def _terminated() -> Iterator[None]:
    """Whoever ends us meanwhile means the daemon too, which would go on in a session of its own."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def become_daemon(
    config: MountConfig, *, module: str = DAEMON_MODULE, heir: Heir | None = None, held: Sequence[int] = ()
) -> NoReturn:
    """Replace this process by the daemon, which stays with our terminal or service manager.

    heir, held: as in `start_daemon`.
    """
    config_fd = _memory_file(config.to_json())
    for fd in (config_fd, *held):
        os.set_inheritable(fd, True)
    command = [*_command(module), *_arguments(module, config, config_fd, None, heir, held)]
    environment = _environment(heir, is_main=True)
    os.chdir(children.CWD)
    os.execve(command[0], command, environment)


def store_name(config: MountConfig) -> str:
    """As what the descriptors of a mount with these settings are kept, see `control.fdstore`."""
    place = Path(mountinfo.real_mountpoint(str(config.mountpoint)))
    return fdstore.name_of(replace(config, mountpoint=place).identity())


def _arguments(
    module: str, config: MountConfig, config_fd: int, ready_fd: int | None, heir: Heir | None, held: Sequence[int]
) -> list[str]:
    arguments = daemon_arguments(config_fd=config_fd, ready_fd=ready_fd, handover=heir is not None)
    if module == DAEMON_MODULE:
        arguments = ["--store", store_name(config), *arguments]
    return [*arguments, *(["--successor", ",".join(map(str, held))] if held else [])]


_UTF8 = {"PYTHONUTF8": "1"}
"""Names of files are UTF-8 in the daemon and its workers, whatever the locale of whoever mounts says (PEP 540)."""


def _environment(heir: Heir | None, *, is_main: bool) -> dict[str, str]:
    """is_main: the daemon becomes what a service manager has started, and its watchdog looks at."""
    found = children.environment(heir.environment if heir is not None else None) | _UTF8
    for name in fdstore.VARIABLES:  # they were for us
        found.pop(name, None)
    for name in _WATCHDOG:
        if not is_main:
            found.pop(name, None)
        if heir is not None and name in heir.environment:
            found[name] = heir.environment[name]
    return found


def _command(module: str) -> list[str]:
    return children.python("-m", module)


def _with_log_file(config: MountConfig) -> tuple[MountConfig, int]:
    """A daemon without a terminal must leave its words somewhere. The settings with a log file, and it, open."""
    file = config.log_file
    if file is None:
        runtime.create_directory()
        file = runtime.log_path(mountinfo.real_mountpoint(str(config.mountpoint)))
        file.unlink(missing_ok=True)  # the last mount's; a file that a living daemon still writes keeps its inode
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"log file {file} cannot be written: {error.strerror}") from error
    return replace(config, log_file=file), fd


def _memory_file(text: str) -> int:
    """A file in memory that holds `text`, to be read from its start: secrets in it never touch a disk."""
    fd = os.memfd_create("mfs-config", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _wait(
    answer: int, process: subprocess.Popen[bytes], config: MountConfig, log_start: int, deadline_s: float,
    told: Callable[[str], None],
) -> list[str]:  # fmt: skip
    received = b""
    deadline = time.monotonic() + deadline_s
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([answer], [], [], left)[0]:
            raise TransientStoreError(
                f"the daemon was not ready after {deadline_s:g} s{_last_words(config, log_start)}"
            )
        data = os.read(answer, 65536)
        received += data
        if not data or len(received) > _ANSWER_BYTES_MAX:
            raise StoreError(f"the daemon ended while it started{_last_words(config, log_start)}")
        while received.startswith(b'{"waiting"') and b"\n" in received:
            line, _, received = received.partition(b"\n")
            told(json.loads(line)["waiting"])
    said = json.loads(received)
    if "error" in said:
        raise from_wire(said["error"]["type"], said["error"]["message"])
    return [str(warning) for warning in said["warnings"]]


def _last_words(config: MountConfig, log_start: int) -> str:
    """': what it logged last (log file …)'."""
    if config.log_file is None:
        return ", see its log"
    try:
        with open(config.log_file, "rb") as file:
            file.seek(max(log_start, os.fstat(file.fileno()).st_size - 4096))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return (
        f": {message_of(lines[-1])} (log: {config.log_file})" if lines else f" without a word (log: {config.log_file})"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a daemon that is of no use, and collect it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        try:
            process.wait(_END_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """End a holder at once with its daemon and workers, and collect it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

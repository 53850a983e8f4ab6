"""Progress of a push or a pull as it is told, from several threads: a bar for the whole and for the files under way."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mfs.cli.progress import make_bar
from mfs.cli.standard import tell
from mfs.cli.text import clean, count, rate, share, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mfs.registry.push import Step

FILES_SHOWN_MAX = 6
"""Bars of files at once."""
FILE_SHOWN_BYTES = 8 << 20
"""Smaller files are done before anybody could read their bar."""
_LINE_EVERY_S = 5.0


class TransferProgress:
    """Show steps on stderr as they are told: `with TransferProgress() as told: push(…, told)`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: Progress | None = make_bar() if sys.stderr.isatty() else None
        self._phase, self._done, self._total = "", 0, 0
        self._whole: TaskID | None = None
        self._files: dict[str, tuple[TaskID, int]] = {}
        self._began_s = self._said_s = 0.0

    def __enter__(self) -> TransferProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, step: Step) -> None:
        """Take a step in."""
        with self._lock:
            if step.phase == "waiting":
                tell(clean(step.path))
                return
            if not step.path:
                self._begin(step)
            self._done += step.done
            if self._bar is None:
                self._line()
            elif self._whole is not None:
                self._bar.update(self._whole, completed=self._done)
                if step.path and step.phase != "asking" and step.of_file >= FILE_SHOWN_BYTES:
                    self._show_file(self._bar, step)

    def _begin(self, step: Step) -> None:
        self._phase, self._done, self._total = step.phase, 0, step.total
        self._began_s = self._said_s = time.monotonic()
        if self._bar:
            for task, _ in self._files.values():
                self._bar.remove_task(task)
            self._files.clear()
            if self._whole is not None:
                self._bar.remove_task(self._whole)
            # Questions are no bytes, and are over before a bar of them says anything.
            shown = step.phase != "asking"
            self._whole = self._bar.add_task(step.phase, total=step.total or None) if shown else None

    def _show_file(self, bar: Progress, step: Step) -> None:
        found = self._files.get(step.path)
        if found is None:
            if len(self._files) >= FILES_SHOWN_MAX:
                return
            name = clean(step.path)
            short = name if len(name) <= 40 else f"{name[:19]}…{name[-20:]}"
            found = bar.add_task(f"  {short}", total=step.of_file), 0
        task, done = found[0], found[1] + step.done
        bar.update(task, completed=done)
        self._files[step.path] = task, done
        if done >= step.of_file:
            bar.remove_task(task)
            del self._files[step.path]

    def _line(self) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < _LINE_EVERY_S:
            return
        self._said_s = now_s
        if self._phase == "asking":
            tell(f"asking for {count(self._done, 'chunk')} of {self._total}")
            return
        done = f"{size(self._done)} of {size(self._total)} ({share(self._done, self._total) or '0 %'})"
        tell(f"{self._phase} {done}, {rate(self._done, now_s - self._began_s)}")

"""What real libraries did to a mount, as small text: which ranges the kernel asked for, in the order it asked.

    file 0 90868376 model-00001-of-00005.safetensors
    table 0 10168 46891288 47087896    of a safetensors file: where data starts, then where each tensor ends
    open 0
    read 0 131072 262144               of file 0, from here, so many bytes; asked for by 1 MiB at most
    close 0

Recorded by `python -m tests.frameworks.record`. What a reader wants reaches a file system through the kernel's
read-around and read-ahead (4 MiB here, Linux 6.18), so that is in a trace too; what the page cache answers is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mfs.safetensors import header_bytes_needed, parse_header

FOLDER = Path(__file__).parent / "traces"
REQUEST_BYTES = 1 << 20
"""What the kernel asks a FUSE file system for at once, at most."""
_FILE_BYTES_MIN = 1 << 20  # smaller ones (configurations, tokenizers) are no matter for a prefetcher


class Step(NamedTuple):
    """One thing a reader did; start and length are 0 where they mean nothing."""

    op: str
    file: int
    start: int = 0
    length: int = 0


@dataclass
class Trace:
    """A recorded run."""

    files: list[tuple[str, int]] = field(default_factory=list)
    """(name, size in bytes)."""
    tables: dict[int, list[int]] = field(default_factory=dict)
    """By file: where data starts, then where each tensor ends."""
    steps: list[Step] = field(default_factory=list)

    @property
    def touched_bytes(self) -> int:
        """Bytes that were asked for at least once."""
        total = 0
        for number in range(len(self.files)):
            reached = 0
            for step in sorted(step for step in self.steps if step.op == "read" and step.file == number):
                total += max(0, step.start + step.length - max(step.start, reached))
                reached = max(reached, step.start + step.length)
        return total

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], root: Path) -> Trace:
        """From the records of `mfs watch`, and the files themselves for their tables."""
        trace, numbers = cls(), dict[str, int]()
        # A read is told once it is answered; what it makes of the pattern depends on when it was asked.
        for record in sorted(records, key=lambda record: record["at_s"] - record.get("waited_s", 0.0)):
            name = record["file"]
            if record["op"] == "fetch" or (root / name).stat().st_size < _FILE_BYTES_MIN:
                continue
            if name not in numbers:
                numbers[name] = trace._add_file(root / name)
            trace._add(Step(record["op"], numbers[name], record.get("start", 0), _length(record)))
        return trace

    def _add_file(self, path: Path) -> int:
        number = len(self.files)
        self.files.append((path.name, path.stat().st_size))
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                head = file.read(8)
                header = parse_header(head + file.read(header_bytes_needed(head) - 8), path.stat().st_size)
            self.tables[number] = [header.data_start, *(tensor.stop for tensor in header.tensors)]
        return number

    def _add(self, step: Step) -> None:
        last = self.steps[-1] if self.steps else None
        if last and last[:2] == step[:2] == ("read", step.file) and last.start + last.length == step.start:
            self.steps[-1] = last._replace(length=last.length + step.length)
        else:
            self.steps.append(step)

    def write(self, path: Path) -> None:
        """As text; see the module's docstring."""
        lines = [f"file {number} {size} {name}" for number, (name, size) in enumerate(self.files)]
        lines += [f"table {number} {' '.join(map(str, table))}" for number, table in self.tables.items()]
        lines += [" ".join(map(str, step if step.op == "read" else step[:2])) for step in self.steps]
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    @classmethod
    def read(cls, name: str) -> Trace:
        """The trace in `FOLDER` of this name."""
        trace = cls()
        for line in (FOLDER / f"{name}.trace").read_text().splitlines():
            word, *rest = line.split(" ", 3 if line.startswith("file") else -1)
            if word == "file":
                trace.files.append((rest[2], int(rest[1])))
            elif word == "table":
                trace.tables[int(rest[0])] = [int(number) for number in rest[1:]]
            else:
                trace.steps.append(Step(word, *(int(number) for number in rest)))
        return trace


def _length(record: Mapping[str, Any]) -> int:
    length: int = record.get("stop", 0) - record.get("start", 0)
    return length

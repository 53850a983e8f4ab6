"""Where rich is used for tables: aligned for eyes, plain for pipes. Imported only by commands that print one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mfs.cli.text import clean

_PIPE_COLUMNS = 4096  # in a pipe nothing must be wrapped or cut


def console(*, stderr: bool = False) -> Console:
    """A console without markup or highlighting: names from strangers stay what they are."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Aligned columns under quiet titles. A title that starts with '>' makes a column of numbers, right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in columns:
        numeric = title.startswith(">")
        made.add_column(title.lstrip(">"), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row))
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print a table on stdout."""
    print_plain(console(), table(columns, rows))


def print_plain(out: Console, what: RenderableType) -> None:
    """Print without the blanks that rich fills lines with: they wrap in a narrowed window and disturb a diff."""
    with out.capture() as captured:
        out.print(what)
    for line in captured.get().splitlines():
        print(line.rstrip())

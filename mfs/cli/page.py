"""Help like a manual page: what a command does, its options, examples, exit status, files, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from mfs.cli.standard import tell

EXIT_STATUS = """\
0    done
1    failed; one line on stderr says what and where
2    the command was used wrongly
130  interrupted"""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON: exact numbers, for programs.")


class Page(click.Command):
    """A command whose help carries more sections than click's.

    sections: title -> text, printed as it stands (no refilling), in this order after the options.
    usages: further usage lines, where one synopsis cannot say it.
    """

    def __init__(
        self, *args: Any, sections: dict[str, str] | None = None, usages: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sections = {"Exit status": EXIT_STATUS} | (sections or {})
        self._usages = usages

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for number, usage in enumerate(self._usages or (" ".join(self.collect_usage_pieces(ctx)),)):
            formatter.write_usage(ctx.command_path, usage, prefix="   or: " if number else "Usage: ")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_sections(formatter, self._sections)


class Pages(click.Group):
    """A group of commands. Alone it shows its page, as wrong usage; what click does of that differs by its release."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            tell(ctx.get_help())
            ctx.exit(2)
        return super().parse_args(ctx, args)


class Front(Pages):
    """The front page: lists the commands by what they are for, then sections as `Page` has them."""

    groups: Sequence[tuple[str, Sequence[str]]] = ()
    """(title, names of commands)."""
    sections: Mapping[str, str] = {}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in self.groups:
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(70)) for name in names])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_sections(formatter, self.sections)


_ORDER = {"Examples": 0, "Files": 2, "Environment": 3, "Exit status": 4}


def write_sections(formatter: click.HelpFormatter, sections: Mapping[str, str]) -> None:
    """Titles with indented text below: examples first, what all pages have last."""
    for title in sorted(sections, key=lambda title: _ORDER.get(title, 1)):
        with formatter.section(title):
            for line in sections[title].splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}".rstrip() + "\n")

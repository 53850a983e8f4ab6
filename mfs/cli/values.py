"""What values of options are, where click has no type for them: read by our own parsers, so that all say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mfs.units import parse_duration, parse_size

if TYPE_CHECKING:
    ParamType = click.ParamType
else:

    class ParamType(click.ParamType):
        """click's own, generic in all releases: before 8.4 only its stubs are, and other programs hold it there."""

        def __class_getitem__(cls, _: Any) -> type[ParamType]:
            return cls


class Parsed(ParamType[Any]):
    """A click type from one of our parsers."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE, DURATION = Parsed("size", parse_size), Parsed("duration", parse_duration)

"""What a model card says in its front matter that a manifest should: licence and base model. Pure.

The front matter is YAML; read are plain `key: value` lines and lists of them, as the Hub's own cards have these keys.
Anything else there is nobody's business here, and no error.
"""

from __future__ import annotations

import re

NAME = "README.md"
KEYS = ("license", "license_name", "base_model", "base_model_relation", "library_name", "pipeline_tag")
HEAD_BYTES = 64 << 10
"""Of a card that is looked at."""

_VALUE_CHARACTERS_MAX = 1000
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):(?:\s+(.*))?")
_ITEM = re.compile(r"\s*-\s+(.+)")


def front_matter(head: bytes) -> dict[str, str]:
    """What a card's first bytes say of KEYS; several values with ', ' between them."""
    lines = head.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if lines[0].rstrip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.rstrip() in ("---", "..."):
            return {key: ", ".join(values) for key, values in found.items() if values}
        if match := _LINE.fullmatch(line.rstrip()):
            key = match[1]
            values = [match[2]] if match[2] else []
        elif (item := _ITEM.fullmatch(line.rstrip())) and key:
            values = [item[1]]
        else:
            key, values = "", []
        if key in KEYS:
            kept = found.setdefault(key, [])
            kept += [text for value in values if (text := _text(value)) and len(kept) < 20]
    return {}  # no end: no front matter


def _text(value: str) -> str:
    """A plain or quoted scalar; '' for what is more than that."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    if not value or value[0] in "[{|>&*!%@`#" or not value.isprintable():
        return ""
    return value[:_VALUE_CHARACTERS_MAX]

"""Which files a --materialize pattern names."""

from __future__ import annotations

import pytest

from mfs.materialize import matches


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("**", "a/b/c"),
        ("*", "a"),
        ("*", "a/b"),
        ("llama", "llama/1/w.safetensors"),
        ("llama", "prod/llama/w"),
        ("llama*", "prod/llama-3-8b/w"),
        ("*.safetensors", "prod/llama/1/w.safetensors"),
        ("prod/llama", "prod/llama/1/w"),
        ("/llama", "llama/1/w"),
        ("prod/*/1", "prod/llama/1/w"),
        ("prod/**/w", "prod/llama/1/w"),
        ("prod/**/w", "prod/w"),
        ("**/1/*.bin", "llama/1/w.bin"),
        ("m[ab]/w", "ma/w"),
        ("a?/w", "ab/w"),
        ("prod/**", "prod/a"),
    ],
)
def test_names(pattern: str, path: str) -> None:
    assert matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("llama", "llama-2/w"),
        ("/llama", "prod/llama/w"),
        ("llama/1", "prod/llama/1/w"),
        ("prod/*/w", "prod/llama/1/w"),
        ("*.bin", "w.bin.txt"),
        ("prod/llama/1/w/x", "prod/llama/1/w"),
        ("Llama", "llama/w"),
        ("prod/**", "prod"),
    ],
)
def test_does_not_name(pattern: str, path: str) -> None:
    assert not matches(pattern, path)

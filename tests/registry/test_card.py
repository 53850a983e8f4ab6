"""What of a model card becomes an annotation."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfs.registry.card import front_matter
from mfs.registry.push import Options
from tests.registry.models import do_push, write_model

CARD = """---
language: en
license: apache-2.0
base_model:
- "org/llama"
-   other
tags: [a, b]
model-index:
- name: x
  results: []
library_name: 'transformers'
---
# Title
license: not this
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_plain_values_and_lists_are_read(newline: str) -> None:
    assert front_matter(CARD.replace("\n", newline).encode()) == {
        "license": "apache-2.0", "base_model": "org/llama, other", "library_name": "transformers",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "# Title\n", "---\nlicense: mit\n", "---\nlicense: [mit]\n---\n", "---\n---\n"])
def test_what_is_no_front_matter_says_nothing(text: str) -> None:
    assert front_matter(text.encode()) == {}


@given(st.binary(max_size=300))
def test_noise_is_no_error(noise: bytes) -> None:
    front_matter(b"---\nlicense:" + noise + b"\n---\n")


def test_a_card_annotates_the_revision_and_the_author_wins(tmp_path: Path) -> None:
    (tmp_path / "reg").mkdir()
    folder = write_model(tmp_path / "m", {})
    (folder / "README.md").write_text(CARD)
    options = Options(annotations={"license": "mine", "run": "7"})
    said = dict(do_push(f"mfs+file://{tmp_path}/reg/m:v1", folder, options).revision.manifest.annotations)
    assert said == {"license": "mine", "run": "7", "base_model": "org/llama, other", "library_name": "transformers"}

"""The token that is sent is the one huggingface_hub would send."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils._headers import get_token_to_send

from mfs.sources.hf_access import hub_token


@pytest.mark.parametrize(
    ("environment", "file"),
    [
        ({}, None),
        ({}, "hf_file"),
        ({}, "\r\n hf_file \r\n"),
        ({}, "\n"),
        ({"HF_TOKEN": "hf_new"}, "hf_file"),
        ({"HF_TOKEN": " hf_new\n"}, None),
        ({"HF_TOKEN": "hf_\nnew"}, None),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_old"}, "hf_file"),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_old\n"}, None),
        ({"HF_TOKEN": "hf_new", "HUGGING_FACE_HUB_TOKEN": "hf_old"}, "hf_file"),
        ({"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": "hf_old"}, "hf_file"),
        ({"HF_TOKEN": " ", "HUGGING_FACE_HUB_TOKEN": "hf_old"}, "hf_file"),
        ({"HF_TOKEN": " ", "HUGGING_FACE_HUB_TOKEN": ""}, None),
        ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_TOKEN": "hf_new"}, "hf_file"),
        ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "yes"}, "hf_file"),
        ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "True"}, "hf_file"),
        ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "HF_TOKEN": "hf_new"}, None),
    ],
)
def test_the_same_token(
    environment: dict[str, str], file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if file is not None:
        path.write_text(file)
    for name, value in (environment | {"HF_TOKEN_PATH": str(path)}).items():
        monkeypatch.setenv(name, value)
    # Read when huggingface_hub is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(path))
    disabled = huggingface_hub.constants._is_true(environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", disabled)
    assert hub_token() == get_token_to_send(None)


def test_where_the_token_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "variable")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable, value, place in (
        ("", "", ".cache/huggingface/token"),
        ("XDG_CACHE_HOME", f"{tmp_path}/xdg", "xdg/huggingface/token"),
        ("HF_HOME", "~/hf", "hf/token"),
        ("HF_HOME", f"{tmp_path}/$PLACE", "variable/token"),
        ("HF_TOKEN_PATH", "~/$PLACE.txt", "variable.txt"),
    ):
        if variable:
            monkeypatch.setenv(variable, value)
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(f"hf_{place}")
        assert hub_token() == f"hf_{place}"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"hf_\xc3\xa4", b"hf_\x00x"])
def test_a_token_that_no_header_can_carry_is_not_used_and_said(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_bytes(content)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    with caplog.at_level(logging.WARNING, logger="mfs"):
        assert hub_token() is None
    assert len(caplog.messages) == 1
    assert str(tmp_path / "token") in caplog.messages[0]

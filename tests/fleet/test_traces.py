"""Recorded traffic in the shape of Azure's traces; files that are not, told line by line."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs.errors import UsageError
from tools.fleet import traces
from tools.fleet.traffic import Traffic

LLM = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109

2023-11-16 18:15:48.2220000,879,55
"""
FUNCTIONS = """HashOwner,HashApp,HashFunction,Trigger,1,2,3
o,a,f1,http,0,1,0
o,a,f2,timer,5,5,10
o,a,f3,queue,2,0,1
"""


def _file(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_llm(tmp_path: Path) -> None:
    requests = traces.read_llm(_file(tmp_path, LLM), [0.5, 0.5], seed=1)
    assert requests.at_s.tolist() == pytest.approx([0.0, 1.54141, 4.314579], abs=1e-5)
    assert requests.context_tokens.tolist() == [374, 879, 396]
    assert requests.generated_tokens.tolist() == [44, 55, 109]
    assert set(requests.service.tolist()) <= {0, 1}
    assert requests.duration_s == pytest.approx(4.314579, abs=1e-5)


def test_llm_with_zones(tmp_path: Path) -> None:
    text = LLM.splitlines()[0] + "\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,10,1\n"
    assert traces.read_llm(_file(tmp_path, text), [1.0], 1).at_s.tolist() == pytest.approx([0, 0.99007])


def test_functions(tmp_path: Path) -> None:
    requests = traces.read_functions(_file(tmp_path, FUNCTIONS), 2, Traffic(), seed=1)
    counts = np.zeros((2, 3), dtype=int)
    np.add.at(counts, (requests.service, (requests.at_s // 60).astype(int)), 1)
    assert counts.tolist() == [[5, 5, 10], [2, 0, 1]]
    assert requests.duration_s == 180


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "trace.csv:1: expected the columns TIMESTAMP,ContextTokens,GeneratedTokens, got nothing"),
        ("a,b\n", "trace.csv:1: expected the columns .*, got a,b"),
        (LLM.splitlines()[0], "expected a request, got the header alone"),
        (LLM + "2023-11-16 18:15:46,1\n", "trace.csv:6: expected 3 columns, got 2"),
        (LLM + "yesterday,1,1\n", "trace.csv:6: expected a moment .*, got 'yesterday'"),
        (LLM + "2023-11-16 18:15:46,-1,1\n", "trace.csv:6: expected a whole .* as ContextTokens, got '-1'"),
        (LLM + "2023-11-16 18:15:46,1,0\n", "as GeneratedTokens, got '0'"),
        (LLM + "2023-11-16 18:15:46,1,1e3\n", "as GeneratedTokens, got '1e3'"),
        (LLM + f"2023-11-16 18:15:46,1,{'9' * 5000}\n", "as GeneratedTokens, got '9999"),
        (b"\xff\xfe,1", "expected a CSV file in UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_llm_trace(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        traces.read_llm(_file(tmp_path, text), [1.0], 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("HashOwner,Trigger\n", "columns that end in 1,2,3"),
        ("f,1,2,4\n", "columns that end in 1,2,3"),
        ("f,1,2\nx,1\n", "trace.csv:2: expected 3 columns, got 2"),
        ("f,1,2\nx,1,many\n", "trace.csv:2: expected a whole number .* as minute 2, got 'many'"),
        ("f,1\nx,1\n", "expected 2 functions, one for each service, got 1"),
        ("f,1\nx,0\ny,0\n", "expected 1 to .* invocations"),
    ],
)
def test_what_is_no_functions_trace(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        traces.read_functions(_file(tmp_path, text), 2, Traffic(), 1)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.csv: cannot be read: No such file"):
        traces.read_llm(tmp_path / "no.csv", [1.0], 1)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: ("TIMESTAMP,ContextTokens,GeneratedTokens\n" + text).encode())
)
def test_any_bytes_are_a_trace_or_one_line_of_complaint(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _file(Path(folder), content)
        for read in (lambda: traces.read_llm(path, [1.0], 1), lambda: traces.read_functions(path, 1, Traffic(), 1)):
            said = ""
            try:
                read()
            except UsageError as error:
                said = str(error)
            assert "\n" not in said

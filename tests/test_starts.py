"""What processes of ours do not import: each mount starts four of them, and half of a start was modules nobody used.

A module is imported for good, by any room that asks for it at its top; so what must stay away is said here.
"""

from __future__ import annotations

import subprocess

import pytest

from mfs import children

HTTP = {"http.client", "ssl", "email", "boto3", "botocore"}
PARALLEL = {"asyncio", "joblib", "multiprocessing", "tqdm"}


def imported(*code: str) -> set[str]:
    """What a fresh process of ours has imported by this, beside what Python itself and the environment have."""
    lines = ["import sys", "before = set(sys.modules)", *code, "print(*sorted(set(sys.modules) - before))"]
    command = children.python("-c", "\n".join(lines))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=children.CWD, env=children.environment(), timeout=60, check=True
    )
    return set(done.stdout.split())


class TestAProcessImportsOnlyWhatItNeeds:
    @pytest.mark.parametrize(
        ("what", "away"),
        [
            ("mfs.holder", {"trio", "logging", "json", "typing", "pathlib"}),
            ("mfs.workers.process", {"trio", "h11", "pyfuse3", *HTTP, *PARALLEL}),
            ("mfs.daemon", {"numpy", "mmap_ninja", "boto3", "http.client", "xml", *PARALLEL}),
            ("mfs.tracing.process", {"trio", "numpy", "opentelemetry", *PARALLEL}),
            ("mfs.cli", {"trio", "numpy", "rich", "boto3", "http.client", *PARALLEL}),
            ("gpuload.cli", {"trio", "numpy", "rich", "torch", *PARALLEL}),
            ("gpuload.client.asking, gpuload.cli.options", {"trio", "numpy", "rich", "torch", *PARALLEL}),
            ("gpuload.server.daemon", {"numpy", "torch", "boto3", *PARALLEL}),
        ],
    )
    def test_when_it_starts(self, what: str, away: set[str]) -> None:
        assert not away & imported(f"import {what}")

    def test_a_folder_is_opened_without_a_word_of_http(self) -> None:
        code = "from mfs.workers import process", "process.open_source('/models')"
        assert not HTTP & imported(*code)


class TestMmapNinja:
    def test_what_it_imports_for_other_work_is_there_when_called(self) -> None:
        """In parallel, with a progress bar, in the process that imported it without either."""
        code = (
            "import tempfile",
            "from mfs.cache.ninja import ninja",
            "assert not {'joblib', 'tqdm.auto'} & sys.modules.keys()",
            "from mmap_ninja.base import from_indexable_base",
            "with tempfile.TemporaryDirectory() as folder:",
            "    made = from_indexable_base(",
            "        folder + '/t', [[1], [2], [3]], 2, ninja.from_ndarray, ninja.extend, n_jobs=2, verbose=True)",
            "    assert ninja.open_existing(folder + '/t').tolist() == [[1], [2], [3]]",
        )
        assert {"joblib", "tqdm.auto"} <= imported(*code)

"""Recorded traffic: CSV files in the shape of two public traces of Azure's, checked line by line.

LLM inference (AzurePublicDataset, AzureLLMInferenceTrace_*.csv): TIMESTAMP,ContextTokens,GeneratedTokens, a line a
request. It does not say which model was asked, so its requests are dealt out to services by popularity.
Functions (AzureFunctionsInvocationTraceFor..., invocations_per_function_md.anon.d*.csv): some columns of text, then
1,2,3,…: invocations in each minute, a line for each function. A function is a service; tokens are drawn.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mfs.errors import UsageError
from tools.fleet.traffic import REQUESTS_MAX, Requests, Traffic, draw_tokens

LLM_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TOKENS_MAX = 100_000_000
_MINUTES_MAX = 1440 * 31


def read_llm(path: Path, shares: Sequence[float], seed: int) -> Requests:
    """Every request of the file, dealt out to len(shares) services; time begins with the first.

    Raises: UsageError naming file, line, what was expected and what is there.
    """
    at, context, generated = [], [], []
    lines = _lines(path)
    number, header = next(lines, (1, []))
    if tuple(header) != LLM_COLUMNS:
        raise _wrong(path, number, f"the columns {','.join(LLM_COLUMNS)}", ",".join(header) or "nothing")
    for number, row in lines:
        if len(row) != len(LLM_COLUMNS):
            raise _wrong(path, number, f"{len(LLM_COLUMNS)} columns", f"{len(row)}")
        at.append(_moment_s(path, number, row[0]))
        context.append(_count(path, number, "ContextTokens", row[1], 0, _TOKENS_MAX))
        generated.append(_count(path, number, "GeneratedTokens", row[2], 1, _TOKENS_MAX))
        if len(at) > REQUESTS_MAX:
            raise _wrong(path, number, f"at most {REQUESTS_MAX:,} requests", "more")
    if not at:
        raise _wrong(path, number, "a request", "the header alone")
    since_s = np.array(at) - min(at)
    order = np.argsort(since_s, kind="stable")
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    service = rng.choice(len(shares), len(at), p=np.array(shares))
    context_tokens, generated_tokens = (np.array(column, dtype=np.float64)[order] for column in (context, generated))
    return Requests(since_s[order], service, context_tokens, generated_tokens, duration_s=float(since_s.max()))


def read_functions(path: Path, services_count: int, traffic: Traffic, seed: int) -> Requests:
    """The busiest `services_count` functions of the file, as services; a minute's invocations are spread over it evenly
    at random. Raises: UsageError naming file, line, what was expected and what is there.
    """
    lines = _lines(path)
    number, header = next(lines, (1, []))
    first = next((i for i, name in enumerate(header) if name == "1"), None)
    minutes = [str(minute + 1) for minute in range(len(header) - (first or 0))]
    if first is None or header[first:] != minutes or len(minutes) > _MINUTES_MAX:
        raise _wrong(path, number, "columns that end in 1,2,3,… (minutes)", ",".join(header)[:80] or "nothing")
    rows = []
    for number, row in lines:
        if len(row) != len(header):
            raise _wrong(path, number, f"{len(header)} columns", f"{len(row)}")
        counts = [
            _count(path, number, f"minute {minute}", text, 0, REQUESTS_MAX)
            for minute, text in zip(minutes, row[first:], strict=True)
        ]
        rows.append(np.array(counts, dtype=np.int64))
    if len(rows) < services_count:
        raise _wrong(path, number, f"{services_count} functions, one for each service", f"{len(rows)}")
    busiest = sorted(rows, key=lambda counts: -int(counts.sum()))[:services_count]
    if not 0 < sum(int(counts.sum()) for counts in busiest) <= REQUESTS_MAX:
        raise UsageError(f"{path}: expected 1 to {REQUESTS_MAX:,} invocations in all, got none or more")
    times = []
    for each, sequence in zip(busiest, np.random.SeedSequence(seed).spawn(services_count), strict=True):
        begins = np.repeat(np.arange(len(each)) * 60.0, each)
        times.append(begins + np.random.default_rng(sequence).uniform(0, 60, len(begins)))
    service = np.repeat(np.arange(services_count), [len(at) for at in times])
    at_s = np.concatenate(times)
    order = np.argsort(at_s, kind="stable")
    tokens = draw_tokens(traffic, len(at_s), np.random.default_rng(np.random.SeedSequence((seed, 1))))
    return Requests(at_s[order], service[order], *tokens, duration_s=60.0 * len(minutes))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 1, and what stands there; empty lines are passed over."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a CSV file in UTF-8: {error}") from None


def _moment_s(path: Path, number: int, text: str) -> float:
    """Seconds of a moment as '2023-11-16 18:15:46.6805900', with or without a zone; without, as if it were UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    except (ValueError, OverflowError):
        raise _wrong(path, number, "a moment such as 2023-11-16 18:15:46.680590 as TIMESTAMP", repr(text)) from None


def _count(path: Path, number: int, what: str, text: str, least: int, most: int) -> int:
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdigit() and least <= int(stripped[:20]) <= most):
        raise _wrong(path, number, f"a whole number from {least} to {most:,} as {what}", repr(text[:40]))
    return int(stripped)


def _wrong(path: Path, number: int, expected: str, got: str) -> UsageError:
    return UsageError(f"{path}:{number}: expected {expected}, got {got}")

"""mfs tag, rollback, log, rm, gc and fsck, as a person uses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
import pytest

from mfs.cli.app import cli
from mfs.cli.run import run
from mfs.registry import layout
from mfs.registry.store import Store
from mfs.sources.options import SourceOptions
from mfs.testing.store_suite import keys
from tests.registry.places import FolderPlace
from tests.registry.revisions import age, chunk_of, put_chunk, put_simple, tag

Run = Callable[..., str]


@pytest.fixture
def mfs(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str, status: int = 0) -> str:
        got = run(cli, args)
        out, err = capsys.readouterr()
        assert got == status, f"{out}\n{err}"
        assert "Traceback" not in err
        assert status == 0 or out or len(err.splitlines()) == 1
        return out or err

    return call


@pytest.fixture
def revisions(place: FolderPlace, store: Store) -> list[str]:
    """v1, v2 and v3 of llama; prod means v3, after v1."""
    made = [put_simple(place, "llama", {"a": b"v%d" % number}) for number in (1, 2, 3)]
    for number, revision in enumerate(made, 1):
        tag(store, "llama", f"v{number}", revision)
    tag(store, "llama", "prod", made[0])
    tag(store, "llama", "prod", made[2])
    return made


def parsed(text: str) -> Any:
    return json.loads(text)


def test_a_tag_is_moved_and_moved_back(mfs: Run, place: FolderPlace, revisions: list[str]) -> None:
    v1, v2, v3 = (f"sha256:{revision[:12]}" for revision in revisions)
    assert mfs("tag", f"{place.url}/llama:v2", "prod") == f"llama:prod: {v3} → {v2}\n"
    assert mfs("rollback", f"{place.url}/llama:prod") == f"llama:prod: {v2} → {v3}\n"
    assert mfs("rollback", f"{place.url}/llama:prod") == f"llama:prod: {v3} → {v1}\n"
    assert "no revisions before this one" in mfs("rollback", f"{place.url}/llama:prod", status=2)
    assert mfs("tag", f"{place.url}/llama@sha256:{revisions[1]}", "new") == f"llama:new: - → {v2}\n"
    said = parsed(mfs("log", "--json", f"{place.url}/llama:prod"))
    called = [f"sha256:{revision}" for revision in revisions]  # in full, as addresses call them
    assert [(move["manifest"], move["how"]) for move in said] == [
        (called[0], "rollback"), (called[2], "rollback"), (called[1], "tag"), (called[2], "push"), (called[0], "push"),
    ]  # fmt: skip
    assert [move["previous"] for move in said] == [*(move["manifest"] for move in said[1:]), None]
    assert said[2]["note"] == "llama:v2"
    table = mfs("log", place.url)
    assert [line for line in table.splitlines() if "llama:new" in line and v2 in line]
    assert len(table.splitlines()) == 1 + 5 + 3 + 1


def test_a_damaged_move_is_named_and_the_others_shown(mfs: Run, place: FolderPlace, revisions: list[str]) -> None:
    place.put(layout.tag_key("llama", "prod", 1), b"damaged")
    assert "llama:prod" in mfs("log", f"{place.url}/llama:prod")
    assert len(parsed(mfs("log", "--json", place.url))) == 4


@pytest.mark.parametrize("text", ["k=\udcff", "k=\x1b[2J", "k=" + "x" * (2 << 20)], ids=["bytes", "control", "long"])
def test_annotations_that_cannot_be_are_said_before_anything_else(mfs: Run, place: FolderPlace, text: str) -> None:
    assert "--annotate" in mfs("push", str(place.root), f"{place.url}/llama:v1", "--annotate", text, status=2)


def test_how_a_registry_is_reached_is_said_as_for_a_mount() -> None:
    """--unsigned too."""
    from mfs.cli.registries import REACHING, reached

    names = {option for _, option, _ in REACHING}
    for command in ("mount", "push", "log", "gc", "diff", "verify", "sign"):
        found = cli.get_command(click.Context(cli), command)
        assert found is not None
        assert names <= {option for param in found.params for option in param.opts}
    assert reached({"unsigned": True, "profile": None}) == SourceOptions(unsigned=True)


def test_a_tag_is_removed_and_brought_back(mfs: Run, place: FolderPlace, revisions: list[str]) -> None:
    assert mfs("rm", f"{place.url}/llama:v1").endswith("→ -\n")
    assert "no such tag" in mfs("rm", f"{place.url}/llama:v1", status=1)
    assert "no such tag" in mfs("tag", f"{place.url}/llama:v1", "other", status=1)
    assert mfs("rollback", f"{place.url}/llama:v1") == f"llama:v1: - → sha256:{revisions[0][:12]}\n"


def test_a_collection_asks_first(mfs: Run, place: FolderPlace, store: Store, revisions: list[str]) -> None:
    put_chunk(place, b"lost")
    age(place.root)
    said = mfs("gc", place.url)
    assert "1 chunk" in said
    assert "--yes" in said
    assert place.get(layout.chunk_key(chunk_of(b"lost")))
    assert parsed(mfs("gc", "--json", place.url))["chunks_count"] == 1
    assert "deleted" in mfs("gc", "--yes", place.url)
    assert not place.get(layout.chunk_key(chunk_of(b"lost")))
    mfs("rm", f"{place.url}/llama:v2")
    for path in (place.root / "tags").rglob("*"):
        if path.is_file():
            age(path.parent)
    assert parsed(mfs("gc", "--yes", "--json", "--grace", "1h", place.url))["revisions"] == [
        f"llama@sha256:{revisions[1]}"
    ]  # fmt: skip
    assert len(keys(store, "manifests/")) == 2


def test_fsck_says_what_is_missing_and_fails(mfs: Run, place: FolderPlace, revisions: list[str]) -> None:
    assert "0 objects missing or damaged" in mfs("fsck", "--data", place.url)
    (place.root / layout.chunk_key(chunk_of(b"v3"))).unlink()
    said = mfs("fsck", place.url, status=1)
    assert f"{layout.chunk_key(chunk_of(b'v3'))}: missing" in said
    assert "llama:prod" in said
    assert f"file llama@sha256:{revisions[2][:12]}/a" in said
    (damage,) = parsed(mfs("fsck", "--json", place.url, status=1))["damages"]
    assert damage["what"] == "missing"


def test_fsck_drops_what_is_damaged(mfs: Run, place: FolderPlace, revisions: list[str]) -> None:
    key = layout.chunk_key(chunk_of(b"v3"))
    body = place.get(key) or b""
    place.put(key, body[:-1] + bytes([body[-1] ^ 1]))
    assert "0 objects missing or damaged" in mfs("fsck", place.url)
    assert "'mfs fsck --data --drop'" in mfs("fsck", "--data", place.url, status=1)
    assert place.get(key) is not None
    assert f"{key}: chunk {chunk_of(b'v3')[:12]}: frame 0 holds" in mfs("fsck", "--data", "--drop", place.url, status=1)
    assert place.get(key) is None
    assert keys(place.store(), "work/") == []
    assert f"{key}: missing" in mfs("fsck", "--data", "--drop", place.url, status=1)


@pytest.mark.parametrize(
    ("args", "status", "complaint"),
    [
        (("log", "mfs+file://{root}/nowhere/llama:v1"), 1, "no registry"),
        (("log", "mfs+file://{root}/bert"), 1, "was ever moved"),
        (("log", "s3://bucket/x"), 2, "not a registry"),
        (("rm", "mfs+file://{root}/llama"), 2, "expected …/MODEL:TAG"),
        (("rollback", "mfs+file://{root}/llama:nope"), 1, "no such tag"),
        (("tag", "mfs+file://{root}/llama:v1", "a/b"), 2, "expected a tag"),
        (("tag", "mfs+file://{root}/llama", "v1"), 2, "one revision"),
        (("tag", "mfs+file://{root}/llama@sha256:" + "9" * 64, "x"), 1, "is not there"),
        (("gc", "mfs+file://{root}/llama"), 2, "name the registry"),
        (("gc", "--grace", "soon", "mfs+file://{root}"), 2, "soon"),
        (("fsck", "--drop", "mfs+file://{root}"), 2, "--data --drop"),
    ],
)
def test_what_goes_wrong_is_one_line(
    mfs: Run, place: FolderPlace, revisions: list[str], args: tuple[str, ...], status: int, complaint: str
) -> None:
    assert complaint in mfs(*(arg.format(root=place.root) for arg in args), status=status)


def test_a_registry_of_another_version_is_refused(mfs: Run, place: FolderPlace) -> None:
    place.put(layout.MARKER_KEY, b'{"format": "mfs-registry", "version": 2}')
    assert "version 2, this mfs reads 1" in mfs("log", place.url, status=1)

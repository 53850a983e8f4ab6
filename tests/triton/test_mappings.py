"""Weights that a model maps and touches later: with --materialize an inference never meets a page that cannot come."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mount import touching
from tests.servers.liar import LiarServer, Lie
from tests.servers.triton import TritonError
from tests.triton import models
from tests.triton.conftest import LiarOrigin, Repository, Serve

FILLER_BYTES = 24 << 20


def test_a_materialized_model_answers_without_its_origin(liar: LiarServer, tmp_path: Path, serve: Serve) -> None:
    """One that is not dies of SIGBUS in the middle of an inference; only unload and load heal it."""
    repository = Repository(LiarOrigin(liar), tmp_path / "m", timeout_s=3.0, materialize=("kept",))
    repository.publish(
        models.model("kept", 1, reads="lazy", filler_bytes=FILLER_BYTES)
        | models.model("mapped", 2, reads="lazy", filler_bytes=FILLER_BYTES)
    )
    with repository.mount:
        server = serve(repository.path, "--model-control-mode=explicit", "--load-model=kept", "--load-model=mapped")
        assert (models.scale_of(server, "kept"), models.scale_of(server, "mapped")) == (1, 2)
        repository.mount.wait_quiet()
        liar.lie(Lie.STATUS, pattern="*.safetensors", status=404)
        for path in ("kept/1/model.safetensors", "mapped/2/model.safetensors"):  # as time and other models would
            repository.mount.client.evict([path], "all")
            repository.look(touching.drop_pages, str(repository.path / path))
        assert models.total_of(server, "kept") == models.filler_sum(1, FILLER_BYTES)
        with pytest.raises(TritonError):
            models.total_of(server, "mapped")
        assert models.total_of(server, "kept") == models.filler_sum(1, FILLER_BYTES)
        liar.tell_truth()
        server.unload("mapped")
        server.load("mapped")
        assert models.total_of(server, "mapped") == models.filler_sum(2, FILLER_BYTES)
        server.stop()


def test_a_materialized_model_fails_to_load_without_its_origin(liar: LiarServer, tmp_path: Path, serve: Serve) -> None:
    """Instead of loading lazily and failing later; the next load, once the origin is back, succeeds."""
    repository = Repository(LiarOrigin(liar), tmp_path / "m", timeout_s=3.0, materialize=("kept",))
    repository.publish(models.model("kept", 1, reads="lazy", filler_bytes=FILLER_BYTES))
    with repository.mount:
        server = serve(repository.path, "--model-control-mode=explicit")
        liar.lie(Lie.STATUS, pattern="*.safetensors", status=404)
        with pytest.raises(TritonError):
            server.load("kept")
        liar.tell_truth()
        server.load("kept")
        assert models.total_of(server, "kept") == models.filler_sum(1, FILLER_BYTES)
        server.stop()

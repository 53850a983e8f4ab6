"""Registries for the tests beside this file; they live for the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.oci.artifacts import RegistryOrigin, Repository
from tests.servers.docker_registry import DockerRegistry, TokenServer


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    """Put its switches back."""
    with TokenServer(tmp_path_factory.mktemp("tokens")) as server:
        yield server


@pytest.fixture(scope="session")
def htpasswd_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry-htpasswd"), auth="htpasswd") as server:
        yield server


@pytest.fixture(scope="session")
def token_registry(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry-token"), auth="token", tokens=tokens) as server:
        yield server


@pytest.fixture
def repository(registry: DockerRegistry) -> Iterator[Repository]:
    """An empty one of the open registry."""
    repository = Repository(registry)
    yield repository
    repository.close()


@pytest.fixture
def origin_of(registry: DockerRegistry) -> Iterator[Callable[[str], RegistryOrigin]]:
    """`origin_of("tar")`: a repository with one tag, layers packed so."""
    made: list[RegistryOrigin] = []

    def make(packing: str = "raw") -> RegistryOrigin:
        made.append(RegistryOrigin(registry, packing=packing))
        return made[-1]

    yield make
    for origin in made:
        origin.close()

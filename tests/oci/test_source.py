"""An OCI registry as a source, against Debian's docker-registry."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mfs.testing.suite import SourceSuite
from tests.oci.artifacts import RegistryOrigin

OriginOf = Callable[[str], RegistryOrigin]


class TestRawLayers(SourceSuite):
    keeps_old_versions = True

    @pytest.fixture
    def origin(self, origin_of: OriginOf) -> RegistryOrigin:
        return origin_of("raw")


class TestTarLayers(SourceSuite):
    keeps_old_versions = True

    @pytest.fixture
    def origin(self, origin_of: OriginOf) -> RegistryOrigin:
        return origin_of("tar")

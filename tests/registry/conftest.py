"""A registry in a folder, for tests that do not ask what it stands on; others have fixtures of the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfs.registry import layout
from mfs.registry.store import Store
from tests.registry.places import FolderPlace


@pytest.fixture
def place(tmp_path: Path) -> FolderPlace:
    place = FolderPlace(tmp_path / "reg")
    place.put(layout.MARKER_KEY, layout.MARKER_BODY)
    return place


@pytest.fixture
def store(place: FolderPlace) -> Store:
    return place.store()

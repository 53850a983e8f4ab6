"""Mounts, as beside the mount's own tests."""

from tests.mount.conftest import folder, mounted

__all__ = ["folder", "mounted"]

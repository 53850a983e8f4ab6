"""CudaDevice on a real GPU; skipped, and said so, where there is none. tools/gpu/run runs it."""

from __future__ import annotations

import pytest

from gpuload.device import open_device
from gpuload.device.base import Device
from gpuload.errors import DeviceError
from gpuload.testing import DeviceSuite


class TestCudaDevice(DeviceSuite):
    @pytest.fixture
    def device(self) -> Device:
        try:
            return open_device("cuda:0")
        except DeviceError as error:
            pytest.skip(f"not run: {error}")

"""driver.py against NVIDIA's own cuda.h: every prototype, struct and number. Skipped where there is no such header."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import site
import subprocess
from pathlib import Path

import pytest

from gpuload.device import driver as cu

NUMBERS = {
    "CUDA_SUCCESS": cu.SUCCESS,
    "CUDA_ERROR_NOT_READY": cu.ERROR_NOT_READY,
    "CUDA_ERROR_OUT_OF_MEMORY": cu.ERROR_OUT_OF_MEMORY,
    "CU_EVENT_DISABLE_TIMING": cu.EVENT_DISABLE_TIMING,
    "CU_STREAM_NON_BLOCKING": cu.STREAM_NON_BLOCKING,
    "CU_STREAM_CAPTURE_MODE_RELAXED": cu.STREAM_CAPTURE_MODE_RELAXED,
    **{f"CUDA_ERROR_{name}": value for name, value in cu.LOST.items()},
    "CU_MEMHOSTALLOC_PORTABLE": cu.MEMHOSTALLOC_PORTABLE,
    "CU_MEMHOSTREGISTER_PORTABLE": cu.MEMHOSTREGISTER_PORTABLE,
    "CU_MEMHOSTREGISTER_READ_ONLY": cu.MEMHOSTREGISTER_READ_ONLY,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_MODE": cu.ATTRIBUTE_COMPUTE_MODE,
    "CU_DEVICE_ATTRIBUTE_ECC_ENABLED": cu.ATTRIBUTE_ECC_ENABLED,
    "CU_DEVICE_ATTRIBUTE_PCI_BUS_ID": cu.ATTRIBUTE_PCI_BUS_ID,
    "CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID": cu.ATTRIBUTE_PCI_DEVICE_ID,
    "CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID": cu.ATTRIBUTE_PCI_DOMAIN_ID,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": cu.ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": cu.ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED":
        cu.ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
    "CU_COMPUTEMODE_DEFAULT": cu.COMPUTEMODE_DEFAULT,
    "CU_COMPUTEMODE_PROHIBITED": cu.COMPUTEMODE_PROHIBITED,
    "CU_COMPUTEMODE_EXCLUSIVE_PROCESS": cu.COMPUTEMODE_EXCLUSIVE_PROCESS,
    "CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED": cu.ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED,
    "CU_MEMORYTYPE_HOST": cu.MEMORYTYPE_HOST,
    "CU_MEMORYTYPE_DEVICE": cu.MEMORYTYPE_DEVICE,
    "CU_MEM_ALLOCATION_TYPE_PINNED": cu.ALLOCATION_TYPE_PINNED,
    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": cu.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    "CU_MEM_LOCATION_TYPE_DEVICE": cu.LOCATION_TYPE_DEVICE,
    "CU_MEM_ACCESS_FLAGS_PROT_READ": cu.ACCESS_READ,
    "CU_MEM_ACCESS_FLAGS_PROT_READWRITE": cu.ACCESS_READWRITE,
    "CU_MEM_ALLOC_GRANULARITY_MINIMUM": cu.GRANULARITY_MINIMUM,
}  # fmt: skip
STRUCTS = {
    "CUmemAllocationProp": cu.MemAllocationProp,
    "CUmemAccessDesc": cu.MemAccessDesc,
    "CUDA_MEMCPY2D": cu.Memcpy2D,
}


@pytest.fixture(scope="module")
def include() -> Path:
    """The folder of cuda.h: the toolkit's, or the one of the wheel nvidia-cuda-runtime."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/include"]
    for packages in site.getsitepackages():
        places += sorted(glob.glob(f"{packages}/nvidia/*/include"), reverse=True)
    found = [place for place in places if os.path.isfile(f"{place}/cuda.h")]
    if not found or shutil.which("cc") is None:
        pytest.skip("not run: no cuda.h, or no C compiler, on this machine (pip install nvidia-cuda-runtime has one)")
    return Path(found[0])


def test_the_stand_in_has_the_prototypes_of_cuda_h(include: Path, tmp_path: Path) -> None:
    source = Path(__file__).parent / "standin" / "libcuda.c"
    options = ["-shared", "-fPIC", "-Wall", "-Werror", "-DWITH_CUDA_H", f"-I{include}", "-o", str(tmp_path / "x.so")]
    subprocess.run(["cc", *options, source], check=True)


def test_every_name_exists_and_every_number_and_struct_agrees(include: Path, tmp_path: Path) -> None:
    lines = ["#include <cuda.h>", "#include <stddef.h>"]
    lines += [f"_Static_assert((int){name} == {value}, {name!r});".replace("'", '"') for name, value in NUMBERS.items()]
    for name, struct in STRUCTS.items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, *_ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    for name in cu._PROTOTYPES:
        lines.append(f"void *use_{name} = (void *){name};")
    (tmp_path / "x.c").write_text("\n".join(lines) + "\n")
    subprocess.run(["cc", "-c", f"-I{include}", "-o", tmp_path / "x.o", tmp_path / "x.c"], check=True)


def test_arguments_have_the_widths_of_the_prototypes(include: Path, tmp_path: Path) -> None:
    lines = ["#include <cuda.h>"]
    text = re.sub(r"/\*.*?\*/", "", (include / "cuda.h").read_text(), flags=re.DOTALL)
    for name, kinds in cu._PROTOTYPES.items():
        declared = re.search(rf"CUresult CUDAAPI {name.removesuffix('_v2')}(?:_v2)?\(([^;]*)\);", text)
        assert declared is not None, name
        wanted = [word for word in declared[1].split(",") if word.strip() != "void"]
        assert len(wanted) == len(kinds), name
        for kind, parameter in zip(kinds, wanted, strict=True):
            bare = re.sub(r"\b\w+\s*$", "", parameter.strip()) if " " in parameter.strip() else parameter
            width = ctypes.sizeof(kind)
            lines.append(f'_Static_assert(sizeof({bare}) == {width}, "{name}: {bare}");')
    (tmp_path / "x.c").write_text("\n".join(lines) + "\n")
    subprocess.run(["cc", "-c", f"-I{include}", "-o", tmp_path / "x.o", tmp_path / "x.c"], check=True)

"""First on PYTHONPATH by `gpuload run`, for Pythons without the .pth: starts the hook, then whoever this name hid."""

import importlib
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))


def _start() -> None:
    try:
        import gpuload.hooks.auto  # noqa: F401
    except Exception as error:  # gpuload is not in this environment: the program runs without it
        print(f"gpuload: not used here: {error}", file=sys.stderr)


def _run_hidden() -> None:
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != _here]
    this = sys.modules.pop("sitecustomize")
    if importlib.util.find_spec("sitecustomize") is not None:
        importlib.import_module("sitecustomize")
    sys.modules.setdefault("sitecustomize", this)  # the import system looks for it when this line is done


_start()
_run_hidden()

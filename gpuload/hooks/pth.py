"""The .pth file: one line in site-packages that starts `auto` in every process of that Python with GPULOAD_AUTO set.

One line, since `site` runs only lines that begin with 'import' and ignores all others without a word.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from mfs.errors import AccessError

NAME = "gpuload_auto.pth"
LINE = (
    "import os; os.environ.get('GPULOAD_AUTO', '0') not in ('', '0') and exec("
    r"'try:\n import gpuload.hooks.auto\nexcept Exception as e:\n import sys; hasattr(sys, \"gpuload_told\") or "
    r"setattr(sys, \"gpuload_told\", print(\"gpuload: not used here:\", e, file=sys.stderr))')"
    "\n"
)
"""In a virtual environment `site` runs it twice; it complains once. pip leaves it behind when it uninstalls gpuload."""


def location() -> Path:
    """Where the file belongs in the running Python."""
    return Path(sysconfig.get_path("purelib")) / NAME


def is_installed() -> bool:
    try:
        return location().read_text() == LINE
    except OSError:
        return False


def install() -> Path:
    """Write it, whole or not at all. Raises: AccessError."""
    path = location()
    draft = path.with_suffix(f".tmp{os.getpid()}")
    try:
        draft.write_text(LINE)
        draft.replace(path)
    except OSError as error:
        raise AccessError(f"cannot write {path}: {error.strerror}") from None
    return path


def remove() -> Path:
    """Raises: AccessError. Absent is fine."""
    path = location()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AccessError(f"cannot remove {path}: {error.strerror}") from None
    return path

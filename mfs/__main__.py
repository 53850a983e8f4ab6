"""`python -m mfs`: the same as the `mfs` command."""

from __future__ import annotations

import sys

from mfs.cli import main

sys.exit(main())

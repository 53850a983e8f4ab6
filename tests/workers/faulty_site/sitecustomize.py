"""Python imports this by itself in workers of tests that put this folder on PYTHONPATH: sources may then be faulty."""

import mfs.sources

mfs.sources._MODULES["faulty"] = "tests.workers.faulty_url"

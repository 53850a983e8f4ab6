"""Real servers for tests: each module holds one class that starts a process, waits for it and surely stops it.

Every module runs on its own too: `python -m tests.servers.swift --help`.
"""

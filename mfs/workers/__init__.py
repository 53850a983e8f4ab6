"""Worker processes: everything that may block (network, disk, hashing) happens in them, never beside the FUSE loop.

frames.py   MessagePack over a socket pair, both ends
pool.py     the daemon's side: queues, priorities, deadlines, respawn
shares.py   how a bound is divided among models
worker.py   one process, as the daemon sees it
process.py  the worker's side: `python -m mfs.workers.process`; jobs.py is what it can do
"""

"""Worker processes: everything that may block (network, disk, hashing) happens in them, never beside the FUSE loop.

frames.py   MessagePack over a socket pair, both ends
pool.py     the daemon's side: queues, priorities, deadlines, respawn
process.py  the worker's side: `python -m mfs.workers.process`
"""

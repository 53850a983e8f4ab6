"""Worker processes: everything that may block (network, disk, hashing) happens in them, never beside the FUSE loop.

frames.py   MessagePack over a socket pair, both ends
job.py      one operation asked for; line.py what waits and runs of one lane and source
pool.py     the daemon's side: who does which operation when, deadlines, respawn
shares.py   how a bound is divided among models
worker.py   one process, as the daemon sees it
replies.py  answers to readers, written by the worker that has brought their bytes
process.py  the worker's side: `python -m mfs.workers.process`; jobs.py is what it can do
"""

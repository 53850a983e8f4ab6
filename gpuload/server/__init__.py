"""The resident process: arenas that outlive their users, models in them, leases on those, and a socket.

daemon → loader → catalog → layout, granules. Only `daemon` speaks to sockets; only `loader` moves bytes; the
rest is bookkeeping without I/O, changed on the trio thread alone.
"""

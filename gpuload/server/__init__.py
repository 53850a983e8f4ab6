"""The resident process: arenas that outlive their users, models in them, leases on those, and a socket.

daemon → loader → room, returning → catalog → layout, granules. Only `daemon` speaks to sockets; only `loader` and
`leaving` move bytes; the rest is bookkeeping without I/O, changed on the trio thread alone.
"""

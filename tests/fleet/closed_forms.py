"""What queueing theory says in closed form, to hold the simulation against. Rates per second, times in seconds."""

from __future__ import annotations


def mmc_wait_s(arrivals: float, served: float, servers: int) -> float:
    """Mean wait in M/M/c, by Erlang's C. arrivals < servers * served."""
    offered = arrivals / served
    blocked = 1.0  # Erlang's B, by its recursion, which has no factorials to overflow
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    waits = blocked / (1 - offered / servers * (1 - blocked))
    return waits / (servers * served - arrivals)


def mg1_wait_s(arrivals: float, mean_s: float, variance: float) -> float:
    """Mean wait in M/G/1, by Pollaczek and Khinchine; variance 0: M/D/1."""
    return arrivals * (variance + mean_s**2) / (2 * (1 - arrivals * mean_s))


def mg1_sharing_s(arrivals: float, mean_s: float) -> float:
    """Mean time in M/G/1 with processor sharing, whatever the distribution."""
    return mean_s / (1 - arrivals * mean_s)

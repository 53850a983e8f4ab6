"""What will happen here, said before it does: `doctor` examines the machine, `estimate` counts what a cold start costs.

Nothing of this runs in a daemon. What other rooms know is asked of them; what is measured here is bounded in bytes and
time, and nothing is left behind, however the process ends.
"""

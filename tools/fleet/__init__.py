"""What sharing GPUs among models saves, by simulation. Started by `tools/fleet/run`; README.md has what was found.

    __main__     the command line
    traffic      requests drawn from a seed;  traces: recorded ones, from CSV files
    services     models, the card, and how long work takes: rounds of continuous batching
    measured     what loads and swaps cost, each figure with its source
    tiers        what a node keeps on SSD and in RAM
    policies     where a model goes, and who makes room
    setups       the systems compared
    batch, gpu   the sequences of one card; its memory and its hours
    loads        what bringing a model to a card takes
    choice       which card takes a model, and who has to go there
    cluster      the conductor
    simulate     one run, and what must be true of it
    stats        means and intervals over seeds
    scenario     all inputs of a run
    experiments  systems side by side, a map of traffic, growth;  report, plot: tables, JSON, pictures

Arrows go up this list only: cluster imports gpu and policies, nothing imports cluster but simulate.
"""

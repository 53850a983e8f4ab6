"""Benchmarks: us and our peers, on the same bytes, in one run, as ratios. Started by `tools/bench/run`.

    __main__   the command line, and the order of a run
    machine    what this machine is, and how to make it forget (page cache)
    processes  CPU seconds and memory of processes, from /proc
    workload   the model files, and readings of them by `reader`, a fresh process each
    origin     radosgw with the model in it;  link: its answers slowed to a link's rate;  ranges: that link's ceiling
    mounts     what is compared and mounted: ours, s3fs, rclone, zeros (a stub, the price of FUSE alone)
    downloads  what is compared and not mounted: boto3, Run:ai's streamer
    cases      throughput of all of these;  latency: round trips at mount;  listing: memory with 300,000 files
    readahead  the kernel's read-ahead, varied
    results    samples, ratios, goals;  report: the tables and the JSON file

Everything runs in namespaces of its own (see `namespaces`), so nothing that it starts or mounts survives the command.
"""

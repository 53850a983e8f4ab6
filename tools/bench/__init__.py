"""Benchmarks: us and our peers, on the same bytes, in one run, as ratios. Started by `tools/bench/run`.

    __main__   the command line, and the order of a run
    machine    what this machine is, and how to make it forget (page cache)
    processes  CPU seconds and memory of processes, from /proc
    reader     the table of patterns, each run in a fresh process;  workload: what they read, and how it is checked
    origin     nginx and radosgw with the model in them;  link: answers slowed to a link's rate;  ranges: the ceiling
    mounts     ours, the plain file, zeros (a stub, the price of FUSE alone);  peers: JuiceFS, rclone, s3fs
    passes     patterns × states × systems, all of them in turn;  its table of states
    downloads  what is compared and not mounted: boto3, Run:ai's streamer
    cases      these, capped links, the stub;  latency: round trips at mount;  listing: memory with 300,000 files
    readahead  the kernel's read-ahead, varied
    results    samples, ratios, goals;  report: the tables and the JSON file

Everything runs in namespaces of its own (see `namespaces`), so nothing that it starts or mounts survives the command.
"""

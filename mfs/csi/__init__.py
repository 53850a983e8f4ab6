"""A CSI node driver: volumes of pods are mounts of ours, one daemon for all that are alike.

    volume      (pure) what a publish asks for, in our words; what is refused
    secrets     a volume's secrets as files in memory that the sources look at again when they are refused
    state       what was published, in a small directory; never a secret
    binding     bind mounts, and who is mounted where
    daemons     one daemon for each key: started, adopted, taken up from what a keeper holds, ended
    node        the steps of publish and unpublish, each of which may be the last before a crash
    server      the gRPC door

The truth about what is published is the kernel's table of mounts; the state says what for. Needs `mfs[csi]`.
"""

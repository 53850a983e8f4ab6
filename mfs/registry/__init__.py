"""Our own registry of models: content-addressed chunks, immutable manifests, tags with history. `FORMAT.md` has it all.

    layout      keys, names and addresses (pure)
    manifest    what one revision is made of (pure)
    chunk       one stored chunk: its table, its frames (pure); codecs how a frame is stored
    store       what a registry stands on: folder_store, s3_store (s3_writing), web_store that only reads
    cutting     where files are cut into chunks (pure); encode how a chunk is stored, alone or as a difference (pure)
    push        a directory becomes a revision: scan, validate, pickles, card look at it, hashing says what it is,
                presence asks what is there, bases finds what may be a base, sending and upload bring the rest
    diff        how two revisions differ; chunk_io brings chunks whole
    source      a registry as what a mount reads: revisions compact, frames verified, resident what the node has
    signing     who vouches for a revision; verifying reads one whole
    opening     from an URL to a store over the root
    tags        names that move, with history; retag moves them to what is there, and stays
    work        how pushes and collections keep out of each other's way
    gc, fsck    what nobody needs, what is missing or damaged; reach is what tags lead to

What is called pure does no I/O.
"""

"""Models in OCI registries: read lazily by range, and pushed so that other tools accept them.

    reference   what an oci:// address names (pure)
    media       media types, and what a layer's says of it (pure)
    artifact    manifests and indexes: which files there are, and where their bytes stand (pure)
    tar         the members of a tar layer, by its headers alone (pure, over a reader)
    files       the tree that layers make together (pure)
    credentials where docker keeps them; auth challenges and tokens
    client      the requests of the distribution API that only read; redirects, retries, errors
    unpacked    compressed layers, materialised whole in a bounded place
    source      the source that a mount lists and reads
    blob        what becomes a blob, and its digest
    upload      blobs, in pieces that can be taken up again
    documents   what names the layers of a push (pure)
    push        a folder as an artifact, or (image) as an image
    referrers   what hangs on an artifact: card, signature

Source: OCI distribution-spec 1.1 and image-spec 1.1; CNCF ModelPack model-spec 0.0.7; docker/model-spec.
"""

"""What is counted of a mount, and how Prometheus and OpenMetrics are told.

    tally       counts what nothing else does: waits, errors, models; told by the mount's parts
    mounted     all families of a mount, read out of its parts
    families    what a family of metrics is; pure
    exposition  families as text, by prometheus_client; the only file that knows it
    door        GET /metrics on an address

Numbers are counted where things happen and read when somebody asks: nothing is computed for metrics otherwise. Values
are copied on the trio thread, text is made in another, so readers wait for neither.
"""

"""OpenTelemetry traces: from a load, or a swap, down to each request to an origin. Off unless OTEL_ variables ask.

    settings    whether traces are wanted, from the environment
    spans       what a span is to us: ids, times and attributes as plain values, and the bounded box of those that ended
    tracer      begins traces, as the SDK's sampler decides; has what ended sent away
    requests    a worker's side: the requests of one order, and their `traceparent`
    beside      the daemon's side of a process that exports, `process`; it has no reader and fetches nothing
    export      rows of plain values as OTLP, by OpenTelemetry's protobuf classes
    collector   where they go, as the variables say, and what is done when it does not take them

The daemon makes ids and keeps numbers, a microsecond or two a span. What encodes and sends them runs in that process,
where it holds up no reader and no fetch: the SDK's own batch processor would be a thread beside the FUSE loop, and take
its interpreter for 20 ms a batch. Nothing that lets anybody in comes into a span: URLs are without query and user.
"""

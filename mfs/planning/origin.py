"""Whether an origin can be reached and used from here, step by step: name, connection, TLS, clock, rights, speed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator, Iterator

from mfs.config import SourceConfig
from mfs.errors import AccessError, MfsError, NotFoundError, TransientStoreError
from mfs.fetch.dates import epoch_s
from mfs.fetch.dial import dial
from mfs.fetch.environment import Proxy, proxy_for, trust_store
from mfs.fetch.transport import Target, Transport, parse_target, translate
from mfs.fetch.wire import connect
from mfs.findings import Finding, Level, fault, note, ok, warning
from mfs.planning import probe
from mfs.planning.wanted import Wanted, label
from mfs.shown import mask_url
from mfs.sources import Source, SourceOptions, open_source

SKEW_S_MAX = 300.0
"""AWS's services refuse signatures older than that, or made so far in the future; S3 itself forgives 15 minutes.
Source: IAM User Guide, 'Signature Version 4 for API requests'."""
SKEW_S_NOTE = 30.0
STEP_S = 10.0
"""For each step, or the mount's own timeout where that is less."""
FAR_S = 0.05
"""A latency above which 16 connections of 4 MiB parts no longer fill 10 Gbit/s."""


def examine(config: SourceConfig, wanted: Wanted) -> Iterator[Finding]:
    """Everything about one source."""
    name = label(config)
    try:
        source = open_source(config.url, SourceOptions(**config.options()))
        address = source.address
    except MfsError as error:
        yield fault(name, str(error), "mend the source's URL or settings")
        return
    try:
        for between in filter(None, (config.via, config.dragonfly)):
            yield _between(name, between, min(STEP_S, wanted.timeout_s))
        if not address or (yield from _reach(name, address, is_signed=_is_signed(config), wanted=wanted)):
            yield from _use(name, source, wanted)
    finally:
        source.close()


def _between(name: str, url: str, step_s: float) -> Finding:
    """A cache that nodes share, which is asked before the origin and done without when it is away."""
    what = f"{name}: shared cache"
    try:
        target = parse_target(url)
        began = time.monotonic()
        dial(target.origin.host, target.origin.port, step_s).close()
    except MfsError as error:
        return fault(what, str(error), "name it as http://host:port")
    except (OSError, UnicodeError) as error:
        return warning(
            what, f"{mask_url(url)}: {getattr(error, 'strerror', None) or error}",
            "start it on this node: until then every node asks the origin by itself",
        )  # fmt: skip
    return ok(what, f"{mask_url(url)} answers in {_ms(time.monotonic() - began)}")


def _is_signed(config: SourceConfig) -> bool:
    return config.url.startswith(("s3://", "mfs+s3://")) and not config.unsigned


def _reach(name: str, address: str, *, is_signed: bool, wanted: Wanted) -> Generator[Finding, None, bool]:
    """The steps to the first answer; whether it makes sense to ask for more."""
    target = parse_target(address)
    scheme, host, port = target.origin
    proxy = proxy_for(scheme, host, port)
    step_s = min(STEP_S, wanted.timeout_s)
    yield _proxy(name, proxy)
    first = (proxy.host, proxy.port) if proxy else (host, port)
    try:
        began = time.monotonic()
        found = {info[4][0] for info in socket.getaddrinfo(*first, type=socket.SOCK_STREAM)}
        took_s = time.monotonic() - began
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield fault(
            f"{name}: name", f"{first[0]} is not known ({reason})", "check the host's name and /etc/resolv.conf"
        )
        return False
    value = f"{first[0]} has {len(found)} address{'es' if len(found) > 1 else ''}, in {_ms(took_s)}"
    yield (
        ok(f"{name}: name", value)
        if took_s < 1
        else warning(f"{name}: name", value, "a slow name server delays every new connection: check /etc/resolv.conf")
    )
    try:
        began = time.monotonic()
        dial(*first, step_s).close()
        yield ok(f"{name}: connection", f"{first[0]} port {first[1]} answers in {_ms(time.monotonic() - began)}")
    except OSError as error:
        yield fault(
            f"{name}: connection", f"{first[0]} port {first[1]}: {error.strerror or error}",
            "check port, firewall and proxy settings (HTTPS_PROXY, NO_PROXY)",
        )  # fmt: skip
        return False
    if scheme == "https":
        tls = _tls(name, target, proxy, step_s)
        yield tls
        if tls.level is Level.FAULT:
            return False
    yield _clock(name, address, is_signed, step_s)
    return True


def _proxy(name: str, proxy: Proxy | None) -> Finding:
    """What the environment says of this origin."""
    if proxy is not None:
        return ok(f"{name}: proxy", f"{proxy.host}:{proxy.port}, named by the environment")
    names = ("http_proxy", "https_proxy", "all_proxy")
    named = [name for name in names if os.environ.get(name) or os.environ.get(name.upper())]
    return ok(f"{name}: proxy", f"none for this origin, though {', '.join(named)} is set" if named else "none")


def _tls(name: str, target: Target, proxy: Proxy | None, step_s: float) -> Finding:
    what, origin = f"{name}: TLS", target.origin
    try:
        began = time.monotonic()
        wire = connect(*origin, proxy=proxy, trust=trust_store(), deadline_s=time.monotonic() + step_s)
        took_s = time.monotonic() - began
        wire.close()
    except MfsError as error:  # a bundle that cannot be read
        return fault(what, str(error), "name a file of PEM certificates")
    except Exception as error:
        said = translate(error, target)
        if "certificate" in str(said):  # an S3 profile may name a bundle of its own: the listing decides
            return warning(what, str(said), "trust its CA: SSL_CERT_FILE, or AWS_CA_BUNDLE for S3")
        return fault(what, str(said), "check the port, and whether it speaks TLS")
    return ok(what, f"handshake in {_ms(took_s)}")


def _clock(name: str, address: str, is_signed: bool, step_s: float) -> Finding:
    """Our clock beside the Date of any answer, to the second and the time of the request."""
    what = f"{name}: clock"
    transport = Transport(connections_max=1)
    try:
        before = time.time()
        reply = transport.request(address, method="HEAD", deadline_s=time.monotonic() + step_s)
        after = time.time()
    except MfsError as error:
        return warning(what, f"no answer to compare with: {error}", "the listing below says whether it can be used")
    finally:
        transport.close()
    theirs = epoch_s(reply.headers.get("Date", ""))
    if theirs is None:
        return note(what, "the origin's answers carry no Date")
    # The date is cut to its second and was made between the two looks at our clock.
    behind, ahead = theirs - after, before - (theirs + 1)
    skew = max(behind, ahead, 0.0)
    direction = "behind" if behind > ahead else "ahead of"
    value = f"{skew:.0f} s {direction} the origin's" if skew >= 1 else "as the origin's, to the second"
    advice = "set it by NTP (chrony, systemd-timesyncd): timedatectl"
    if skew >= SKEW_S_MAX and is_signed:
        return fault(what, value, f"{advice}; signatures are refused from {SKEW_S_MAX / 60:.0f} minutes on")
    if skew >= SKEW_S_MAX:
        return warning(what, value, f"{advice}; tokens and certificates are judged by it")
    return note(what, value, advice) if skew >= SKEW_S_NOTE else ok(what, value)


def _use(name: str, source: Source, wanted: Wanted) -> Iterator[Finding]:
    """One listing, which is where credentials show, then a few reads."""
    what = f"{name}: listing"
    deadline_s = time.monotonic() + wanted.timeout_s
    began = time.monotonic()
    try:
        entries = sum(len(page) for _, page in source.list("", deadline_s=deadline_s))
    except MfsError as error:
        yield fault(what, str(error), _listing_advice(error))
        return
    yield ok(what, f"{entries:,} names in {_ms(time.monotonic() - began)}")
    try:
        obj = probe.largest(source, deadline_s=deadline_s)
        if obj is None:
            yield note(f"{name}: speed", "no file with anything in it was found to read")
            return
        link = probe.measure(source, obj, connections=wanted.connections_count, deadline_s=deadline_s)
    except TransientStoreError as error:
        yield warning(f"{name}: reading", str(error), "what is listed came too slowly, or not at all: try again")
        return
    except MfsError as error:
        yield fault(f"{name}: reading", str(error), "what is listed cannot be read: check the rights to read objects")
        return
    yield _latency(name, link)
    yield _bandwidth(name, link, wanted)


def _listing_advice(error: MfsError) -> str:
    match error:
        case AccessError():
            return "check the credentials, and that they may list"
        case NotFoundError():
            return "check bucket, path, repository or tag"
        case _:
            return "what stands above may say why; --debug shows more"


def _latency(name: str, link: probe.Link) -> Finding:
    value = f"{_ms(link.latency_s)} for a small range, the median of {probe.SMALL_READS}"
    if link.latency_s > FAR_S:
        return note(f"{name}: latency", value, "far away: more --connections, or a mirror nearer by")
    return ok(f"{name}: latency", value)


def _bandwidth(name: str, link: probe.Link, wanted: Wanted) -> Finding:
    value = (
        f"{link.bytes_s / 1e9:.3g} GB/s over {wanted.connections_count} connections, of {link.sample_bytes >> 20} MiB"
    )
    if link.sample_bytes < probe.BYTES_MAX // 4:
        return note(f"{name}: bandwidth", f"{value}: too little to say much")
    return ok(f"{name}: bandwidth", value)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"

"""Where traces go: a collector, by OTLP over HTTP, as the OTEL_EXPORTER_OTLP_ variables say.

The SDK's own exporter takes 34 µs a span, most of it before it sends anything, and lets nobody give it bytes that are
made already. What it reads of the environment is read here, in the same way.
Source: OpenTelemetry Specification, "OpenTelemetry Protocol Exporter"; OTLP Specification, "OTLP/HTTP".
"""

from __future__ import annotations

import gzip
import random
import time
import zlib
from collections.abc import Callable, Mapping

import requests
from opentelemetry.util.re import parse_env_headers

from mfs.errors import StoreError, TransientStoreError

TIMEOUT_MAX_S = 10.0
"""For one batch with all its attempts, also where the environment allows more: others wait behind it."""
_FIRST_PAUSE_S = 0.5
_PASSING = (429, 502, 503, 504)
_ANSWER_BYTES_MAX = 64 << 10
_PACKING: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, compresslevel=1), "deflate": zlib.compress,
}  # fmt: skip


class Collector:
    """One address, and what goes with each request. Calls one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises: StoreError if the environment says nonsense."""

        def said(name: str) -> str:
            for signal in ("TRACES_", ""):
                if found := environment.get(f"OTEL_EXPORTER_OTLP_{signal}{name}", "").strip():
                    return found
            return ""

        own = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
        self._url = own or f"{(said('ENDPOINT') or 'http://localhost:4318').rstrip('/')}/v1/traces"
        self._timeout_s = _timeout_s(said("TIMEOUT"))
        packing = said("COMPRESSION").lower() or "none"
        if packing != "none" and packing not in _PACKING:
            raise StoreError(f"OTEL_EXPORTER_OTLP_COMPRESSION is {packing!r}: give gzip, deflate or none")
        self._pack = _PACKING.get(packing)
        self._session = requests.Session()
        self._session.headers.update(parse_env_headers(said("HEADERS"), liberal=True))
        self._session.headers.update({"Content-Type": "application/x-protobuf", "User-Agent": "mfs"})
        if self._pack is not None:
            self._session.headers["Content-Encoding"] = packing
        self._session.verify = said("CERTIFICATE") or True
        certificate, key = said("CLIENT_CERTIFICATE"), said("CLIENT_KEY")
        self._session.cert = (certificate, key) if certificate and key else certificate or None

    def post(self, body: bytes) -> None:
        """Have it take a request; again where it may pass, within the time there is.

        Raises: StoreError if it was not taken.
        """
        if self._pack is not None:
            body = self._pack(body)
        until_s, pause_s = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        while True:
            try:
                return self._post_once(body, until_s - time.monotonic())
            except TransientStoreError as error:
                wait_s = max(pause_s * random.uniform(0.8, 1.2), error.wished_s if isinstance(error, _Later) else 0.0)
                if time.monotonic() + wait_s >= until_s:
                    raise StoreError(f"{error}; see OTEL_EXPORTER_OTLP_ENDPOINT") from error
            time.sleep(wait_s)
            pause_s *= 2

    def _post_once(self, body: bytes, timeout_s: float) -> None:
        try:
            with self._session.post(
                self._url, data=body, timeout=timeout_s, allow_redirects=False, stream=True
            ) as answer:
                answer.raw.read(_ANSWER_BYTES_MAX)  # to its end, so that the connection is used again
        except (requests.ConnectionError, requests.Timeout) as error:
            raise TransientStoreError(f"the collector of traces did not take them: {error}") from error
        if 200 <= answer.status_code < 300:
            return
        text = f"the collector of traces did not take them: status {answer.status_code}"
        if answer.status_code in _PASSING:
            raise _Later(text, answer.headers.get("Retry-After", ""))
        raise StoreError(f"{text}; see OTEL_EXPORTER_OTLP_ENDPOINT")

    def close(self) -> None:
        self._session.close()


class _Later(TransientStoreError):
    """An answer 'not now'."""

    def __init__(self, text: str, retry_after: str) -> None:
        super().__init__(text)
        self.wished_s = float(retry_after) if retry_after.isdecimal() else 0.0


def _timeout_s(said: str) -> float:
    try:
        return min(TIMEOUT_MAX_S, float(said or TIMEOUT_MAX_S))
    except ValueError:  # as the SDK: its default, which is as long
        return TIMEOUT_MAX_S

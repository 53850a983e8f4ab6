"""How to reach one bucket: address, region, credentials and signatures. botocore knows; we cache what it says.

Signatures cover neither Range nor If-Match, so one serves all parts of an object for a minute: making one takes
66 µs, finding it again 2 µs (EPYC, Python 3.11). Proxies may rewrite Range freely.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from mfs.errors import AccessError, ConfigError, TransientStoreError, UsageError
from mfs.sources.options import SourceOptions

log = logging.getLogger(__name__)

SIGNATURE_S = 60.0
"""Age at which a signature is made anew; S3 accepts up to 15 minutes, which leaves 14 to a clock that is wrong."""

SIGNATURES_MAX = 4096
"""Signatures remembered; at the limit all are forgotten, which costs one new one per object."""


class S3Access:
    """Addresses and signed headers for one bucket. Construction reads local configuration only. Thread-safe."""

    def __init__(self, bucket: str, options: SourceOptions) -> None:
        """Raises: ConfigError for an unknown profile or a bad endpoint."""
        warn_of_replaced_urllib3()
        import botocore.exceptions
        import botocore.session
        from botocore.configprovider import ConfiguredEndpointProvider

        self.bucket = bucket
        self._is_signed = not options.unsigned
        self._session = botocore.session.Session(profile=options.profile)
        try:
            scoped = self._session.get_scoped_config()
            configured = ConfiguredEndpointProvider(
                full_config=self._session.full_config, scoped_config=scoped, client_name="s3"
            ).provide()
        except botocore.exceptions.BotoCoreError as e:
            raise ConfigError(f"s3://{bucket}: AWS configuration: {e}") from e
        self.endpoint: str | None = (options.endpoint_url or configured or "").rstrip("/") or None
        self.region: str = options.region or self._session.get_config_variable("region") or "us-east-1"
        self._is_virtual = (scoped.get("s3") or {}).get("addressing_style", "auto") == "virtual" or (
            self.endpoint is None and "." not in bucket  # a wildcard certificate covers no dots
        )
        if self.endpoint and urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ConfigError(f"s3://{bucket}: endpoint {self.endpoint!r}: expected http://host[:port] or https://host")
        self._lock = threading.Lock()
        self._base_urls: dict[str, str] = {}
        self._credentials: Any = None
        self._signed: dict[tuple[str, str, str], tuple[float, dict[str, str]]] = {}

    def object_url(self, key: str) -> str:
        """The address of an object."""
        return f"{self._base_url()}/{quote(key, safe='/-_.~')}"

    def listing_url(self, query: dict[str, str]) -> str:
        """The address of a ListObjectsV2 request."""
        return f"{self._base_url()}/?{urlencode(sorted(query.items()), quote_via=quote, safe='-_.~')}"

    def headers(self, url: str) -> dict[str, str]:
        """Headers that authorise a GET of `url`; the caller may add others. May wait for a credential service.

        Raises: AccessError if there are no credentials, TransientStoreError if refreshing them failed.
        """
        if not self._is_signed:
            return {}
        frozen = self._frozen_credentials()
        slot = (url, frozen.access_key, self.region)
        now_s = time.time()  # the clock that stands in the signature, also after a suspend
        known = self._signed.get(slot)
        if known and 0 <= now_s - known[0] < SIGNATURE_S:
            return known[1]
        headers = self._sign(url, frozen)
        if len(self._signed) >= SIGNATURES_MAX:
            self._signed.clear()
        self._signed[slot] = (now_s, headers)
        return headers

    def _sign(self, url: str, frozen: Any) -> dict[str, str]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("GET", url)
        S3SigV4Auth(frozen, "s3", self.region).add_auth(request)
        return dict(request.headers.items())

    def _frozen_credentials(self) -> Any:
        import botocore.exceptions

        try:
            with self._lock:
                if self._credentials is None:
                    self._credentials = self._session.get_credentials()
            if self._credentials is not None:
                return self._credentials.get_frozen_credentials()
        except botocore.exceptions.PartialCredentialsError as e:
            raise AccessError(f"s3://{self.bucket}: {e}") from e
        except botocore.exceptions.BotoCoreError as e:
            raise TransientStoreError(f"s3://{self.bucket}: fetching credentials failed: {e}") from e
        raise AccessError(
            f"s3://{self.bucket}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or an instance role, or mount a public bucket unsigned"
        )

    def _base_url(self) -> str:
        region = self.region
        if known := self._base_urls.get(region):
            return known
        service = self.endpoint or self._aws_endpoint(region)
        if self._is_virtual:
            scheme, _, rest = service.partition("://")
            url = f"{scheme}://{self.bucket}.{rest}"
        else:
            url = f"{service}/{self.bucket}"
        self._base_urls[region] = url
        return url

    def _aws_endpoint(self, region: str) -> str:
        """AWS's address for S3 in a region, right for every partition (China, GovCloud, ...)."""
        resolver = self._session.get_component("endpoint_resolver")
        found = resolver.construct_endpoint("s3", region)
        if not found:
            raise ConfigError(f"s3://{self.bucket}: no region {region!r} is known; check --region or AWS_REGION")
        return f"https://{found['hostname']}"


def parse_s3_url(url: str) -> tuple[str, str]:
    """(bucket, prefix) of s3://bucket/prefix; the prefix is '' or ends in '/'. Raises: UsageError."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket or any(c in bucket for c in "@?#: \\"):
        raise UsageError(f"{url!r}: expected s3://bucket or s3://bucket/prefix")
    prefix = prefix.rstrip("/")
    return bucket, f"{prefix}/" if prefix else ""


def warn_of_replaced_urllib3() -> None:
    """Say when another package has put itself in urllib3's place: with niquests, boto3 needs 3.5 times the CPU."""
    import urllib3

    running: str = vars(urllib3)["__version__"]
    installed = importlib.metadata.version("urllib3")
    if running != installed and not warned_of:
        warned_of.append(running)
        log.warning(
            "urllib3 is %s but its package says %s: another package has replaced it; reinstall urllib3",
            running,
            installed,
        )


warned_of: list[str] = []
"""The foreign urllib3 that was warned of, once per process."""

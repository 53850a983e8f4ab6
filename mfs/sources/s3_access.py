"""How to reach one bucket: address, region, credentials and signatures. botocore knows; we cache what it says.

Signatures cover neither Range nor If-Match, so one serves all parts of an object for a minute: making one takes
66 µs, finding it again 2 µs (EPYC, Python 3.11). Proxies may rewrite Range freely.

Keys are looked for anew when they are refused, wherever botocore finds them: whoever rotates them writes others into
the file, or has the program or the token file ready that gives them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from mfs.errors import AccessError, ConfigError, StoreError, TransientStoreError, UsageError
from mfs.fetch.environment import CaBundle, ca_bundle
from mfs.fetch.transport import without_userinfo
from mfs.sources.options import SourceOptions

log = logging.getLogger(__name__)

SIGNATURE_S = 60.0
"""Age at which a signature is made anew; S3 accepts up to 15 minutes, which leaves 14 to a clock that is wrong."""

SEARCH_PAUSES = 2.0
"""Shortest pause after a search for other keys that found none, in times of what it took (30 ms where files say all):
what asks is a read that was refused, of which there may be thousands a second, while a search may run a program
(credential_process) or ask a token service."""

PRESIGNED_S = 3600
"""Life of an address that lets in by itself: a cache may fetch by it long after it was asked."""

PRESIGNED_AGAIN_S = 900.0
"""Age at which one is made anew."""

SIGNATURES_MAX = 4096
"""Signatures remembered; at the limit all are forgotten, which costs one new one per object."""

_KEY = re.compile(r"\S(.*\S)?")


class Signed(NamedTuple):
    """What authorises one request, and with what it was made: by that an answer is judged."""

    headers: dict[str, str]
    region: str
    keys: Any
    """botocore's ReadOnlyCredentials; None for an unsigned request."""


class S3Access:
    """Addresses and signed headers for one bucket. Construction reads local configuration only. Thread-safe."""

    def __init__(self, bucket: str, options: SourceOptions) -> None:
        """Raises: ConfigError for an unknown profile or a bad endpoint."""
        warn_of_replaced_urllib3()
        import botocore.exceptions
        from botocore.configprovider import ConfiguredEndpointProvider

        self.bucket = bucket
        self._is_signed = not options.unsigned
        self._payer = {"x-amz-request-payer": "requester"} if options.requester_pays else {}
        self._profile = options.profile
        self._session = self._new_session()
        try:
            scoped = self._session.get_scoped_config()
            configured = None
            if not self._session.get_config_variable("ignore_configured_endpoint_urls"):
                configured = ConfiguredEndpointProvider(
                    full_config=self._session.full_config, scoped_config=scoped, client_name="s3"
                ).provide()
        except botocore.exceptions.BotoCoreError as e:
            raise ConfigError(f"s3://{bucket}: AWS configuration: {e}") from e
        endpoint = without_userinfo(options.endpoint_url or configured or "").rstrip("/")
        self.endpoint: str | None = endpoint or None
        self.region: str = options.region or _region(self._session) or "us-east-1"
        style = (scoped.get("s3") or {}).get("addressing_style", "auto")
        self.is_virtual = style == "virtual" or (
            self.endpoint is None and style == "auto" and "." not in bucket  # a wildcard certificate covers no dots
        )
        if self.endpoint and urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ConfigError(f"s3://{bucket}: endpoint {self.endpoint!r}: expected http://host[:port] or https://host")
        self.ca_bundle = _ca_bundle(self._session)
        self._searching = threading.Lock()
        """Held by who looks for keys."""
        self._base_urls: dict[str, str] = {}
        self._credentials: Any = None
        self._search_again_s = -math.inf
        """time.monotonic() from which other keys may be searched again, after a search that found none."""
        self._signed: dict[tuple[str, Any, str], tuple[float, Signed]] = {}
        self._presigned: dict[tuple[str, Any, str], tuple[float, str]] = {}

    def object_url(self, key: str) -> str:
        """The address of an object."""
        return f"{self._base_url()}/{quote(key, safe='/-_.~')}"

    def listing_url(self, query: dict[str, str]) -> str:
        """The address of a ListObjectsV2 request."""
        return f"{self._base_url()}/?{urlencode(sorted(query.items()), quote_via=quote, safe='-_.~')}"

    def sign(self, url: str, method: str = "GET") -> Signed:
        """Headers that authorise a request of `url`; the caller may add others. May wait for a credential service.

        Raises: AccessError if there are no credentials, TransientStoreError if refreshing them failed.
        """
        if not self._is_signed:
            return Signed(self._payer, self.region, None)
        keys = self._keys()
        region = self.region
        if method != "GET":  # too rare to be remembered
            return self._sign(method, url, keys, region)
        slot = (url, keys, region)
        now_s = time.time()  # the clock that stands in the signature, also after a suspend
        known = self._signed.get(slot)
        if known and 0 <= now_s - known[0] < SIGNATURE_S:
            return known[1]
        signed = self._sign(method, url, keys, region)
        if len(self._signed) >= SIGNATURES_MAX:
            self._signed.clear()
        self._signed[slot] = (now_s, signed)
        return signed

    def presign(self, url: str) -> str:
        """The address of an object as it lets in whoever has it, for PRESIGNED_S, for a GET of any range.

        Raises: as `sign`.
        """
        if not self._is_signed:
            return url
        keys, region = self._keys(), self.region
        slot = (url, keys, region)
        now_s = time.time()
        known = self._presigned.get(slot)
        if known and 0 <= now_s - known[0] < PRESIGNED_AGAIN_S:
            return known[1]
        found = self._presign(url, keys, region)
        if len(self._presigned) >= SIGNATURES_MAX:
            self._presigned.clear()
        self._presigned[slot] = (now_s, found)
        return found

    def renew(self, refused: Signed, *, deadline_s: float) -> bool:
        """Whether there are other keys than those that were refused; searches where they came from, see SEARCH_PAUSES.

        Waits for a search under way until `deadline_s`. Never raises: if it fails, what was refused stays the news.
        """
        if refused.keys is None or not self._searching.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            return False
        try:
            if self._others(lambda: self._credentials, refused.keys):
                return True  # somebody else has found them already
            started_s = time.monotonic()
            if started_s < self._search_again_s:
                return False
            if found := self._others(lambda: self._new_session().get_credentials(), refused.keys):
                self._credentials = found
                return True
            now_s = time.monotonic()
            self._search_again_s = now_s + SEARCH_PAUSES * (now_s - started_s)
            return False
        finally:
            self._searching.release()

    def _others(self, find: Callable[[], Any], refused: Any) -> Any:
        """What `find` gives, if it has other keys than these, else None."""
        try:
            found = find()
            return found if found is not None and found.get_frozen_credentials() != refused else None
        except Exception as e:  # programs and services of all kinds give keys, and fail in as many ways
            log.warning("s3://%s: looking for other keys than the refused ones failed: %r", self.bucket, e)
            return None

    def move(self, region: str, *, asked: str) -> bool:
        """Sign for another region from now on, as a server says; whether it is another than was asked.

        Raises: StoreError if it is no name of a region: AWS's addresses are made of it.
        """
        import botocore.exceptions
        from botocore.utils import validate_region_name

        try:
            validate_region_name(region)
        except botocore.exceptions.InvalidRegionError as e:
            raise StoreError(f"s3://{self.bucket}: the bucket is said to be in region {region[:60]!r}: {e}") from e
        if region == asked:
            return False
        self.region = region
        return True

    def _new_session(self) -> Any:
        """A session that has read no file yet: botocore reads each once."""
        import botocore.session

        named = any(os.environ.get(name) for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"))
        # Set but empty, as templates leave them, they name a profile '' to botocore, which nobody has.
        unnamed = {} if named else {"profile": (None, None, None, None)}
        return botocore.session.Session(profile=self._profile, session_vars=unnamed)

    def _sign(self, method: str, url: str, keys: Any, region: str) -> Signed:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        for what, text in (("access key", keys.access_key), ("secret key", keys.secret_key), ("token", keys.token)):
            if text and not _KEY.fullmatch(text):
                raise AccessError(f"s3://{self.bucket}: the {what} has a blank or a line end around it, or one in it: "
                                  "look at how it was written (`echo` adds one, `echo -n` none)")  # fmt: skip
        request = AWSRequest(method, url, headers=self._payer)
        S3SigV4Auth(keys, "s3", region).add_auth(request)
        return Signed(dict(request.headers.items()), region, keys)

    def _presign(self, url: str, keys: Any, region: str) -> str:
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("GET", url, params=dict(self._payer))
        S3SigV4QueryAuth(keys, "s3", region, expires=PRESIGNED_S).add_auth(request)
        signed: str = request.url
        return signed

    def _keys(self) -> Any:
        import botocore.exceptions

        try:
            credentials = self._credentials
            if credentials is None:
                with self._searching:
                    if self._credentials is None:
                        self._credentials = self._new_session().get_credentials()
                    credentials = self._credentials
            if credentials is not None:
                return credentials.get_frozen_credentials()
        except botocore.exceptions.PartialCredentialsError as e:
            raise AccessError(f"s3://{self.bucket}: {e}") from e
        except botocore.exceptions.BotoCoreError as e:
            raise TransientStoreError(f"s3://{self.bucket}: fetching credentials failed: {e}") from e
        except (botocore.exceptions.ClientError, OSError, ValueError, RuntimeError) as e:
            # A token service refuses; a credential_process is not there or prints no JSON; keys are expired at birth.
            raise AccessError(f"s3://{self.bucket}: fetching credentials failed: {e}") from e
        raise AccessError(
            f"s3://{self.bucket}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or an instance role, or mount a public bucket unsigned"
        )

    def _base_url(self) -> str:
        region = self.region
        if known := self._base_urls.get(region):
            return known
        service = self.endpoint or self._aws_endpoint(region)
        if self.is_virtual:
            scheme, _, rest = service.partition("://")
            url = f"{scheme}://{self.bucket}.{rest}"
        else:
            url = f"{service}/{self.bucket}"
        self._base_urls[region] = url
        return url

    def _aws_endpoint(self, region: str) -> str:
        """AWS's address for S3 in a region, right for every partition (China, GovCloud, ...)."""
        resolver = self._session.get_component("endpoint_resolver")
        kinds = {f"use_{kind}_endpoint": bool(self._session.get_config_variable(f"use_{kind}_endpoint"))
                 for kind in ("fips", "dualstack")}  # fmt: skip
        found = resolver.construct_endpoint("s3", region, **kinds)
        if not found:
            said = "".join(f" with {kind}" for kind, is_wanted in kinds.items() if is_wanted)
            raise ConfigError(f"s3://{self.bucket}: no region {region!r}{said} is known; check --region or AWS_REGION")
        return f"https://{found['hostname']}"


def _region(session: Any) -> str | None:
    """AWS_DEFAULT_REGION, else AWS_REGION, which botocore alone of AWS's own does not read, else the profile's."""
    if not os.environ.get("AWS_DEFAULT_REGION") and (region := os.environ.get("AWS_REGION", "").strip()):
        return region
    found: str | None = session.get_config_variable("region")
    return found


def _ca_bundle(session: Any) -> CaBundle | None:
    """Where boto3 looks for certificates, in its order: AWS_CA_BUNDLE, ca_bundle of the profile, REQUESTS_CA_BUNDLE."""
    named = str(session.get_config_variable("ca_bundle") or "").strip()
    if named and not os.environ.get("AWS_CA_BUNDLE", "").strip():
        return CaBundle(os.path.expanduser(named), "ca_bundle of the AWS configuration")
    return ca_bundle(("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"))


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

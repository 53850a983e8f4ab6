"""Asking S3 once more, signed anew: where the bucket really is, or with the keys that hold now. As botocore does.

A new bucket answers from the wrong region with 307, one that has moved with 301, one of an opt-in region with
IllegalLocationConstraintException, and a signature for another region is AuthorizationHeaderMalformed: the region comes
from the header, else the error's XML, else a HEAD of the bucket. Its Location is not followed: the region says where.
Source: S3RegionRedirectorv2 in botocore 1.44; the S3 API reference, Error Responses and Request redirection.
"""

from __future__ import annotations

from collections.abc import Callable

from mfs.fetch.transport import Reply, Transport
from mfs.sources.s3_access import S3Access, Signed
from mfs.sources.s3_answers import MOVED_STATUSES, error_fields

_MOVED_CODES = frozenset(
    {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "TemporaryRedirect"}
)

_REFUSED_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken",
     "RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired", "UnrecognizedClientException"}
)  # fmt: skip
"""Said with 400 as often as with 403."""


RENEWALS_MAX = 3
"""For one request: what was found may be old again by the time it is sent."""


def ask(
    access: S3Access,
    transport: Transport,
    url: Callable[[], str],
    send: Callable[[str, dict[str, str]], Reply],
    *,
    method: str = "GET",
    deadline_s: float,
) -> Reply:
    """The answer to a request; asked again for another region, and for other keys, where the answer wants that.

    url: where to ask, by what `access` knows by then. send: asks there with these headers; its errors pass unchanged.
    method: what `send` will use; it is signed.
    """
    may_move, renewals_left = True, RENEWALS_MAX
    while True:
        address = url()
        signed = access.sign(address, method)
        reply = send(address, signed.headers)
        if may_move and _is_misdirected(reply):
            may_move = False
            if _find_bucket(access, transport, reply, signed, deadline_s):
                continue
        # The answer to a HEAD has no body to say that a token has expired.
        if renewals_left and (is_refused(reply) or (method == "HEAD" and reply.status == 400)):
            renewals_left -= 1
            if access.renew(signed, deadline_s=deadline_s):
                continue
        return reply


def _is_misdirected(reply: Reply) -> bool:
    if reply.status in MOVED_STATUSES:
        return True
    return reply.status in (400, 403) and error_fields(reply).get("Code") in _MOVED_CODES


def is_refused(reply: Reply) -> bool:
    return reply.status in (401, 403) or (reply.status == 400 and error_fields(reply).get("Code") in _REFUSED_CODES)


def _find_bucket(access: S3Access, transport: Transport, reply: Reply, asked: Signed, deadline_s: float) -> bool:
    """Whether the bucket is in another region than was asked; it is used from now on."""
    region = reply.headers.get("x-amz-bucket-region") or error_fields(reply).get("Region")
    if not region:
        address = access.object_url("")
        headers = access.sign(address, "HEAD").headers
        answer = transport.request(address, method="HEAD", headers=headers, deadline_s=deadline_s)
        region = answer.headers.get("x-amz-bucket-region")
    return region is not None and access.move(region, asked=asked.region)

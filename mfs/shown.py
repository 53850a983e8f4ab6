"""What is shown to people: secrets taken out of URLs, and strangers' texts without what a terminal would obey.

The one rule for every place where a text leaves us: messages of errors, logs, records of mounts, status, the commands.
Pure; imports nothing of ours.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

MASK = "***"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,2}\S+")
_QUERY = re.compile(r"\?\S+")
_BEHIND_AT = re.compile(r"@(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_PARAMETER = re.compile(r"""(?<=[?&;#])([^=&;#\s]+)=([^&;#\s'"<>)]*)""")
_SECRET_NAMES = re.compile(
    "sig|token|secret|passw|pwd|credential|key|auth|policy|jwt|session|code|hmac|hash|assertion|bearer|cookie",
    re.IGNORECASE,
)
"""Parts of the names of query parameters that let in whoever has them: X-Amz-Signature and -Credential (S3), sig
(Azure), Signature, Policy and Key-Pair-Id (CloudFront), X-Goog-Signature, access_token, api_key, hdnts_hmac and the
like. A word too many costs a message some clarity, one too few a secret."""


def mask_url(url: str) -> str:
    """`url` for eyes: its user, password and whatever in its query or fragment lets in are '***'.

    A user alone is taken out too: tokens are written there ('https://hf_…@host/'). A password with '/' in it, which
    ends the authority before its '@', is known by its colon. What has no scheme is taken for an authority, unless it is
    a path; two URLs with '@' between them (a bucket and its endpoint) for two.
    """
    if url.startswith("/"):
        return url
    second = _BEHIND_AT.search(url)
    if second and not _has_password(_parts(url[: second.start()])[1]):
        return f"{mask_url(url[: second.start()])}@{mask_url(url[second.end() :])}"
    head, authority, rest = _parts(url)
    if "@" in authority:
        authority = f"{MASK}@{authority.rpartition('@')[2]}"
    elif _has_password(authority) and "@" in rest:
        authority, rest = f"{MASK}@", rest.rpartition("@")[2]
    return f"{head}{authority}{_PARAMETER.sub(_masked_parameter, rest)}"


def _parts(url: str) -> tuple[str, str, str]:
    """('https://', 'user:password@host:1', '/path?query')."""
    match = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*:/{1,2})?", url)
    head = match[0] if match else ""
    authority = re.split(r"[/?#]", url[len(head) :], maxsplit=1)[0]
    return head, authority, url[len(head) + len(authority) :]


def _has_password(authority: str) -> bool:
    """Whether what stands behind its colon is no port."""
    _, colon, last = authority.rpartition(":")
    return bool(colon) and not authority.startswith("[") and bool(last) and not last.isdecimal()


def _masked_parameter(match: re.Match[str]) -> str:
    name = match[1]
    return f"{name}={MASK}" if match[2] and _SECRET_NAMES.search(unquote_plus(name)) else match[0]


def mask(text: str) -> str:
    """`text` with every URL in it as `mask_url` has it, and so the queries of those that are told without their host:
    libraries name a request by its path.
    """
    shown = _URL.sub(lambda found: mask_url(found[0]), text) if ":/" in text else text
    return _QUERY.sub(lambda found: _PARAMETER.sub(_masked_parameter, found[0]), shown) if "?" in shown else shown


def clean(text: str) -> str:
    """`text` with everything that is not printable written as an escape.

    File names and servers' messages come from strangers: an ESC could move the cursor, a U+202E swap what is read.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

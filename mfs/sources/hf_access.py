"""The Hub's manners: who we are, what its errors mean, how long its signed addresses live. Makes no requests."""

from __future__ import annotations

import logging
import os
import re
import time
from calendar import timegm
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from mfs.errors import AccessError, ChangedError, MfsError, NotFoundError, StoreError, TransientStoreError, UsageError
from mfs.fetch.connections import Origin
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s
from mfs.fetch.transport import Reply, without_userinfo

log = logging.getLogger(__name__)

HUB_URL = "https://huggingface.co"

HUB_ORIGINS = frozenset(Origin("https", host, 443) for host in ("huggingface.co", "hub-ci.huggingface.co", "hf.co"))
"""Where a file's address may lead with the token, from a mirror as well. Source: huggingface_hub 2.4, _HUB_ORIGINS."""

ADDRESS_S = 600.0
"""Life assumed of an address that does not state its own; the Hub signs for an hour."""

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def parse_hf_url(url: str) -> tuple[str, str]:
    """(repository, revision) of hf://org/name[@rev]; a revision may hold '/'. Raises: UsageError."""
    repo, at, revision = url.removeprefix("hf://").rstrip("/").partition("@")
    if not _REPO.fullmatch(repo) or (at and not revision):
        raise UsageError(f"{url!r}: expected hf://org/name or hf://org/name@revision")
    return repo, revision or "main"


def hub_endpoint(endpoint_url: str | None) -> str:
    """The hub to talk to: as configured, else HF_ENDPOINT, else the public one."""
    return without_userinfo(endpoint_url or os.environ.get("HF_ENDPOINT") or HUB_URL).rstrip("/")


def hub_token() -> str | None:
    """The token that huggingface_hub would send now, or None.

    HF_TOKEN, else HUGGING_FACE_HUB_TOKEN, else what stands in HF_TOKEN_PATH or where `hf auth login` writes it; none
    with HF_HUB_DISABLE_IMPLICIT_TOKEN. Source: `get_token` and `get_token_to_send` of huggingface_hub 2.4; its exchange
    of OIDC tokens (HF_OIDC_RESOURCE) is left out.
    """
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return None
    # A variable of blanks counts as set, and then the file is asked next: so does huggingface_hub.
    variable = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "HUGGING_FACE_HUB_TOKEN"
    if token := _clean(os.environ.get(variable, ""), variable):
        return token
    path = _token_path()
    try:
        return _clean(path.read_text(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        log.warning("the Hub's token is not used: %s: %s", path, e)
        return None


def _token_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")))


def _clean(token: str, place: str) -> str | None:
    """A token without line ends and blanks around it; None where nothing is left, or what no header can carry."""
    token = token.replace("\r", "").replace("\n", "").strip()
    if not (token.isascii() and token.isprintable()):
        log.warning("the Hub's token is not used: %s holds other characters than a token may", place)
        return None
    return token or None


def is_refusal(reply: Reply) -> bool:
    """Whether an answer may mean that our token is not (or no longer) good: the Hub says so as 404, too."""
    return reply.status in (401, 403) or (
        reply.status == 404 and reply.headers.get("X-Error-Code", "") in ("RepoNotFound", "")
    )


def error_of(reply: Reply, where: str, repo: str, endpoint: str, *, has_token: bool) -> MfsError:
    """Our error for an answer of the Hub that is none of 200, 206 and redirects."""
    code = reply.headers.get("X-Error-Code", "")
    login = "the token in use may not" if has_token else "set HF_TOKEN or run `hf auth login`"
    match code:
        case "RepoNotFound":
            return NotFoundError(f"{where}: no such repository, or a private one: check the name; if private, {login}")
        case "GatedRepo":
            return AccessError(
                f"{where}: gated: accept its licence at {endpoint}/{repo}, then use that account: {login}"
            )
        case "RevisionNotFound":
            return NotFoundError(f"{where}: the repository {repo} has no such branch, tag or commit")
        case "EntryNotFound":
            return NotFoundError(f"{where}: no such file in this revision")
    said = f"{where}: the Hub answered {reply.status} {code or reply.headers.get('X-Error-Message', '')}".rstrip()
    if reply.status in TRANSIENT_STATUSES:
        return TransientStoreError(said, retry_after_s=wished_pause_s(reply.headers))
    if reply.status in (401, 403):
        return AccessError(f"{said}: refused: {login}")
    if reply.status == 404:
        return NotFoundError(f"{said}: not there (any more)")
    if reply.status in (412, 416):
        return ChangedError(f"{said}: not the bytes that were listed")
    return StoreError(said)


def expiry_s(url: str) -> float:
    """time.time() value after which a redirect's address should be fetched anew, a little before it dies.

    Reads `Expires` (epoch) and `X-Amz-Date` with `X-Amz-Expires`; where neither stands, ADDRESS_S from now.
    """
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    now_s = time.time()
    end_s = now_s + ADDRESS_S
    try:
        if "Expires" in query:
            end_s = float(query["Expires"])
        elif "X-Amz-Date" in query and "X-Amz-Expires" in query:
            signed_s = timegm(time.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ"))
            end_s = signed_s + float(query["X-Amz-Expires"])
    except ValueError:
        pass  # an address of another make: keep the default, and 403 tells the rest
    return end_s - min(30.0, max(0.0, end_s - now_s) / 10)

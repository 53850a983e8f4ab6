"""Writing and deleting on S3 by boto3, one request a call: what an answer means is the caller's to judge.

Keys, region and address are `S3Access`'s, so that what reads and what writes agree on them; a client is made anew when
they change. boto3 itself tries nothing again. What is sent is signed with its sha256, so that a server takes no other
bytes.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from typing import Any

from mfs.errors import AccessError, MfsError, StoreError
from mfs.errors import TransientStoreError as Transient
from mfs.fetch.transport import Reply
from mfs.sources.options import SourceOptions
from mfs.sources.s3_access import S3Access, Signed
from mfs.sources.s3_again import RENEWALS_MAX, is_refused
from mfs.sources.s3_answers import error_of

CONNECT_S, ANSWER_S = 10.0, 60.0
"""Until a connection, or one send or receive on it, has failed; the next try begins anew."""

CONNECTIONS_MAX = 32
"""Kept by one client; more callers than that at once wait for each other."""


class S3Writer:
    """Puts and deletes in one bucket. Thread-safe; connects when first used."""

    def __init__(self, access: S3Access, options: SourceOptions) -> None:
        self._access = access
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        self._making = threading.Lock()
        self._client: Any = None
        self._made_for: tuple[Any, str] | None = None

    def put(self, key: str, body: bytes, *, is_new: bool = False, also: tuple[int, ...] = ()) -> int:
        """Send an object: 200 if it was taken.

        is_new: with `If-None-Match: *`; then 409, 412 and the statuses `also` are answers and no errors.
        Raises: TransientStoreError where it may have been taken or not; AccessError, StoreError.
        """
        condition = {"IfNoneMatch": "*"} if is_new else {}

        def call(client: Any) -> None:
            client.put_object(Bucket=self._access.bucket, Key=key, Body=body, **condition, **self._payer)

        return self._ask(key, call, (409, 412, *also) if is_new else ())

    def delete(self, key: str) -> None:
        """Remove an object, if there is one. Raises: as `put`."""

        def call(client: Any) -> None:
            client.delete_object(Bucket=self._access.bucket, Key=key, **self._payer)

        self._ask(key, call, (404,))

    def close(self) -> None:
        """Drop connections."""
        with self._making:
            if self._client is not None:
                self._client.close()

    def _ask(self, key: str, call: Callable[[Any], None], expected: tuple[int, ...]) -> int:
        """200, or which status of `expected` it was. Asked again with other keys, where there are, if refused."""
        import botocore.exceptions as foreign

        where = f"s3://{self._access.bucket}/{key}"
        renewals_left = RENEWALS_MAX
        while True:
            signed = self._access.sign(self._access.object_url(""))
            try:
                call(self._client_for(signed))
                return 200
            except foreign.ClientError as e:
                reply = _reply_of(e)
                if renewals_left and is_refused(reply):
                    renewals_left -= 1
                    if self._access.renew(signed, deadline_s=time.monotonic() + ANSWER_S):
                        continue
                if reply.status in expected:
                    return reply.status
                raise self._error_of(reply, where) from e
            except (foreign.HTTPClientError, foreign.ConnectionError, OSError) as e:
                raise Transient(f"{where}: {type(e).__name__}: {e}") from e
            except foreign.BotoCoreError as e:
                raise StoreError(f"{where}: {type(e).__name__}: {e}") from e

    def _error_of(self, reply: Reply, where: str) -> MfsError:
        error = error_of(reply, where, self._access.region)
        if isinstance(error, AccessError) and b"<Code>AccessDenied<" in reply.body:
            return AccessError(f"{where}: S3 answered {reply.status} AccessDenied: these credentials may not write "
                               "here: check that s3:PutObject and s3:DeleteObject are allowed")  # fmt: skip
        return error

    def _client_for(self, signed: Signed) -> Any:
        with self._making:
            wanted = (signed.keys, signed.region)
            if self._client is None or self._made_for != wanted:
                self._client, self._made_for = self._made(signed), wanted  # calls under way keep the old one
            return self._client

    def _made(self, signed: Signed) -> Any:
        import boto3
        import botocore
        from botocore.config import Config

        keys = signed.keys
        session = boto3.session.Session()
        return session.client(
            "s3",
            endpoint_url=self._access.endpoint,
            region_name=signed.region,
            aws_access_key_id=keys and keys.access_key,
            aws_secret_access_key=keys and keys.secret_key,
            aws_session_token=keys and keys.token,
            verify=self._access.ca_bundle.path if self._access.ca_bundle else None,
            config=Config(
                signature_version="s3v4" if keys else botocore.UNSIGNED,
                s3={
                    "addressing_style": "virtual" if self._access.is_virtual else "path",
                    "payload_signing_enabled": True,
                },
                # Checksums of its own choice travel as a trailer, which servers other than AWS may not know.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": 1},
                connect_timeout=CONNECT_S,
                read_timeout=ANSWER_S,
                max_pool_connections=CONNECTIONS_MAX,
            ),
        )


def _reply_of(error: Any) -> Reply:
    """A refusal as our transport would have brought it."""
    said, about = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    headers = http.client.HTTPMessage()
    for name, value in about.get("HTTPHeaders", {}).items():
        headers[name] = value
    code, message = str(said.get("Code", "")), str(said.get("Message", ""))
    body = f"<Error><Code>{code}</Code><Message>{message.replace('<', ' ')}</Message></Error>"
    return Reply(int(about.get("HTTPStatusCode", 0)), headers, body.encode())

"""What stands before a registry in the field and does something of its own: an HTTP server that asks a function what to
answer, and passes on what that does not mind.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import requests

from tests.servers.docker_registry import DockerRegistry
from tests.servers.scripted import Answer, Request, ScriptedServer
from tests.servers.tls import Certificate

_PASSED = ("content-type", "content-range", "accept", "range")
_ANSWERED = ("location", "range", "docker-content-digest", "content-type")

Relay = Callable[[Request], Answer]


@contextmanager
def gateway(
    registry: DockerRegistry, answer: Callable[[Request, Relay], Answer], certificate: Certificate | None = None
) -> Iterator[ScriptedServer]:
    """Listen before `registry`; `answer` gets each request and what asks the registry. certificate: speak TLS."""

    def relay(request: Request) -> Answer:
        headers = {name: request.headers[name] for name in _PASSED if name in request.headers}
        headers["Host"] = server.url.partition("://")[2]
        reply = requests.request(
            request.method, f"{registry.url}{request.path}", params=request.query, data=request.body, headers=headers,
            timeout=30, allow_redirects=False,
        )  # fmt: skip
        said = [(name, reply.headers[name]) for name in _ANSWERED if name in reply.headers]
        return Answer(reply.status_code, reply.content, tuple(said))

    server = ScriptedServer(lambda request: answer(request, relay))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert_file, certificate.key_file)
        server.wrap(context)
    with server:
        yield server

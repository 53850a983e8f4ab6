"""nginx serving a folder: JSON listings, ranges and ETags, plain and over TLS, with every request counted.

The whole folder appears at `/` and again below a few prefixes that misbehave (see `NginxServer`).
nginx makes ETags of mtime (whole seconds) and size: change one of them when a file must count as changed.
Quirk (nginx 1.22): a 412 says keep-alive, and then the connection is closed without a word.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import urllib.request
import uuid
from pathlib import Path
from typing import NamedTuple

from tests.servers.process import ServerError, ServerProcess, answers_tcp, free_port, wait_for_signal
from tests.servers.tls import make_certificate

# One process, no master: nothing is left when it is killed, and requests are logged in the order they ended.
_CONF = """\
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  default_type application/octet-stream;
  log_format facts escape=json '{{"method":"$request_method","path":"$uri","status":$status,'
    '"range":"$http_range","sent_bytes":$body_bytes_sent,"scheme":"$scheme",'
    '"traceparent":"$http_traceparent"}}';
  access_log {root}/access.log facts;
  client_body_temp_path {root}/tmp/body;
  proxy_temp_path {root}/tmp/proxy;
  fastcgi_temp_path {root}/tmp/fastcgi;
  uwsgi_temp_path {root}/tmp/uwsgi;
  scgi_temp_path {root}/tmp/scgi;
  sendfile on;
  tcp_nodelay on;
  keepalive_requests 1000000;
  keepalive_timeout 3600s;
  autoindex on;
  autoindex_format json;
  server {{
    listen {host}:{port};
    listen 127.0.0.1:{tls_port} ssl;
    ssl_certificate {cert_file};
    ssl_certificate_key {key_file};
    root {files};
    location /~mark/ {{ return 204; }}
    location /~no-ranges/ {{ alias {files}/; max_ranges 0; }}
    location /~no-index/ {{ alias {files}/; autoindex off; }}
    location /~html-index/ {{ alias {files}/; autoindex_format html; }}
    location /~private/ {{ alias {files}/; auth_basic tests; auth_basic_user_file {root}/users; }}
    location /~forbidden/ {{ alias {files}/; deny all; }}
    location /~moved/ {{ rewrite ^/~moved(/.*)$ $1 redirect; }}
    location /~unavailable/ {{ return 503; }}
    location /~store/ {{
      alias {files}/;
      dav_methods PUT DELETE MKCOL;
      create_full_put_path on;
      client_max_body_size 0;
    }}
  }}
}}
"""


class Request(NamedTuple):
    """One request as nginx logged it."""

    method: str
    path: str
    """Decoded, without the query."""
    status: int
    range: str
    """The Range header, '' without one."""
    sent_bytes: int
    """Body bytes."""
    scheme: str
    """'http' or 'https'."""
    traceparent: str = ""
    """That header, '' without one."""


class NginxServer:
    """One folder over HTTP at `url` and HTTPS at `tls_url` (trust `ca_file`).

    Prefixes that show the same folder otherwise: `~no-ranges` answers 200 to a Range, `~no-index` refuses to list
    (403), `~html-index` lists for people, `~private` wants `user` and `password` (401), `~forbidden` is 403,
    `~moved` redirects to the honest address, `~unavailable` is 503. And one takes files: `~store`, by WebDAV's PUT.
    """

    user = "reader"
    password = "secret"

    def __init__(
        self, root: Path, *, files: Path | None = None, port: int | None = None, host: str = "127.0.0.1"
    ) -> None:
        """Keep state under `root`; serve `files`, by default the new folder `root/files`. host: to listen on; TLS is
        always on loopback."""
        self.root = root
        self.host = host
        self.files = files or root / "files"
        self.port = port or free_port()
        self.tls_port = free_port()
        self.url = f"http://{host}:{self.port}/"
        self.tls_url = f"https://localhost:{self.tls_port}/"
        self.ca_file = root / "tls" / "ca.pem"
        self._process: ServerProcess | None = None

    def start(self) -> None:
        """Start and return when it answers. Raises: ServerError."""
        if self._process:
            raise ServerError("nginx is already running")
        binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise ServerError("nginx is not installed: run tools/setup test")
        if not self.ca_file.exists():
            self._lay_out()
        argv = [binary, "-p", str(self.root), "-e", "stderr", "-c", str(self.root / "nginx.conf")]
        self._process = ServerProcess("nginx", argv, log=self.root / "nginx.log")
        self._process.wait_until(lambda: answers_tcp(self.port, self.host))

    def stop(self) -> None:
        """Kill it; connections under way are cut. `start` brings it back on the same ports."""
        if self._process:
            self._process.popen.kill()
            self._process.reap()
            self._process = None

    def ensure_started(self) -> None:
        """Start unless running."""
        if not self._process:
            self.start()

    def requests(self, path: str | None = None) -> list[Request]:
        """Requests answered until now, in order; with `path` ('/a/b'), those for exactly it. nginx must be running."""
        # nginx logs after the last byte has left, so a client can be ahead of the log. It is one process: once a
        # request of our own is logged, everything that ended before it is.
        mark = f"/~mark/{uuid.uuid4().hex}"
        urllib.request.urlopen(self.url.rstrip("/") + mark, timeout=10).close()
        log = self.root / "access.log"
        assert self._process is not None
        self._process.wait_until(lambda: mark in log.read_text(), timeout_s=10)
        found = [Request(**json.loads(line)) for line in log.read_text().splitlines()]
        return [r for r in found if not r.path.startswith("/~mark/") and path in (None, r.path)]

    def forget_requests(self) -> None:
        """Start counting anew."""
        self.requests()  # whatever has ended is logged now
        (self.root / "access.log").write_text("")  # nginx appends

    def __enter__(self) -> NginxServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _lay_out(self) -> None:
        self.files.mkdir(parents=True, exist_ok=True)
        (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        certificate = make_certificate(self.root / "tls")
        (self.root / "users").write_text(f"{self.user}:{{PLAIN}}{self.password}\n")
        (self.root / "nginx.conf").write_text(
            _CONF.format(
                root=self.root,
                files=self.files,
                host=self.host,
                port=self.port,
                tls_port=self.tls_port,
                cert_file=certificate.cert_file,
                key_file=certificate.key_file,
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="nginx-"))
    with NginxServer(root, files=args.files.resolve(), port=args.port) as server:
        print(server.url, server.tls_url, f"ca_file={server.ca_file}", f"log={root}/access.log", flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()

"""Caches as they stand between nodes and an origin: nginx and varnish as RECIPES.md has them, and as it warns against.

The configuration is read out of the recipe, so what operators copy is what is tested; only places are put in.
"""

from __future__ import annotations

import http.client
import re
import shutil
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from tests.servers.process import PROJECT_ROOT, ServerError, ServerProcess, answers_tcp, free_port

_RECIPES = PROJECT_ROOT / "mfs" / "RECIPES.md"

_NGINX = """\
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log {root}/error.log crit;
events {{ worker_connections 1024; }}
http {{
  client_body_temp_path {root}/tmp/body;
  proxy_temp_path {root}/tmp/proxy;
  fastcgi_temp_path {root}/tmp/fastcgi;
  uwsgi_temp_path {root}/tmp/uwsgi;
  scgi_temp_path {root}/tmp/scgi;
{recipe}
}}
"""


def recipe(language: str) -> str:
    """A block of RECIPES.md: 'nginx' or 'varnish'."""
    found = re.search(rf"```{language}\n(.*?)```", _RECIPES.read_text(), re.DOTALL)
    assert found is not None, f"RECIPES.md has no recipe in {language}"
    return found[1]


class NodeCache:
    """A cache at `url`, on this machine; `stop` and `start` as often as wanted, on one port."""

    name = ""

    def __init__(self, root: Path, *, host: str = "127.0.0.1") -> None:
        self.root = root
        self.host = host
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self._process: ServerProcess | None = None
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start, and return when it takes connections. Raises: ServerError."""
        self._process = ServerProcess(self.name, self._argv(), log=self.root / f"{self.name}.out")
        self._process.wait_until(lambda: answers_tcp(self.port, self.host))

    def stop(self) -> None:
        """End it; connections under way are cut."""
        if self._process:
            self._process.stop()
            self._process = None

    def traces(self) -> bytes:
        """All that it has written anywhere: logs, and what it keeps on disk."""
        return b"\n".join(file.read_bytes() for file in sorted(self.root.rglob("*")) if file.is_file())

    def _argv(self) -> list[str]:
        raise NotImplementedError

    def __enter__(self) -> NodeCache:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class NginxCache(NodeCache):
    """nginx with `slice`."""

    name = "nginx"

    def __init__(
        self, root: Path, *, host: str = "127.0.0.1", knows_versions: bool = True, ca_file: Path | None = None
    ):
        """knows_versions: whether its keys have the version, as they should. ca_file: to trust, not the system's."""
        super().__init__(root, host=host)
        text = recipe("nginx")
        changes = {
            "/var/cache/nginx/mfs": f"{root}/cache",
            "listen 8080": f"listen {host}:{self.port}",
            "/var/log/nginx/mfs.log": f"{root}/access.log",
            "/var/log/nginx/mfs-error.log": f"{root}/error.log",
        }
        if ca_file:
            changes["/etc/ssl/certs/ca-certificates.crt"] = str(ca_file)
        if not knows_versions:
            changes[" $http_mfs_object "] = " "
        for old, new in changes.items():
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
            text = text.replace(old, new)
        (root / "nginx.conf").write_text(_NGINX.format(root=root, recipe=text))

    def answers(self, *, at_least: int = 0) -> list[str]:
        """What became of each request that has ended: HIT, MISS, EXPIRED, …; as of `lines`."""
        return [line.rsplit(" ", 1)[1] for line in self.lines(at_least=at_least)]

    def lines(self, *, at_least: int = 0) -> list[str]:
        """The access log. It must be running. at_least: requests that are waited for: what a client has, whole, may not
        have ended yet, since the rest of its slice is fetched too.
        """
        assert self._process is not None
        self._process.wait_until(lambda: len(self._lines()) >= at_least, timeout_s=20)
        return self._lines()

    def _lines(self) -> list[str]:
        # It is one process: once a request of ours stands there, all that ended before it do; nobody listens where that
        # one leads.
        mark = f"/~mark/{uuid.uuid4().hex}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        connection.request("GET", f"http://127.0.0.1:1{mark}")
        connection.getresponse().read()
        connection.close()
        log = self.root / "access.log"
        assert self._process is not None
        self._process.wait_until(lambda: mark in log.read_text(), timeout_s=10)
        return [line for line in log.read_text().splitlines() if "/~mark/" not in line]

    def _argv(self) -> list[str]:
        binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise ServerError("nginx is not installed: run tools/setup test")
        return [binary, "-p", str(self.root), "-e", str(self.root / "error.log"), "-c", str(self.root / "nginx.conf")]


class VarnishCache(NodeCache):
    """varnish before one origin."""

    name = "varnish"

    def __init__(self, root: Path, origin_url: str, *, host: str = "127.0.0.1") -> None:
        super().__init__(root, host=host)
        origin = urlsplit(origin_url)
        backend = '.host = "192.0.2.10"; .port = "80";'
        text = recipe("varnish")
        assert text.count(backend) == 1
        text = text.replace(backend, f'.host = "{origin.hostname}"; .port = "{origin.port}";')
        (root / "mfs.vcl").write_text(text)

    def _argv(self) -> list[str]:
        binary = shutil.which("varnishd", path="/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise ServerError("varnish is not installed: run tools/setup test")
        unseen = re.search(r"`-p (vsl_mask=\S+)`", _RECIPES.read_text())
        assert unseen is not None
        where = ["-a", f"{self.host}:{self.port}", "-f", str(self.root / "mfs.vcl"), "-n", str(self.root / "n")]
        return [binary, "-F", *where, "-s", "malloc,256m", "-j", "none", "-T", "none", "-p", unseen[1]]

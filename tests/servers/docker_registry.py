"""Debian's docker-registry (distribution 2.8), a real OCI registry: open, with htpasswd, with bearer tokens; its blobs
in files, or on S3 with redirects to it.

Quirks (2.8.2): no referrers API and no `OCI-Subject`; manifests must be PUT as OCI's own media type; with S3 storage
GET and HEAD of a blob are 307 to an address signed for 20 minutes; it panics at start where AWS_CA_BUNDLE is set.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any, Literal, Self

from tests.servers.process import ServerError, ServerProcess, free_port, wait_for_signal
from tests.servers.remote import Remote, RemoteServer
from tests.servers.s3_client import S3Account

PROGRAM = shutil.which("docker-registry")

USER, PASSWORD = "alice", "s3cret"
_HTPASSWD = f"{USER}:$2b$04$mfsmfsmfsmfsmfsmfsmfsejAa7HqfvzQdonNwKYBNcddkFvz725.6\n"
_SERVICE, _ISSUER = "mfs-registry", "mfs-issuer"


class TokenServer(RemoteServer):
    """Gives tokens that a registry with `auth: token` takes. Anybody may pull `pub/…`; USER may do everything."""

    def __init__(self, root: Path, *, port: int | None = None) -> None:
        super().__init__("token server", root, port)
        self.realm = f"http://127.0.0.1:{self.port}/token"
        self.certificate_file = root / "token.pem"

    def begin(self, log: Path) -> Remote:
        """With tokens of a minute."""
        settings = {"port": self.port, "root": str(self.root), "user": USER, "password": PASSWORD,
                    "service": _SERVICE, "issuer": _ISSUER}  # fmt: skip
        return Remote("tests.servers.token_site", log=log, settings=settings)

    def set(self, **settings: Any) -> None:
        """ttl_s: life of further tokens; is_known: whether `expires_in` says so; password: the one that is good."""
        self.running.call("set", **settings)

    def requests(self) -> list[dict[str, Any]]:
        """Each request: {method, scopes, user}."""
        found: list[dict[str, Any]] = self.running.call("requests")
        return found

    def forget_requests(self) -> None:
        self.running.call("forget")


class DockerRegistry:
    """One registry. `stop` and `start` keep its data and port."""

    def __init__(
        self,
        root: Path,
        *,
        auth: Literal["", "htpasswd", "token"] = "",
        tokens: TokenServer | None = None,
        s3: S3Account | None = None,
        s3_endpoint: str = "",
        bucket: str = "",
        port: int | None = None,
    ) -> None:
        """Keep configuration, and blobs unless on S3, under `root`; start nothing.

        tokens: started, for auth 'token'. s3_endpoint: where clients are redirected to, instead of the account's own.
        """
        self.root = root
        self.data = root / "data"
        self.port = port or free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self._process: ServerProcess | None = None
        root.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.data)},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": {"addr": self.host, "secret": "mfs"},
        }
        if s3 is not None:
            del config["storage"]["filesystem"]
            config["storage"]["s3"] = {
                "region": s3.region, "regionendpoint": s3_endpoint or s3.endpoint, "bucket": bucket,
                "accesskey": s3.access_key, "secretkey": s3.secret_key, "secure": False, "v4auth": True,
                "chunksize": 5 << 20, "rootdirectory": "/reg",
            }  # fmt: skip
            config["storage"]["redirect"] = {"disable": False}
        if auth == "htpasswd":
            (root / "htpasswd").write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "mfs", "path": str(root / "htpasswd")}}
        elif auth == "token":
            assert tokens is not None
            config["auth"] = {"token": {"realm": tokens.realm, "service": _SERVICE, "issuer": _ISSUER,
                                        "rootcertbundle": str(tokens.certificate_file)}}  # fmt: skip
        (root / "registry.yml").write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> None:
        """Start and return when it answers. Raises: ServerError."""
        if PROGRAM is None:
            raise ServerError("no docker-registry: run tools/setup test")
        argv = ["env", "-u", "AWS_CA_BUNDLE", PROGRAM, "serve", str(self.root / "registry.yml")]
        self._process = ServerProcess("docker-registry", argv, log=self.log)
        self._process.wait_until(self._answers)

    def stop(self) -> None:
        """Kill it; connections under way are cut."""
        if self._process:
            self._process.popen.kill()
            self._process.reap()
            self._process = None

    @property
    def log(self) -> Path:
        return self.root / "registry.log"

    def requests(self) -> list[str]:
        """'METHOD /path' of each request that was answered, in order."""
        # A line is written after its answer was sent: once those of two requests of our own stand there, all before do.
        assert self._process is not None, "not running"
        for _ in range(2):
            mark = f"/v2/?mark={uuid.uuid4().hex}"
            try:
                urllib.request.urlopen(f"{self.url}{mark}", timeout=20).close()
            except urllib.error.HTTPError as error:  # 401, where one must log in
                error.close()
            self._process.wait_until(lambda mark=mark: any(mark in line for line in self._requests()))  # type: ignore[misc]
        return [line for line in self._requests() if "/v2/?mark=" not in line]

    def _requests(self) -> list[str]:
        marker = '"'
        lines = self.log.read_text(errors="replace").splitlines()
        access = [line.split(marker)[1] for line in lines if " HTTP/1." in line and line.count(marker) >= 2
                  and not line.startswith("time=")]  # fmt: skip
        return [text.rpartition(" ")[0] for text in access]

    def blob_file(self, digest: str) -> Path:
        """Where a blob stands, if not on S3: for whoever changes it behind the registry's back."""
        hexed = digest.partition(":")[2]
        return self.data / "docker/registry/v2/blobs/sha256" / hexed[:2] / hexed / "data"

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/v2/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--auth", choices=["", "htpasswd"], default="")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    with DockerRegistry(Path(tempfile.mkdtemp(prefix="registry-")), auth=args.auth, port=args.port) as server:
        print(server.host, flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()

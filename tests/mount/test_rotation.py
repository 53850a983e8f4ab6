"""Keys replaced under a mount in use: every worker finds the new ones, and nobody mounts again.

The bucket wants its requesters to pay, so that the setting is seen to reach the workers.
"""

from __future__ import annotations

from pathlib import Path

from mfs.testing import ramp
from tests.mount import touching
from tests.mount.conftest import Mounted
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error

FILES = {f"m/w{n}.bin": ramp(400_000, n) for n in range(8)}


def test_reads_and_refreshes_go_on_with_the_keys_of_the_day(mounted: Mounted, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    good = {"key": ""}

    def rotate(key: str) -> None:
        new = tmp_path / "new"
        new.write_text(f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = t{key}\n")
        new.rename(credentials)
        good["key"] = key

    def answer(request: Request) -> Answer:
        if request.headers.get("x-amz-request-payer") != "requester":
            return s3_error(403, "AccessDenied")
        if f"Credential={good['key']}/" not in request.authorization:
            return s3_error(400, "ExpiredToken")
        return s3_bucket(request, FILES)

    with ScriptedServer(answer) as server:
        rotate("AKONE")
        env = {"AWS_SHARED_CREDENTIALS_FILE": str(credentials), "AWS_REGION": "us-east-1"}
        source = {"endpoint_url": server.url, "profile": "lab", "requester_pays": True}
        mount = mounted("s3://b", source=source, env=env)
        for key in ("AKONE", "AKTWO", "AKTHREE"):
            rotate(key)
            for name in [*FILES][: 2 if key == "AKONE" else 6]:  # by both workers
                path = str(mount.path / name)
                mount.call(touching.drop_pages, path)
                mount.client.evict([name], "all")
                assert mount.call(touching.read, path) == FILES[name]
        rotate("AKFOUR")
        mount.client.refresh()
        assert mount.call(touching.tree, str(mount.path)) == {name: len(data) for name, data in FILES.items()}

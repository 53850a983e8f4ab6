"""Keys replaced under a mount in use: every worker finds the new ones, and nobody mounts again.

The bucket wants its requesters to pay, so that the setting is seen to reach the workers.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from mfs.config import SourceConfig
from mfs.testing import ramp
from tests.mount import issuers, touching
from tests.mount.conftest import Mounted
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error


def read_anew(path: str, offset: int, length: int) -> bytes:
    touching.drop_pages(path)
    return touching.pread(path, length, offset)


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


def test_readers_go_on_while_everything_that_lets_them_in_expires(mounted: Mounted, tmp_path: Path) -> None:
    """Keys in a file, by a program, from STS for a web identity; the Hub's token, ~/.netrc and docker's config.json:
    each is soon refused, and six readers read what nobody has cached, through nine of each.
    """
    by_file, by_program, by_sts = issuers.Bucket(), issuers.Bucket(), issuers.Bucket()
    hub, folder, registry = issuers.Hub(), issuers.Folder(), issuers.Registry()
    all_of_them = (by_file, by_program, by_sts, hub, folder, registry)
    (tmp_path / "docker").mkdir()
    with contextlib.ExitStack() as stack:
        urls = {issuer: stack.enter_context(ScriptedServer(issuer.answer)).url for issuer in all_of_them}
        host = urls[registry].removeprefix("http://")

        def key_file(name: str) -> Callable[[str], None]:
            keys = "[{}]\naws_access_key_id = {}\naws_secret_access_key = s\naws_session_token = t\n"
            return lambda word: issuers.put(tmp_path / name, keys.format("lab", word))

        def docker(word: str) -> None:
            auth = base64.b64encode(f"me:{word}".encode()).decode()
            issuers.put(tmp_path / "docker" / "config.json", json.dumps({"auths": {host: {"auth": auth}}}))

        program = tmp_path / "give"
        program.write_text(
            f"#!{sys.executable} -S\nimport json\nprint(json.dumps({{'Version': 1, 'SecretAccessKey': 's', "
            f"'AccessKeyId': open({str(tmp_path / 'key')!r}).read(), 'Expiration': '2099-01-01T00:00:00Z'}}))\n"
        )
        program.chmod(0o700)
        (tmp_path / "token").write_text("a token of a service account")
        (tmp_path / "config").write_text(
            f"[profile program]\ncredential_process = {program}\n"
            f"[profile web]\nrole_arn = arn:aws:iam::1:role/r\nweb_identity_token_file = {tmp_path / 'token'}\n"
        )
        writers = {
            by_file: key_file("credentials"), by_program: lambda word: issuers.put(tmp_path / "key", word),
            hub: lambda word: issuers.put(tmp_path / "hub", word), registry: docker,
            folder: lambda word: issuers.put(tmp_path / ".netrc", f"machine 127.0.0.1 login me password {word}\n"),
        }  # fmt: skip

        def turn() -> None:
            for issuer in all_of_them:
                issuer.turn += 1
                if issuer in writers:
                    writers[issuer](issuer.issue())

        turn()
        sources = [
            *(SourceConfig("s3://b", name, endpoint_url=urls[issuer], profile=profile) for name, issuer, profile in
              (("file", by_file, "lab"), ("program", by_program, "program"), ("sts", by_sts, "web"))),
            SourceConfig("hf://org/name", "hub", endpoint_url=urls[hub]),
            SourceConfig(f"{urls[folder]}/d/", "folder"), SourceConfig(f"oci+http://{host}/team/m:v1", "registry"),
        ]  # fmt: skip
        env = {
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_CONFIG_FILE": str(tmp_path / "config"),
            "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL_STS": f"{urls[by_sts]}/sts", "HOME": str(tmp_path),
            "HF_TOKEN_PATH": str(tmp_path / "hub"), "DOCKER_CONFIG": str(tmp_path / "docker"),
        }  # fmt: skip
        mount = mounted("", sources=sources, env=env)
        readers = [mount.outside() for _ in sources]
        for number in range(8):
            mount.client.evict([""], "all")
            for reader, source in zip(readers, sources, strict=True):
                reader.start(read_anew, str(mount.path / source.name / issuers.NAME), 700_000 * (number % 5), 5000)
            turn()  # while they read
            for reader in readers:
                assert reader.finish() == issuers.CONTENT[700_000 * (number % 5) :][:5000]
        assert mount.client.refresh()["errors"] == []
        assert min(issuer.refused_count for issuer in all_of_them) > 2, "nobody was ever refused: nothing was tried"

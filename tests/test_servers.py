"""Each test server does what its module promises: the suites that stand on them may then trust them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.servers import leftovers
from tests.servers.process import PROJECT_ROOT, ServerError, ServerProcess
from tests.servers.swift import SwiftServer


def status(error: ClientError) -> int:
    code: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return code


class TestProcess:
    def test_a_server_that_cannot_start_shows_its_log(self, tmp_path: Path) -> None:
        with pytest.raises(ServerError, match=r"(?s)sad exited with status 3.*no such port"):
            ServerProcess("sad", ["sh", "-c", "echo no such port; exit 3"], log=tmp_path / "log").wait_until(
                lambda: False
            )

    def test_servers_die_with_a_killed_test_run(self, tmp_path: Path) -> None:
        code = (
            "import os, pathlib, sys; from tests.servers.swift import SwiftServer;"
            "server = SwiftServer(pathlib.Path(sys.argv[1])); server.start();"
            "print(*(process.pid for process in server._processes), flush=True); input()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with parent:
            assert parent.stdout
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 4
            before = {pid: line for pid, line in leftovers.processes().items() if pid not in pids}
            parent.send_signal(signal.SIGKILL)
        assert leftovers.settle_processes(before) == []


class TestSwift:
    def test_range_and_conditional_get(self, swift: SwiftServer, s3_bucket: str) -> None:
        client = swift.client()
        client.put_object(Bucket=s3_bucket, Key="a/b", Body=b"hello world")
        etag = client.head_object(Bucket=s3_bucket, Key="a/b")["ETag"]
        got = client.get_object(Bucket=s3_bucket, Key="a/b", Range="bytes=2-5", IfMatch=etag)
        assert got["Body"].read() == b"llo "
        assert got["ContentRange"] == "bytes 2-5/11"
        client.put_object(Bucket=s3_bucket, Key="a/b", Body=b"other bytes")
        with pytest.raises(ClientError) as caught:
            client.get_object(Bucket=s3_bucket, Key="a/b", IfMatch=etag)
        assert status(caught.value) == 412

    @pytest.mark.parametrize("wrong", [{"aws_secret_access_key": "wrong"}, {"aws_access_key_id": "nobody"}])
    def test_wrong_signature_is_refused(self, swift: SwiftServer, s3_bucket: str, wrong: dict[str, str]) -> None:
        with pytest.raises(ClientError) as caught:
            swift.client(**wrong).list_objects_v2(Bucket=s3_bucket)
        assert status(caught.value) == 403

    def test_data_and_port_outlive_a_restart(self, swift: SwiftServer, s3_bucket: str) -> None:
        client = swift.client()
        client.put_object(Bucket=s3_bucket, Key="kept", Body=b"bytes")
        swift.stop()
        with pytest.raises(EndpointConnectionError):
            client.head_object(Bucket=s3_bucket, Key="kept")
        swift.start()
        assert client.get_object(Bucket=s3_bucket, Key="kept")["Body"].read() == b"bytes"

    def test_environ_is_enough_for_a_child(self, swift: SwiftServer, s3_bucket: str) -> None:
        code = "import boto3, sys; print([b['Name'] for b in boto3.client('s3').list_buckets()['Buckets']])"
        env = {**os.environ, **swift.environ()}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert s3_bucket in done.stdout, done.stderr


def test_minilm_is_the_real_model(minilm_dir: Path) -> None:
    assert (minilm_dir / "model.safetensors").stat().st_size == 90_868_376
    assert (minilm_dir / "tokenizer.json").exists()

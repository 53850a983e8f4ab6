"""Where a bucket is, what its readers pay and whom its TLS clients trust: as boto3 does it."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest

from mfs.errors import AccessError, ConfigError, MfsError, StoreError
from mfs.sources import SourceOptions, open_source
from mfs.sources.s3_access import S3Access
from mfs.testing import ramp
from mfs.testing.suite import list_tree, object_of, read
from mfs.types import ObjectId
from tests.servers.nginx import NginxServer
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error
from tests.servers.tls import make_certificate

FILES = {"m/w.bin": ramp(5000)}
HEADER = (("x-amz-bucket-region", "eu-west-2"),)
LOCATION = ("Location", "http://127.0.0.1:1/elsewhere")
ELEMENT = "<Region>eu-west-2</Region>"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def signed_for(request: Request) -> str:
    """The region of a request's signature."""
    found = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/aws4_request", request.authorization)
    return found[1] if found else ""


def in_region(refusal: Answer, *, head: Answer | None = None, region: str = "eu-west-2") -> Callable[[Request], Answer]:
    """A bucket that answers so to whoever signs for another region; head: to a HEAD of the bucket, if otherwise."""

    def answer(request: Request) -> Answer:
        if request.method == "HEAD" and head is not None:
            return head
        return s3_bucket(request, FILES) if signed_for(request) == region else refusal

    return answer


ELSEWHERE = [
    s3_error(307, "TemporaryRedirect", headers=(*HEADER, LOCATION)),
    s3_error(307, "TemporaryRedirect", ELEMENT, headers=(LOCATION,)),
    s3_error(307, "TemporaryRedirect", headers=(*HEADER,)),
    s3_error(301, "PermanentRedirect", "<Endpoint>b.s3.eu-west-2.amazonaws.com</Endpoint>", HEADER),
    s3_error(301, "PermanentRedirect", ELEMENT),
    Answer(301, headers=HEADER),
    Answer(302, headers=(*HEADER, LOCATION)),
    s3_error(400, "IllegalLocationConstraintException", headers=HEADER),
    s3_error(400, "AuthorizationHeaderMalformed", ELEMENT),
    s3_error(403, "AuthorizationHeaderMalformed", ELEMENT),
    s3_error(400, "AuthorizationHeaderMalformed", "<Region>other</Region>", HEADER),  # the header is asked first
]


@pytest.mark.parametrize("refusal", ELSEWHERE, ids=lambda answer: f"{answer.status}-{len(answer.body)}")
def test_a_bucket_in_another_region_is_listed_and_read(refusal: Answer) -> None:
    with ScriptedServer(in_region(refusal)) as server:
        options = SourceOptions(endpoint_url=server.url)
        source = open_source("s3://b", options)
        obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
        assert read(source, obj, 10, 4000) == ramp(3990, 10)
        assert [signed_for(request) for request in server.requests] == ["us-east-1", "eu-west-2", "eu-west-2"]
        source.close()
        reader = open_source("s3://b", options)  # another worker: it reads what was listed elsewhere
        assert read(reader, obj, 10, 4000) == ramp(3990, 10)
        reader.close()
    # botocore goes the same way, but for answers it cannot parse.
    if refusal.body and refusal.status != 403:
        with ScriptedServer(in_region(refusal)) as server:
            config = botocore.config.Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0})
            client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", config=config)
            assert client.list_objects_v2(Bucket="b")["Contents"][0]["Key"] == "m/w.bin"
            client.close()


@pytest.mark.parametrize("refusal", [s3_error(307, "TemporaryRedirect"), s3_error(301, "PermanentRedirect"),
                                     s3_error(400, "IllegalLocationConstraintException")])  # fmt: skip
def test_a_region_that_is_not_said_is_asked_of_the_bucket(refusal: Answer) -> None:
    with ScriptedServer(in_region(refusal, head=Answer(400, headers=HEADER))) as server:
        source = open_source("s3://b", SourceOptions(endpoint_url=server.url))
        assert set(list_tree(source)) == {"m", "m/w.bin"}
        assert [request.method for request in server.requests] == ["GET", "HEAD", "GET"]
        source.close()


@pytest.mark.parametrize(
    "refusal",
    [
        s3_error(307, "TemporaryRedirect", headers=(LOCATION,)),
        s3_error(307, "TemporaryRedirect", headers=(("x-amz-bucket-region", "us-east-1"),)),
        s3_error(301, "PermanentRedirect", "<Region>x.example/#</Region>"),
    ],
)
def test_a_bucket_that_cannot_be_found_is_an_error_after_a_request_or_two(refusal: Answer) -> None:
    with ScriptedServer(lambda _: refusal) as server:
        source = open_source("s3://b", SourceOptions(endpoint_url=server.url))
        with pytest.raises(StoreError, match="region"):
            list_tree(source)
        assert len(server.requests) <= 2
        source.close()


def test_a_bucket_that_is_somewhere_else_each_time_is_an_error() -> None:
    def answer(request: Request) -> Answer:
        there = "eu-west-2" if signed_for(request) == "us-east-1" else "us-east-1"
        return s3_error(307, "TemporaryRedirect", headers=(("x-amz-bucket-region", there),))

    with ScriptedServer(answer) as server:
        source = open_source("s3://b", SourceOptions(endpoint_url=server.url))
        with pytest.raises(StoreError, match="307"):
            list_tree(source)
        assert len(server.requests) == 2
        source.close()


def test_readers_that_learn_of_the_region_together_all_go_on() -> None:
    with ScriptedServer(in_region(ELSEWHERE[0])) as server:
        source = open_source("s3://b", SourceOptions(endpoint_url=server.url))
        obj = ObjectId(source.identity, "m/w.bin", 5000, "5000")
        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(lambda _: read(source, obj, 0, 10), range(16))] == [ramp(10)] * 16
        source.close()


@pytest.mark.filterwarnings("ignore:Fetching the endpoint_resolver")
def test_the_region_decides_awss_address() -> None:
    access = S3Access("bucket", SourceOptions())
    assert access.object_url("k") == "https://bucket.s3.us-east-1.amazonaws.com/k"
    assert access.move("cn-north-1", asked="us-east-1")
    assert access.object_url("k") == "https://bucket.s3.cn-north-1.amazonaws.com.cn/k"


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"AWS_REGION": "eu-west-3"}, "https://bucket.s3.eu-west-3.amazonaws.com/k"),
        ({"AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": "eu-west-1"}, "https://bucket.s3.eu-west-1.amazonaws.com/k"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "https://bucket.s3-fips.us-east-1.amazonaws.com/k"),
        ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "https://bucket.s3.dualstack.us-east-1.amazonaws.com/k"),
        ({"AWS_PROFILE": "path"}, "https://s3.eu-north-1.amazonaws.com/bucket/k"),
        ({"AWS_PROFILE": "path", "AWS_REGION": "eu-west-3"}, "https://s3.eu-west-3.amazonaws.com/bucket/k"),
        ({"AWS_PROFILE": "", "AWS_DEFAULT_REGION": ""}, "https://bucket.s3.us-east-1.amazonaws.com/k"),
        ({"AWS_ENDPOINT_URL": "http://gate:9000"}, "http://gate:9000/bucket/k"),
        ({"AWS_ENDPOINT_URL": "http://gate:9000", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
         "https://bucket.s3.us-east-1.amazonaws.com/k"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Fetching the endpoint_resolver")
def test_the_address_is_the_one_that_awss_own_tools_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], address: str
) -> None:
    config = tmp_path / "config"
    config.write_text("[profile path]\nregion = eu-north-1\ns3 =\n  addressing_style = path\n")
    monkeypatch.delenv("AWS_REGION")
    for name, value in {"AWS_CONFIG_FILE": str(config), **variables}.items():
        monkeypatch.setenv(name, value)
    assert S3Access("bucket", SourceOptions()).object_url("k") == address


@pytest.mark.parametrize(
    ("name", "what"),
    [("AWS_ACCESS_KEY_ID", "access key"), ("AWS_SECRET_ACCESS_KEY", "secret key"), ("AWS_SESSION_TOKEN", "token")],
)
@pytest.mark.parametrize("value", ["canary\n", " canary", "can\nary"])
def test_keys_as_echo_writes_them_are_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, name: str, what: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    access = S3Access("bucket", SourceOptions(endpoint_url="http://gate:9000"))
    with pytest.raises(AccessError, match=f"the {what} has a blank or a line end") as caught:
        access.sign(access.object_url("k"))
    assert "ary" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Fetching the endpoint_resolver")
def test_an_address_of_a_kind_that_the_region_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    with pytest.raises(ConfigError, match="no region 'us-iso-east-1' with use_dualstack_endpoint is known"):
        S3Access("bucket", SourceOptions(region="us-iso-east-1")).object_url("k")


@pytest.mark.parametrize("unsigned", [False, True])
def test_who_pays_is_said_in_every_request_and_signed(unsigned: bool) -> None:
    def answer(request: Request) -> Answer:
        if request.headers.get("x-amz-request-payer") != "requester":
            return s3_error(403, "AccessDenied")
        return s3_bucket(request, FILES)

    with ScriptedServer(answer) as server:
        options = {"endpoint_url": server.url, "unsigned": unsigned}
        source = open_source("s3://b", SourceOptions(**options, requester_pays=True))
        obj = object_of(source, "m/w.bin", list_tree(source)["m/w.bin"])
        assert read(source, obj, 10, 20) == ramp(10, 10)
        for request in server.requests:
            signed = re.search(r"SignedHeaders=([^,]*)", request.authorization)
            assert unsigned or (signed and "x-amz-request-payer" in signed[1].split(";"))
        source.close()
        stingy = open_source("s3://b", SourceOptions(**options))
        with pytest.raises(MfsError, match="requester-pays"):
            list_tree(stingy)
        stingy.close()


# -- certificates


class Trust:
    """nginx's TLS with a bucket behind it, and AWS settings of a test's own."""

    def __init__(self, nginx: NginxServer, folder: Path) -> None:
        self.nginx = nginx
        self.config = folder / "config"
        self.right = str(nginx.ca_file)
        self.wrong = str(make_certificate(folder / "other").ca_file)
        place = nginx.files / "tls-bucket"
        place.mkdir(exist_ok=True)
        (place / "w").write_bytes(ramp(1000))
        status = (place / "w").stat()
        self.version = f"{int(status.st_mtime):x}-{status.st_size:x}"

    def write(self, section: str, bundle: str) -> None:
        text = f"[{section}]\nregion = us-east-1\nca_bundle = {bundle}\nendpoint_url = {self.nginx.tls_url}\n"
        self.config.write_text(text)

    def works(self, **options: Any) -> bool:
        source = open_source("s3://tls-bucket", SourceOptions(unsigned=True, **options))
        try:
            return read(source, ObjectId(source.identity, "w", 1000, self.version)) == ramp(1000)
        except StoreError as error:
            if "certificate not trusted" not in str(error):
                raise
            return False
        finally:
            source.close()


@pytest.fixture
def trust(nginx: NginxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trust:
    trust = Trust(nginx, tmp_path)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(trust.config))
    return trust


def test_the_configurations_bundle_is_trusted_by_profile(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.write("default", trust.right)
    assert trust.works()
    trust.write("profile lab", trust.right)
    assert trust.works(profile="lab")
    assert not trust.works(endpoint_url=trust.nginx.tls_url)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert trust.works()


def test_botocores_order_of_bundles(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.write("default", trust.right)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", trust.wrong)
    assert trust.works()
    monkeypatch.setenv("AWS_CA_BUNDLE", trust.wrong)
    assert not trust.works()
    trust.write("default", trust.wrong)
    monkeypatch.setenv("AWS_CA_BUNDLE", trust.right)
    assert trust.works()
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", trust.right)
    assert not trust.works()
    trust.write("default", "")
    assert trust.works()


def test_a_bundle_of_the_configuration_that_cannot_be_read_is_named(trust: Trust) -> None:
    trust.write("default", "/nowhere/ca.pem")
    with pytest.raises(MfsError, match=r"ca_bundle of the AWS configuration=/nowhere/ca\.pem"):
        trust.works()

"""What an oci:// address may be, and whom it names."""

from __future__ import annotations

import pytest

from mfs.errors import UsageError
from mfs.oci.reference import parse_reference
from mfs.sources import open_source
from mfs.types import ObjectId


@pytest.mark.parametrize(
    "url",
    ["oci://[1234]/a", "oci://[::1::]/a", "oci://reg.example:99999/a", "oci://reg.example:0/a", "oci://../a",
     "oci://-/a", "oci://-x.example/a", "oci://a..b/a", "oci:///a", "oci://reg.example", "oci://u:p@reg.example/a"],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError):
        open_source(url)
    with pytest.raises(UsageError):
        parse_reference(url)


def test_an_address_is_read_as_it_is_meant() -> None:
    assert parse_reference("OCI://Reg.Example/a:v1").base_url == "https://reg.example"
    assert parse_reference("Oci+Http://[::1]:65535/a").base_url == "http://[::1]:65535"
    open_source("OCI://reg.example/a").close()


@pytest.mark.parametrize(
    ("url", "identity"),
    [("oci://reg.example/a:v1", "oci://reg.example/a"), ("oci+https://reg.example/a", "oci://reg.example/a"),
     ("oci+http://reg.example/a", "oci+http://reg.example/a"), ("oci://localhost:5000/a", "oci://localhost:5000/a"),
     ("oci+https://localhost/a", "oci+https://localhost/a"), ("oci+http://docker.io/a", "oci://docker.io/library/a")],
)  # fmt: skip
def test_who_is_reached_by_http_is_another(url: str, identity: str) -> None:
    reference = parse_reference(url)
    assert reference.identity == identity
    assert parse_reference(identity).base_url == reference.base_url


def test_what_came_by_http_fills_no_cache_of_https() -> None:
    def cache_id(url: str) -> str:
        return ObjectId(parse_reference(url).identity, "w.bin", 5, "sha256:1", "sha256:1", "x").cache_id

    assert cache_id("oci://reg.example/a") == cache_id("oci://reg.example/b")
    assert cache_id("oci://reg.example/a") != cache_id("oci+http://reg.example/a")
    assert cache_id("oci+http://reg.example/a") == cache_id("oci+http://reg.example/b")

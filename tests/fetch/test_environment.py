"""What the environment says about proxies and certificates, read as curl and requests read it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests.utils

from mfs.fetch.environment import CaBundle, ca_bundle, is_direct, proxy_for, trust_store
from tests.servers.tls import make_certificate

NO_PROXY = [
    ("127.0.0.1", 80, "127.0.0.0/8", True),
    ("127.0.0.1", 80, "10.0.0.0/8,127.0.0.1/32,.svc", True),
    ("10.1.2.3", 80, "10.1.2.3/8", True),
    ("11.1.2.3", 80, "10.0.0.0/8", False),
    ("10.1.2.3", 80, "10.1.2.3", True),
    ("10.1.2.3", 80, " 10.9.9.9 , 10.1.2.3 ", True),
    ("10.1.2.3", 80, "10.0.0.0/33,10.0.0.0/x,/,10.0.0.0/-1", False),
    ("model.svc", 80, ".svc", True),
    ("svc", 80, ".svc", True),
    ("model.svc", 80, "svc", True),
    ("modelsvc", 80, "svc", False),
    ("Model.SVC", 80, "model.svc", True),
    ("model.svc", 8080, "model.svc:8080", True),
    ("model.svc", 8080, "model.svc:80", False),
    ("model", 80, "*", True),
    ("model", 80, "0.0.0.0/0", False),  # names are not resolved
    ("model", 80, "", False),
]
"""On these requests agrees."""

NO_PROXY_BEYOND = [
    ("10.1.2.3", 80, "1.2.3", False),  # an end of an address is no domain, says curl
    ("10.1.2.3", 8080, "10.1.2.3:8080", True),
    ("10.1.2.3", 8080, "10.1.2.3:80", False),
    ("10.1.2.3", 80, "a b 10.0.0.0/8", True),  # curl parts entries at blanks as well
    ("10.1.2.3", 80, "10.0.0.0/255.0.0.0", False),  # none of them takes a mask
    ("::ffff:10.1.2.3", 80, "10.0.0.0/8", True),
    ("10.1.2.3", 80, "::/0", False),
    ("::1", 80, "::1", True),
    ("::1", 80, "0:0:0:0:0:0:0:1", True),
    ("::1", 80, "[::1]", True),
    ("::1", 8080, "[::1]:8080", True),
    ("::1", 8080, "[::1]:80", False),
    ("::1", 80, "::1/128", True),
    ("fd00::7", 80, "FD00::/8", True),
    ("fd00::7", 80, "[fd00::]/8", True),
    ("fd00::7", 80, "[fd00::/8]", True),
    ("fd00::7", 80, "fe80::/10", False),
    ("fe80::7%eth0", 80, "fe80::/10", True),
    ("model.svc", 80, "*.svc", True),
    ("model.svc.", 80, "svc", True),
    ("model.svc", 80, "svc.", True),
    ("model", 80, "x.y, *", True),  # Go and httpx; curl and requests only where it stands alone
    ("model", 80, ".", False),
    ("model", 80, ",, ,", False),
]


@pytest.mark.parametrize(("host", "port", "no_proxy", "expected"), NO_PROXY + NO_PROXY_BEYOND)
def test_no_proxy(host: str, port: int, no_proxy: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_direct(host, port, no_proxy) is expected
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    for name in ("no_proxy", "NO_PROXY"):
        with monkeypatch.context() as patched:
            patched.setenv(name, no_proxy)
            assert (proxy_for("http", host, port) is None) is expected


@pytest.mark.parametrize(("host", "port", "no_proxy", "expected"), NO_PROXY)
def test_requests_agrees(host: str, port: int, no_proxy: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", no_proxy)
    assert requests.utils.should_bypass_proxies(f"http://{host}:{port}/", no_proxy=None) is expected


def test_the_lower_case_name_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "a")
    monkeypatch.setenv("no_proxy", "b")
    assert proxy_for("http", "a", 80) is not None
    assert proxy_for("http", "b", 80) is None


def test_the_first_bundle_named_is_the_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_CA_BUNDLE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, f"/{name}")
        assert ca_bundle() == CaBundle(f"/{name}", name)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", " ")
    assert ca_bundle() == CaBundle("/CURL_CA_BUNDLE", "CURL_CA_BUNDLE")


def test_a_bundle_may_be_a_file_or_a_hashed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = make_certificate(tmp_path / "tls").ca_file
    before = len(trust_store().get_ca_certs())
    monkeypatch.setenv("CURL_CA_BUNDLE", os.fspath(authority))
    assert len(trust_store().get_ca_certs()) == before + 1
    assert len(trust_store(CaBundle(os.fspath(authority.parent), "x")).get_ca_certs()) == before  # read when needed

"""A certificate authority of our own and one certificate for localhost, by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.servers.process import ServerError

# The extensions Python >= 3.13 insists on (ssl.VERIFY_X509_STRICT).
_CONFIG = """\
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


class Certificate(NamedTuple):
    """PEM files. `ca_file` is what clients must trust."""

    ca_file: Path
    cert_file: Path
    key_file: Path


def make_certificate(folder: Path) -> Certificate:
    """Make an authority and a certificate for localhost and 127.0.0.1 in `folder`, valid for two days."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "openssl.cnf").write_text(_CONFIG)
    new_key = "req -config openssl.cnf -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -batch"
    _openssl(folder, f"{new_key} -x509 -days 2 -subj /CN=tests -extensions authority -keyout ca.key -out ca.pem")
    _openssl(folder, f"{new_key} -subj /CN=localhost -keyout server.key -out server.csr")
    _openssl(
        folder,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        " -extfile openssl.cnf -extensions server -out server.pem",
    )
    return Certificate(folder / "ca.pem", folder / "server.pem", folder / "server.key")


def _openssl(folder: Path, arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments.split()], cwd=folder, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise ServerError(f"openssl {arguments} failed: {done.stderr.strip()}")

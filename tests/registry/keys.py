"""Key pairs for the tests beside this file, as `openssl genpkey` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


class KeyPair(NamedTuple):
    """Files with the two halves of a key."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str, *, curve: ec.EllipticCurve | None = None, password: bytes = b"") -> KeyPair:
    """A fresh pair in `folder`, on P-256 unless said otherwise. password: what protects the private half."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub")
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pair.private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    )
    pair.public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return pair

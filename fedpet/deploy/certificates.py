"""Make the keys and TLS certificates of a federation: an authority, the server's certificate.

Nodes need the authority's certificate only; its key issues the next server certificate, and belongs
on neither machine. The authority outlives several of those.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_BACKDATED = datetime.timedelta(hours=1)  # for a node whose clock is behind


@dataclass(frozen=True)
class Certificates:
    """Hold, as PEM, the authority's certificate and key and the server's certificate and key."""

    authority: bytes
    authority_key: bytes
    server: bytes
    server_key: bytes


def make_certificates(hosts: Sequence[str], *, days: int, authority_days: int = 0) -> Certificates:
    """Make an authority and a certificate for a server, both on the curve P-384.

    Args:
        hosts: DNS names and IP addresses of the server; the first one names it.
        days: For how long the server's is valid.
        authority_days: For how long the authority's is; 0 is as long.
    """
    authority, authority_key = make_authority(hosts[0], days=authority_days or days)
    server, server_key = make_server_certificate(hosts, authority, authority_key, days=days)
    return Certificates(authority, authority_key, server, server_key)


def make_authority(host: str, *, days: int) -> tuple[bytes, bytes]:
    """Make an authority's certificate and key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedpet authority of " + host)
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _key_bytes(key)


def make_server_certificate(
    hosts: Sequence[str], authority: bytes, authority_key: bytes, *, days: int
) -> tuple[bytes, bytes]:
    """Make a server's certificate and key, signed by an authority that is PEM."""
    issuer = x509.load_pem_x509_certificate(authority)
    issuer_key = serialization.load_pem_private_key(authority_key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    certificate = (
        _builder(_name(hosts[0]), issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)]),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _key_bytes(key)


def authority_ends(authority: bytes, *, days: int) -> bool:
    """Tell if an authority's certificate ends within so many days."""
    end = x509.load_pem_x509_certificate(authority).not_valid_after_utc
    return end < datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def make_node_key() -> tuple[bytes, bytes]:
    """Make a node's key pair in OpenSSH's format, which Flower asks for.

    Returns:
        The private key, and the public one that is registered with the server.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )

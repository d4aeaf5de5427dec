"""TLS as `KVM_WEB_CONFIG` wants it, and the names in a client's certificate."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from kvmsupervisor.web.config_file import ClientAuth, Tls

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_MODES = {
    ClientAuth.NONE: ssl.CERT_NONE,
    ClientAuth.GIVEN: ssl.CERT_OPTIONAL,
    ClientAuth.REQUIRED: ssl.CERT_REQUIRED,
}


class TlsProblem(Exception):
    """The files cannot be used. The message names them."""


def context_of(tls: Tls) -> ssl.SSLContext:
    """A server's context. Connections that it was given to keep it.

    Raises:
        TlsProblem: a file cannot be read, is no PEM, or the key is not that of the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = _VERSIONS[tls.min_version], _VERSIONS[tls.max_version]
    # A client that renegotiates has the server work at no cost of its own (TLS 1.2).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without an answer to give, OpenSSL would ask the terminal for the passphrase of a key.
        context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: b"")
    except ssl.SSLError as error:
        raise TlsProblem(f"cert_file {tls.cert_file} and key_file {tls.key_file}: {_advice(error)}") from error
    except OSError as error:
        raise TlsProblem(f"cert_file {tls.cert_file} or key_file {tls.key_file}: {error.strerror}") from error
    if tls.client_ca_file is not None:
        try:
            context.load_verify_locations(cafile=tls.client_ca_file)
        except ssl.SSLError as error:
            raise TlsProblem(f"client_ca_file {tls.client_ca_file}: {_advice(error)}") from error
        except OSError as error:
            raise TlsProblem(f"client_ca_file {tls.client_ca_file}: {error.strerror}") from error
    context.verify_mode = _MODES[tls.client_auth]
    return context


def _advice(error: ssl.SSLError) -> str:
    match error.reason:
        case "KEY_VALUES_MISMATCH":
            return "the key is not that of the certificate"
        case "NO_CERTIFICATE_OR_CRL_FOUND":
            return "there is no certificate in it (PEM: -----BEGIN CERTIFICATE-----)"
        case None | "PEM lib" | "PEM_LIB":
            return "it is no PEM, or its key has a passphrase, which nobody is there to type"
        case reason:
            return reason.lower().replace("_", " ")


def sans_of(certificate: Mapping[str, Any]) -> Iterator[str]:
    """The alternative names in a certificate of DNS names, addresses, mail addresses and URIs, as they are written."""
    for kind, value in certificate.get("subjectAltName", ()):
        if kind in {"DNS", "IP Address", "email", "URI"} and isinstance(value, str):
            yield value


def name_of(certificate: Mapping[str, Any]) -> str:
    """What a certificate calls its owner: its common name, otherwise its first alternative name; else empty."""
    for part in certificate.get("subject", ()):
        for kind, value in part:
            if kind == "commonName" and isinstance(value, str) and value:
                return value
    return next(sans_of(certificate), "")

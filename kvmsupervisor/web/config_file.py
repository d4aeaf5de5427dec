"""`KVM_WEB_CONFIG`: the web configuration file that Prometheus' exporters take, as far as it concerns this page.

Source: <https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md>. What would make the page
less strict than the file says is refused by name; what has no meaning here is read over, and told once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.values import show
from kvmsupervisor.web.yaml_file import Reader

if TYPE_CHECKING:
    from yaml.nodes import Node


class ClientAuth(StrEnum):
    """Whether clients prove who they are by a certificate; the names are Go's."""

    NONE = "NoClientCert"
    GIVEN = "VerifyClientCertIfGiven"
    REQUIRED = "RequireAndVerifyClientCert"


VERSIONS = ("TLS12", "TLS13")
"""From the oldest."""

_OLD = "it is not safe any more"
_VERSIONS = {**dict.fromkeys(VERSIONS, ""), "TLS10": _OLD, "TLS11": _OLD}
_UNVERIFIED = "such a certificate would say nothing of who the client is"
_AUTHS: dict[str, str] = {
    **{auth.value: "" for auth in ClientAuth},
    "RequestClientCert": _UNVERIFIED,
    "RequireAnyClientCert": _UNVERIFIED,
}
_INLINE = "name a file"
_OPENSSL = "OpenSSL's own choice, which the host's crypto policy may narrow, is used"

HASH = re.compile(rb"\$2[abxy]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{53}")
"""A bcrypt hash (crypt(5))."""

COST_MOST = 15
"""The most expensive hash that is taken: it takes some 3 s of one core. Arbitrary; htpasswd's own limit is 17."""

HEADERS = (
    "Strict-Transport-Security",
    "Content-Security-Policy",
    "X-Frame-Options",
    "X-Content-Type-Options",
    "X-XSS-Protection",
)
"""Headers that the file may set. The page has its own policies, which are stricter: only the first has an effect."""


@frozen(kw_only=True)
class Tls:
    """How the page speaks TLS.

    Attributes:
        cert_file: its chain (PEM).
        key_file: the key of that.
        client_auth: whether clients prove who they are.
        client_ca_file: authorities of clients' certificates.
        client_sans: names of which a client's certificate has to have one; empty for any.
        min_version: the oldest version, of `VERSIONS`.
        max_version: the newest, likewise.
    """

    cert_file: Path
    key_file: Path
    client_auth: ClientAuth = ClientAuth.NONE
    client_ca_file: Path | None = None
    client_sans: frozenset[str] = frozenset()
    min_version: str = VERSIONS[0]
    max_version: str = VERSIONS[-1]


@frozen(kw_only=True)
class WebConfig:
    """What the file says.

    Attributes:
        tls: None for plain HTTP.
        users: name → bcrypt hash.
        transport_security: value of Strict-Transport-Security; empty for none.
        without_effect: names that have no meaning here.
    """

    tls: Tls | None = None
    users: Mapping[str, bytes] = field(default_factory=dict)
    transport_security: str = ""
    without_effect: tuple[str, ...] = ()


def read_web_config(path: Path) -> tuple[WebConfig, list[str]]:
    """Read the file; return what it says, and every problem. With a problem it says nothing that may be used."""
    reader = Reader(str(path))
    top = reader.known(
        reader.document(path),
        "the file",
        ("tls_server_config", "http_server_config", "basic_auth_users"),
        {"rate_limit": "this page limits wrong passwords only, always"},
    )
    idle: list[str] = []
    tls = _tls(reader, top.get("tls_server_config"), path.parent, idle) if "tls_server_config" in top else None
    transport_security = _http(reader, top.get("http_server_config"), idle)
    users = _users(reader, top.get("basic_auth_users"))
    found = WebConfig(tls=tls, users=users, transport_security=transport_security, without_effect=tuple(idle))
    return found, reader.problems


def _tls(reader: Reader, node: Node | None, folder: Path, idle: list[str]) -> Tls | None:
    what = "tls_server_config"
    found = reader.known(
        node,
        what,
        (
            "cert_file",
            "key_file",
            "client_auth_type",
            "client_ca_file",
            "client_allowed_sans",
            "min_version",
            "max_version",
            "prefer_server_cipher_suites",
        ),
        {
            "cert": _INLINE,
            "key": _INLINE,
            "client_ca": _INLINE,
            "cipher_suites": _OPENSSL,
            "curve_preferences": _OPENSSL,
        },
    )
    if "prefer_server_cipher_suites" in found:
        idle.append(f"{what}.prefer_server_cipher_suites")
    cert, key, authority = (
        _file(reader, found.get(name), f"{what}.{name}", folder) for name in ("cert_file", "key_file", "client_ca_file")
    )
    for name in ("cert_file", "key_file"):
        if name not in found:
            reader.problem(None, f"{what} has no {name}")
    auth = ClientAuth(
        reader.one_of(found.get("client_auth_type"), f"{what}.client_auth_type", _AUTHS) or "NoClientCert"
    )
    if auth is not ClientAuth.NONE and "client_ca_file" not in found:
        reader.problem(None, f"{what}.client_auth_type is {auth}, and there is no client_ca_file to verify with")
    if auth is ClientAuth.NONE and "client_ca_file" in found and "client_auth_type" not in found:
        reader.problem(
            None, f"{what} has a client_ca_file, and no client_auth_type; right would be {ClientAuth.REQUIRED}"
        )
    sans = [one.text for one in reader.texts(found.get("client_allowed_sans"), f"{what}.client_allowed_sans")]
    if sans and auth is ClientAuth.NONE:
        reader.problem(None, f"{what}.client_allowed_sans needs a client_auth_type that verifies certificates")
    least, most = (
        reader.one_of(found.get(name), f"{what}.{name}", _VERSIONS) or default
        for name, default in (("min_version", VERSIONS[0]), ("max_version", VERSIONS[-1]))
    )
    if VERSIONS.index(least) > VERSIONS.index(most):
        reader.problem(None, f"{what}: min_version is {least}, and max_version {most}, which is older")
    if cert is None or key is None:
        return None
    return Tls(
        cert_file=cert,
        key_file=key,
        client_auth=auth,
        client_ca_file=authority,
        client_sans=frozenset(sans),
        min_version=least,
        max_version=most,
    )


def _file(reader: Reader, node: Node | None, what: str, folder: Path) -> Path | None:
    """A file, by its path or from the folder of the configuration, as exporters have it."""
    found = reader.text(node, what)
    if found is None:
        return None
    path = folder / found.text
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        reader.problem(found.line, f"{what} is {show(found.text)}, which cannot be read: {error.strerror} ({path})")
        return None


def _http(reader: Reader, node: Node | None, idle: list[str]) -> str:
    found = reader.known(node, "http_server_config", ("http2", "headers"))
    if "http2" in found:
        reader.one_of(found["http2"], "http_server_config.http2", {"true": "", "false": ""})
        idle.append("http_server_config.http2")
    transport_security = ""
    headers = {
        name: reader.text(value, f"headers.{name}")
        for name, value in reader.known(found.get("headers"), "http_server_config.headers", HEADERS).items()
    }
    for name, value in headers.items():
        if value is None:
            continue
        if not (value.text.isascii() and value.text.isprintable()):
            reader.problem(value.line, f"headers.{name} is {show(value.text)}, which no header can hold")
        elif name == HEADERS[0]:
            transport_security = value.text
        else:
            idle.append(f"http_server_config.headers.{name}")
    return transport_security


def _users(reader: Reader, node: Node | None) -> dict[str, bytes]:
    users = {}
    for name, value in reader.mapping(node, "basic_auth_users"):
        found = reader.text(value, f"the hash of {show(name.text)}")
        if not name.text or ":" in name.text or not name.text.isprintable():
            reader.problem(
                name.line, f"basic_auth_users: {show(name.text)} is no name: it has no colon, as HTTP has it"
            )
        elif found is not None:
            hashed = found.text.encode()
            match = HASH.fullmatch(hashed)
            if match is None:
                reader.problem(
                    found.line,
                    f"basic_auth_users: {name.text} has no bcrypt hash, such as `htpasswd -nBC 10 {name.text}` makes",
                )
            elif not 4 <= int(match["cost"]) <= COST_MOST:
                reader.problem(
                    found.line,
                    f"basic_auth_users: the hash of {name.text} has the cost {int(match['cost'])}; "
                    f"right would be 10 to {COST_MOST}",
                )
            else:
                users[name.text] = hashed
    return users

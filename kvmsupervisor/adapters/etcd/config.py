"""How to reach etcd, and as which user: the client's configuration."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from kvmsupervisor.adapters.etcd.api import Denied
from kvmsupervisor.domain.frozen import frozen


@frozen(kw_only=True)
class EtcdConfig:
    """How to reach etcd.

    Attributes:
        endpoints: URLs of the members, `http://host:port` or `https://host:port`; IPv6 in brackets.
        cacert: PEM file of the CA of the members' certificates (default: the system's).
        cert: PEM file of this client's certificate, together with `key`.
        key: PEM file of its private key.
        username: etcd user, together with `password_file`.
        password_file: file whose first line is the password; read again for each token.
        call_timeout_s: deadline of a call that gives none.
        attempt_timeout_s: how long one endpoint may take, connecting included, before the next one is tried. 2 s is far
            above any healthy answer, and three members get their turn within 5 s.
        renewed_every_s: how often this client renews a lease; 0 when it renews none. While those calls are answered, no
            watch has to ask whether its member lives.
        impatient: for commands, where a person waits: until one endpoint has answered, try each only once.
    """

    endpoints: tuple[str, ...]
    cacert: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    username: str | None = None
    password_file: Path | None = None
    call_timeout_s: float = 5.0
    attempt_timeout_s: float = 2.0
    renewed_every_s: float = 0.0
    impatient: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: no endpoint is given, one is malformed, or half of a pair is missing; the message names it.
        """
        if not self.endpoints:
            raise ValueError("no etcd endpoint is given: at least one URL is needed")
        for url in self.endpoints:
            split_endpoint(url)
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs both its file and its key's file")
        if (self.username is None) != (self.password_file is None):
            raise ValueError("an etcd user needs both a name and a password file")


def split_endpoint(url: str) -> tuple[str, bool]:
    """Split an endpoint into gRPC's target (`host:port`) and whether it uses TLS.

    Raises:
        ValueError: the endpoint is not `http://host:port` or `https://host:port`.
    """
    parts = urlsplit(url.strip())
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
    # `parts.port` itself raises ValueError for an invalid port.
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port is None or not plain:
        raise ValueError(f"the etcd endpoint {url!r} should look like http://host:2379 or https://host:2379")
    return parts.netloc, parts.scheme == "https"


def read_secret(path: Path, what: str) -> bytes:
    """Read a certificate, key or password file.

    Raises:
        Denied: the file cannot be read; the message names it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Denied(f"the {what} {path} cannot be read: {error.strerror}") from error

"""Recognises people by what their requests bring: a password, a token, a certificate, or the word of a trusted proxy.

A trusted proxy's word comes first: what it has looked at itself (`Authorization`) it hands on, too. Then what a client
sends on purpose, and where that is wrong nothing else is looked at.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network, ip_address

import structlog

from kvmsupervisor.adapters.web import Request
from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.web.passwords import Passwords, TooMany
from kvmsupervisor.web.people import ANYBODY, Person, Refusal, Role, up_to
from kvmsupervisor.web.people_file import CERT, PROXY
from kvmsupervisor.web.tls import name_of, sans_of

log = structlog.get_logger(__name__)

USER_HEADER = "x-remote-user"
"""In which a trusted proxy names the person."""

FORWARDED_HEADER = "x-forwarded-for"
"""In which it appends the client's address."""

NAME_MOST = 200
"""Characters of a name. Arbitrary."""


@frozen(kw_only=True)
class Known:
    """Who is known, and by what.

    Attributes:
        users: with passwords: name → bcrypt hash.
        tokens: SHA-256 → name.
        by_certificate: whether the server verifies certificates of clients.
        sans: of which a certificate has to have one; empty for any.
        proxies: addresses whose word is taken.
        roles: name → the greatest role; a viewer without one.
    """

    users: Mapping[str, bytes] = field(default_factory=dict)
    tokens: Mapping[bytes, str] = field(default_factory=dict)
    by_certificate: bool = False
    sans: frozenset[str] = frozenset()
    proxies: Sequence[IPv4Network | IPv6Network] = ()
    roles: Mapping[str, Role] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether anybody is asked who they are."""
        return bool(self.users or self.tokens or self.by_certificate or self.proxies)

    def gives(self, name: str, role: Role) -> bool:
        """Whether somebody of that name is still known, and has that role."""
        is_known = name.startswith((CERT, PROXY)) or name in self.users or name in self.tokens.values()
        return is_known and role in up_to(self.roles.get(name, Role.VIEWER))


class Recognition:
    """Implements `People`.

    Args:
        known: at first.
        now: seconds of any clock.

    Attributes:
        refused: how many were refused, by reason.
    """

    def __init__(self, known: Known, now: Callable[[], float], passwords: Passwords | None = None) -> None:
        self._passwords = Passwords(now) if passwords is None else passwords
        self._known = known
        self.refused: Counter[str] = Counter()
        self.use(known)

    def use(self, known: Known) -> None:
        """From now on."""
        self._known = known
        self._passwords.use(known.users)

    async def of(self, request: Request) -> Person:
        """Implements `People`."""
        known = self._known
        if not known.asks:
            return ANYBODY
        if (name := self._named_by_proxy(request)) is not None:
            return self._person(name)
        kind, _, rest = request.headers.get("authorization", "").partition(" ")
        match kind.lower():
            case "basic":
                return await self._with_password(request, rest.strip())
            case "bearer":
                return self._with_token(request, rest.strip())
            case "":
                if (name := self._certified(request)) is not None:
                    return self._person(name)
                raise self._unknown("nobody", "this page asks who you are")
            case _:
                raise self._unknown("nobody", f"{visible(kind, 40)} is no way in; there are Basic and Bearer")

    def _person(self, name: str) -> Person:
        return Person(name, up_to(self._known.roles.get(name, Role.VIEWER)))

    async def _with_password(self, request: Request, text: str) -> Person:
        try:
            name, colon, password = base64.b64decode(text, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            colon = b""
        if not colon:
            raise self._unknown("unreadable", "Authorization: Basic is not name and password in base64")
        user, address = name.decode(errors="replace"), self.address_of(request)
        try:
            right = await self._passwords.check(user, password, address)
        except TooMany as many:
            self.refused["too many"] += 1
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, str(many), {"Retry-After": str(many.wait_s)}) from None
        if not right:
            log.warning("web.login_failed", user=visible(user, NAME_MOST), address=address)
            raise self._unknown("password", "the name or the password is wrong")
        return self._person(user)

    def _with_token(self, request: Request, token: str) -> Person:
        # Of a digest that is wrong nobody learns how much of it is right.
        name = self._known.tokens.get(hashlib.sha256(token.encode(errors="surrogateescape")).digest())
        if name is None:
            log.warning("web.login_failed", user="token", address=self.address_of(request))
            raise self._unknown("token", "nobody has this token")
        return self._person(name)

    def _certified(self, request: Request) -> str | None:
        """The name that a certificate proves; None without one.

        Where there are passwords, too, exporters want both: so here a certificate alone is enough for those only to
        whom a role is given by that name.
        """
        certificate = request.peer.certificate
        if not certificate or not self._known.by_certificate:
            return None
        sans = self._known.sans
        if sans and sans.isdisjoint(sans_of(certificate)):
            self.refused["certificate"] += 1
            raise Refusal(HTTPStatus.FORBIDDEN, "the client's certificate has none of the names in client_allowed_sans")
        name = CERT + visible(name_of(certificate), NAME_MOST)
        if name == CERT or (self._known.users and name not in self._known.roles):
            return None
        return name

    def _named_by_proxy(self, request: Request) -> str | None:
        said = request.headers.get(USER_HEADER)
        if said is None or not self._is_proxy(request.peer.address):
            return None
        # A proxy that adds to what the client has sent, instead of replacing it, makes a list of it.
        if not said or "," in said or len(said) > NAME_MOST or not said.isprintable() or said != said.strip():
            raise self._unknown("proxy", f"{USER_HEADER} of the proxy is not one name, but {visible(said, 80)!r}")
        return PROXY + said

    def _is_proxy(self, address: str) -> bool:
        if not self._known.proxies:
            return False
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        found = getattr(found, "ipv4_mapped", None) or found
        return any(found in network for network in self._known.proxies)

    def address_of(self, request: Request) -> str:
        """Where a request comes from; for one of a trusted proxy, where it says that it comes from."""
        address = request.peer.address
        if not self._is_proxy(address):
            return address
        # From its end: what stands before the first one that is no proxy of ours, anybody may have written.
        for said in reversed(request.headers.get(FORWARDED_HEADER, "").split(",")):
            try:
                address = str(ip_address(said.strip()))
            except ValueError:
                break
            if not self._is_proxy(address):
                break
        return address

    def _unknown(self, why: str, message: str) -> Refusal:
        self.refused[why] += 1
        ways = []
        if self._known.users:
            ways.append('Basic realm="kvmsupervisor", charset="UTF-8"')
        if self._known.tokens:
            ways.append('Bearer realm="kvmsupervisor"')
        headers = {"WWW-Authenticate": ", ".join(ways)} if ways else {}
        return Refusal(HTTPStatus.UNAUTHORIZED, message, headers)

    def close(self) -> None:
        """End what works in the background."""
        self._passwords.close()

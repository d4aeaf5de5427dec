"""`KVM_WEB_PEOPLE`: what somebody may beyond looking, and the tokens of programs. A file of its own.

So a plain file of exporters goes on working as `KVM_WEB_CONFIG`, for all of them and for this page: whom it lets in is
a viewer. Names are those of `Person`: `alice`, `cert:alice`, `token:ci`, `proxy:alice`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.values import nearest, plain, show
from kvmsupervisor.web.people import Role
from kvmsupervisor.web.yaml_file import Reader, Text

if TYPE_CHECKING:
    from yaml.nodes import Node

CERT, TOKEN, PROXY = "cert:", "token:", "proxy:"
"""How names begin of those who prove by a certificate, by a token, by a proxy's word."""

TOKEN_LEAST = 32
"""The fewest characters of a token. Nobody counts wrong tokens, so they have to be beyond guessing: this is 128 bits
where they are hexadecimal, as `openssl rand -hex 24` writes more of."""

TOKEN_MOST = 4096
"""The most; a header has at most twice as many bytes."""


@frozen(kw_only=True)
class PeopleFile:
    """What the file says.

    Attributes:
        roles: name → the greatest role; who is not in it is a viewer.
        tokens: SHA-256 of each token → name of the program (`token:…`).
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    tokens: Mapping[bytes, str] = field(default_factory=dict)


def read_people(
    path: Path, users: Collection[str] | None, note: Callable[[Path], None]
) -> tuple[PeopleFile, list[str]]:
    """Read the file; return what it says, and every problem. With a problem it says nothing that may be used.

    Args:
        path: of the file.
        users: with passwords, which `KVM_WEB_CONFIG` names: another name without a prefix is a typo. None where that
            file has problems of its own.
        note: called with each file before it is read.
    """
    note(path)
    reader = Reader(str(path))
    found = reader.known(reader.document(path), "the file", (*Role, "tokens"))
    tokens = _tokens(reader, found.get("tokens"), path.parent, note)
    known = None if users is None else {*users, *tokens.values()}
    roles: dict[str, Role] = {}
    for role in Role:
        for one in reader.texts(found.get(role), role):
            if one.text in roles:
                reader.problem(one.line, f"{show(one.text)} is {roles[one.text]} already; the greatest role is enough")
            elif _is_somebody(reader, one, known):
                roles[one.text] = role
    return PeopleFile(roles=roles, tokens=tokens), reader.problems


def _is_somebody(reader: Reader, one: Text, known: Collection[str] | None) -> bool:
    name = one.text
    if name.startswith((CERT, PROXY)) and name.partition(":")[2]:
        return True
    if known is None or name in known:
        return True
    near = nearest(name, {plain(other): other for other in known})
    if near is not None:
        right = f"did you mean {near}?"
    elif name.startswith(TOKEN):
        right = "tokens has no such name"
    else:
        right = (
            "KVM_WEB_CONFIG has no such user (basic_auth_users); somebody with a certificate is cert:NAME, "
            "one of a proxy proxy:NAME, a program token:NAME"
        )
    reader.problem(one.line, f"{show(name)} is nobody: {right}")
    return False


def _tokens(reader: Reader, node: Node | None, folder: Path, note: Callable[[Path], None]) -> dict[bytes, str]:
    tokens: dict[bytes, str] = {}
    for name, value in reader.mapping(node, "tokens"):
        file = reader.text(value, f"tokens.{name.text}")
        if file is None:
            continue
        path = folder / file.text
        note(path)
        try:
            with path.open("rb") as opened:
                token = opened.read(TOKEN_MOST + 1).strip()
        except OSError as error:
            reader.problem(file.line, f"tokens.{name.text}: {path} cannot be read: {error.strerror}")
            continue
        if not TOKEN_LEAST <= len(token) <= TOKEN_MOST or not token.isascii() or len(token.split()) != 1:
            reader.problem(
                file.line,
                f"tokens.{name.text}: {path} has no token of {TOKEN_LEAST} to {TOKEN_MOST} characters in one word; "
                "`openssl rand -hex 32` writes one",
            )
            continue
        digest = hashlib.sha256(token).digest()
        if digest in tokens:
            reader.problem(file.line, f"tokens.{name.text}: {path} has the token of {tokens[digest]}, too")
            continue
        tokens[digest] = f"{TOKEN}{name.text}"
    return tokens

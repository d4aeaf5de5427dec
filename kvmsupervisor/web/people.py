"""Who asks, and what they may.

Each request has a `Person`: `Routes` asks `People.of` once, before anything is answered (only `/healthz` is for
everybody), and gives the person to every handler that wants one. A handler says what it needs by `need(person, role)`.
Both refuse by `Refusal`, of which `Routes` makes the reply. Whether a browser asks on behalf of another site is looked
at in `web/same_origin.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from http import HTTPStatus
from typing import Protocol

from kvmsupervisor.adapters.web import Request
from kvmsupervisor.domain.frozen import frozen


class Role(StrEnum):
    """What somebody may. Each one may what those before it may."""

    VIEWER = "viewer"
    """Lists, histories, numbers."""
    CONSOLE = "console"
    """Also keyboards and displays of guests."""
    OPERATOR = "operator"
    """Also wishes."""


ROLES = tuple(Role)
"""From the least to the most."""


def up_to(role: Role) -> frozenset[Role]:
    """A role with those that it includes."""
    return frozenset(ROLES[: ROLES.index(role) + 1])


@frozen
class Person:
    """Somebody, or some program, that was recognised.

    Attributes:
        name: for the audit: `alice` (a user with a password), `cert:alice`, `token:ci`, `proxy:alice`; empty for
            everybody, where nobody is asked who they are.
        roles: what they may, all of them by name: an operator has all three.
    """

    name: str
    roles: frozenset[Role]

    def may(self, role: Role) -> bool:
        """Whether this is among what they may."""
        return role in self.roles


ANYBODY = Person("", up_to(Role.VIEWER))
"""Whoever reaches a page that asks nobody who they are."""


@frozen(kw_only=True)
class Refused:
    """Why a request is not answered.

    Attributes:
        status: of the reply.
        message: for people: what was found, and what would be right.
        headers: of the reply.
    """

    status: HTTPStatus
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request is not answered: who asks is not known, or may not do that. `refused` has the reply."""

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.refused = Refused(status=status, message=message, headers=headers or {})


def need(person: Person, role: Role) -> None:
    """Let through who has a role.

    Raises:
        Refusal: 403; the message says which role, and where roles are given.
    """
    if person.may(role):
        return
    if not person.name:
        raise Refusal(
            HTTPStatus.FORBIDDEN,
            f"this needs the role {role}, and this page asks nobody who they are: it only shows. "
            "KVM_WEB_CONFIG and KVM_WEB_PEOPLE give people and roles (docs/web.md)",
        )
    raise Refusal(
        HTTPStatus.FORBIDDEN,
        f"{person.name} has not the role {role}, which this needs; the file that KVM_WEB_PEOPLE names gives roles",
    )


class People(Protocol):
    """Knows people by what their requests bring."""

    async def of(self, request: Request) -> Person:
        """Who asks.

        Raises:
            Refusal: 401 for nobody that is known, 429 for too many tries.
        """
        ...

    def address_of(self, request: Request) -> str:
        """Where a request comes from, for the audit: behind a trusted proxy, where that says that it comes from."""
        ...

"""`/api/v1`: what programs read. The objects are those of the status keys, of supervisors and of `-o json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kvmsupervisor.adapters.web import Reply, Request
from kvmsupervisor.cluster.details import details
from kvmsupervisor.cluster.host_table import HostFact, facts_of
from kvmsupervisor.cluster.live_overview import LiveOverview
from kvmsupervisor.cluster.overview import as_object
from kvmsupervisor.domain.events import Event, in_order, when
from kvmsupervisor.domain.images import Image, image_name, parse_image
from kvmsupervisor.domain.keys import ID_RULE, InstanceId, Layout, parse_id
from kvmsupervisor.domain.media import shown_url
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.web.board import Board
from kvmsupervisor.web.people import Person, Role

EVENTS = 200
"""Events in a reply, if no number is asked for."""

EVENTS_MOST = 1000
"""The most that may be asked for. Arbitrary: read and written in 0.1 s, in which nothing else is answered."""

SCHEMAS = ("openapi", "status", "events", "lock")
"""Descriptions of what is served and kept, by name; docs/web.md."""


class Api:
    """The replies.

    Args:
        overview: the cluster.
        board: its instances, ready to be sent.
        layout: where the keys lie.
    """

    def __init__(self, overview: LiveOverview, board: Board, layout: Layout) -> None:
        self._overview = overview
        self._layout = layout
        self._board = board

    def instances(self, _request: Request, _person: Person) -> Reply:
        """All instances of the cluster."""
        body = b"[" + b",\n".join(entry.full for entry in self._board.entries) + b"]\n"
        return Reply(status=HTTPStatus.OK, body=body, content_type="application/json")

    def instance(self, name: str) -> Reply:
        """One instance: what its host says, its keys, lock, placement, session, and events."""
        if (instance := parse_id(name)) is None:
            return error(HTTPStatus.NOT_FOUND, f"not an instance id; one is {ID_RULE}")
        cluster = self._overview.cluster
        if (found := cluster.instances.get(instance)) is None:
            return error(HTTPStatus.NOT_FOUND, f"there is no instance {instance}")
        whole = details(found, cluster)
        more = {name: whole[name] for name in ("keys", "lock", "placement", "session")}
        events = [event.to_object() for event in self._overview.events_of(instance)]
        return reply(as_object(found, cluster) | more | {"wish_revision": whole["revision"], "events": events})

    def hosts(self, _request: Request, _person: Person) -> Reply:
        """All hosts: what each says of itself, and what the keys say of it."""
        return reply([host_object(fact) for fact in facts_of(self._overview.cluster)])

    def images(self, _request: Request, _person: Person) -> Reply:
        """The image library, without what its URLs hide."""
        found = []
        for name, image in self._library():
            url, sha256, form, problem = None, None, None, None
            if isinstance(image, Unfit):
                problem = str(image)
            else:
                url, sha256, form = shown_url(image.url), image.sha256, image.format.value
            found.append({"name": name, "url": url, "sha256": sha256, "format": form, "problem": problem})
        return reply(found)

    def image_names(self) -> list[str]:
        """Of the images that can be used."""
        return [name for name, image in self._library() if isinstance(image, Image)]

    def _library(self) -> Iterator[tuple[str, Image | Unfit]]:
        """Each entry, or what is wrong with it."""
        prefix = self._layout.images_prefix
        for kv in self._overview.images():
            name = kv.key.decode(errors="replace").removeprefix(prefix)
            try:
                yield name, parse_image(image_name(name), kv.value.decode(errors="replace"))
            except Unfit as unfit:
                yield name, unfit

    def me(self, _request: Request, person: Person) -> Reply:
        """Who asks, and what they may."""
        return reply({"name": person.name, "roles": [role.value for role in Role if person.may(role)]})

    def events(self, request: Request, _person: Person) -> Reply:
        """The newest events, of one instance or of all, the newest last."""
        try:
            name, oldest, most = _instance(request), _since(request), _most(request)
        except ValueError as unfit:
            return error(HTTPStatus.BAD_REQUEST, str(unfit))
        histories: Mapping[InstanceId, Sequence[Event]]
        histories = self._overview.histories(most) if name is None else {name: self._overview.events_of(name)}
        found = [
            {"instance": one, **event.to_object()}
            for one, event in in_order(histories)
            if oldest is None or when(event) >= oldest
        ]
        return reply(found[-most:])


def _instance(request: Request) -> InstanceId | None:
    text = request.first("instance")
    if text and (found := parse_id(text)) is None:
        raise ValueError(f"instance={text[:80]!r} is not an instance id; one is {ID_RULE}")
    return found if text else None


def _since(request: Request) -> datetime | None:
    text = request.first("since")
    if not text:
        return None
    unfit = f"since={text[:80]!r} is no time with a zone, such as 2026-03-01T12:00:00Z"
    try:
        found = datetime.fromisoformat(text)
        at = found.astimezone(UTC)
    except (ValueError, OverflowError):
        # At the ends of the calendar a time has no UTC.
        raise ValueError(unfit) from None
    if found.tzinfo is None:
        raise ValueError(unfit)
    return at


def _most(request: Request) -> int:
    text = request.first("limit") or str(EVENTS)
    if not (text.isascii() and text.isdecimal() and len(text) < 5 and 0 < int(text) <= EVENTS_MOST):
        raise ValueError(f"limit={text[:80]!r} is no number from 1 to {EVENTS_MOST}")
    return int(text)


def host_object(fact: HostFact) -> dict[str, Any]:
    """A host as `/api/v1/hosts` shows it: its session, if it has one that can be read, and what else is known."""
    return (fact.session.to_object() if fact.session is not None else {}) | fact.to_object()


def schema(name: str) -> Reply | None:
    """One of `SCHEMAS`; None for another name."""
    if name not in SCHEMAS:
        return None
    body = Path(__file__).with_name("schemas").joinpath(f"{name}.json").read_bytes()
    return Reply(status=HTTPStatus.OK, body=body, content_type="application/json")


def reply(found: Any, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply in JSON."""
    # A lone surrogate (of bytes that were no UTF-8) becomes what JSON writes for it.
    body = json.dumps(found, ensure_ascii=False).encode(errors="backslashreplace")
    return Reply(status=status, body=body + b"\n", content_type="application/json", headers=headers or {})


def error(status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    """A refusal, with the reason."""
    return reply({"error": message}, status, headers)

"""The answers by path: a table, and one function that never waits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Protocol

from kvmsupervisor.adapters.web.messages import Reply, Request
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import ID_RULE, InstanceId, parse_id
from kvmsupervisor.domain.status import Status

ALLOWED_METHODS = ("GET", "HEAD")
INSTANCES_PATH = "/api/v1/instances"


class View(Protocol):
    """What the HTTP server sees of the supervisor. Every method answers at once, from memory."""

    def instances(self) -> Sequence[Status]:
        """The instances that this host is responsible for, the invalid ones too, in the order to show them."""
        ...

    def agent_seen(self, instance: InstanceId) -> str | None:
        """When the agent in this instance's guest last answered, RFC 3339 in UTC; None when it did not."""
        ...

    def hosts(self) -> Sequence[HostSession]:
        """The hosts that have a session, as last seen."""
        ...

    def healthy(self) -> bool:
        """Whether all parts of the supervisor still run; any answer shows that the event loop does."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether the session is held and the watch in step, and one sentence that says so or says why not."""
        ...

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The body of `/metrics` and its content type, for a request with this Accept header."""
        ...


def utc_now() -> datetime:
    """The wall clock in UTC, for the ages on the page."""
    return datetime.now(UTC)


class Routes:
    """Answers requests from a `View`."""

    def __init__(self, view: View, *, host: str, version: str, now: Callable[[], datetime] = utc_now) -> None:
        """Make the table of paths.

        Args:
            view: what to show.
            host: this host's name, for the page.
            version: of the supervisor, for the page.
            now: an aware wall clock.
        """
        self._view = view
        self._host = host
        self._version = version
        self._now = now
        self._table: Mapping[str, Callable[[str, str], Reply]] = {
            "/": self._page,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            INSTANCES_PATH: self._instances,
            "/api/v1/hosts": self._hosts,
        }

    def __call__(self, request: Request) -> Reply:
        """Answer one request."""
        return self.answer(
            method=request.method,
            path=request.path,
            refresh=request.first("refresh"),
            accept=request.headers.get("accept", ""),
        )

    def answer(self, *, method: str, path: str, refresh: str = "", accept: str = "") -> Reply:
        """Answer one request.

        Args:
            method: the request's method, as the client wrote it.
            path: percent-decoded, without the query.
            refresh: the query's `refresh`, for the page.
            accept: the Accept header, for `/metrics`.
        """
        if method not in ALLOWED_METHODS:
            return _error(
                HTTPStatus.METHOD_NOT_ALLOWED,
                "this server only shows; change wishes in etcd, or with the kvmsupervisor command",
                {"Allow": ", ".join(ALLOWED_METHODS)},
            )
        found = self._table.get(path)
        if found is not None:
            return found(accept, refresh)
        if path.startswith(f"{INSTANCES_PATH}/"):
            return self._instance(path.removeprefix(f"{INSTANCES_PATH}/"))
        paths = [*self._table, f"{INSTANCES_PATH}/<id>"]
        return _error(HTTPStatus.NOT_FOUND, f"no such path; there are {', '.join(paths)}")

    def _page(self, _accept: str, refresh: str) -> Reply:
        # Imported by the first request for it: no start should wait for it.
        from kvmsupervisor.adapters.web import page  # noqa: PLC0415

        content = page.render(
            page.Content(
                host=self._host,
                version=self._version,
                now=self._now(),
                ready=self._view.ready(),
                instances=self._view.instances(),
                hosts=self._view.hosts(),
                refresh_s=page.parse_refresh(refresh),
            )
        )
        return Reply(
            status=HTTPStatus.OK,
            body=content.encode(),
            content_type="text/html; charset=utf-8",
            headers={"Content-Security-Policy": page.SECURITY_POLICY},
        )

    def _metrics(self, accept: str, _refresh: str) -> Reply:
        body, content_type = self._view.metrics(accept)
        return Reply(status=HTTPStatus.OK, body=body, content_type=content_type)

    def _healthz(self, _accept: str, _refresh: str) -> Reply:
        if self._view.healthy():
            return _text(HTTPStatus.OK, "ok")
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, "a part of the supervisor has ended; its log says which")

    def _readyz(self, _accept: str, _refresh: str) -> Reply:
        ready, reason = self._view.ready()
        return _text(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, reason)

    def _instances(self, _accept: str, _refresh: str) -> Reply:
        return _json(HTTPStatus.OK, [status.to_object() for status in self._view.instances()])

    def _instance(self, name: str) -> Reply:
        if (instance := parse_id(name)) is None:
            return _error(HTTPStatus.NOT_FOUND, f"not an instance id; one is {ID_RULE}")
        for status in self._view.instances():
            if status.id == name:
                return _json(HTTPStatus.OK, status.to_object() | {"agent_seen": self._view.agent_seen(instance)})
        return _error(HTTPStatus.NOT_FOUND, f"{self._host} is not responsible for an instance {name}")

    def _hosts(self, _accept: str, _refresh: str) -> Reply:
        return _json(HTTPStatus.OK, [session.to_object() for session in self._view.hosts()])


def _text(status: HTTPStatus, line: str) -> Reply:
    return Reply(
        status=status,
        body=f"{line}\n".encode(errors="backslashreplace"),
        content_type="text/plain; charset=utf-8",
    )


def _json(status: HTTPStatus, found: Any, headers: Mapping[str, str] | None = None) -> Reply:
    # A lone surrogate (which stands for a byte that is not UTF-8) cannot be encoded. It only occurs inside strings, and
    # there `\udcff`, as backslashreplace writes it, is also how JSON spells it.
    body = json.dumps(found, ensure_ascii=False).encode(errors="backslashreplace")
    return Reply(status=status, body=body + b"\n", content_type="application/json", headers=headers or {})


def _error(status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    return _json(status, {"error": message}, headers)

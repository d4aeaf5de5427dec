"""People whom a page knows: files with passwords, tokens and roles, and requests in their names."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
from pathlib import Path
from typing import Any

import bcrypt

from tests.support.cluster import DEADLINE_S, eventually
from tests.support.page import Page
from tests.support.websocket import Client

PASSWORD = "correct horse"  # noqa: S105 - nobody's


def people(folder: Path, **roles: str) -> dict[str, str]:
    """Settings of a page that knows these names, each with a role."""
    config, who = folder / "web.yml", folder / "people.yml"
    # The least cost: a test checks no strength.
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    config.write_text("basic_auth_users:\n" + "".join(f"  {name}: {hashed}\n" for name in roles))
    give_roles(folder, **roles)
    return {"KVM_WEB_CONFIG": str(config), "KVM_WEB_PEOPLE": str(who)}


def give_roles(folder: Path, **roles: str) -> None:
    """Write who may what, anew."""
    lines = [f"{role}: [{', '.join(name for name in roles if roles[name] == role)}]\n" for role in set(roles.values())]
    (folder / "people.yml").write_text("".join(lines))


class Person:
    """Somebody at a page."""

    def __init__(self, page: Page, name: str) -> None:
        self.page = page
        self.name = name

    @property
    def headers(self) -> dict[str, str]:
        """That a browser sends for a page of this server."""
        word = base64.b64encode(f"{self.name}:{PASSWORD}".encode()).decode()
        return {"Authorization": f"Basic {word}", "Origin": self.page.url}

    def post(self, path: str, body: object) -> tuple[int, Any]:
        """Write."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=DEADLINE_S)
        headers = self.headers | {"Content-Type": "application/json", "X-KVMsupervisor": "1"}
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def in_step(self) -> None:
        """Wait until the page shows what etcd has."""

        def answers() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=DEADLINE_S)
            with contextlib.closing(connection):
                connection.request("GET", "/readyz", headers=self.headers)
                return connection.getresponse().status == http.client.OK

        eventually("a page in step", answers)

    def console(self, kind: str, instance: str) -> Client:
        """Open a console."""
        status, found = self.post("/api/v1/console-tickets", {"console": kind, "instance": instance})
        assert status == http.client.OK, found
        return Client.connect(self.page.port, found["path"], self.headers.items())

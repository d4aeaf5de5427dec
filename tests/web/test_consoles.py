"""Consoles: who may have one, by which ticket, and how many; the pages; what goes through a display."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.adapters.web import Reply, Request
from kvmsupervisor.adapters.web.body import Arriving
from kvmsupervisor.web import consoles
from kvmsupervisor.web.display_bridge import SHARED_AT, VERSION, Sharing, Unfit
from kvmsupervisor.web.people import Role
from kvmsupervisor.web.recognition import Known
from tests.web.conftest import Site

TICKETS = "/api/v1/console-tickets"
NAMES = {"see": "token:see", "con": "token:con", "two": "token:two", "op": "token:op"}
KNOWN = Known(
    tokens={hashlib.sha256(token.encode()).digest(): name for token, name in NAMES.items()},
    roles={"token:con": Role.CONSOLE, "token:two": Role.CONSOLE, "token:op": Role.OPERATOR},
)
OWN = {"host": "127.0.0.1:9747", "origin": "http://127.0.0.1:9747"}


@pytest.fixture
async def asked(site: Site) -> Site:
    """The page of a cluster with two machines, that knows some people."""
    site.world.host("alpha")
    site.world.host("beta")
    site.world.running("web1")
    site.world.running("web2")
    site.world.running("far", host="beta")
    site.world.keys("off", ram="1G")
    site.service._people.use(KNOWN)
    await site.pass_by()
    return site


async def post(site: Site, token: str, body: object, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    arriving = Arriving(len(data), lambda: None)
    arriving.more(data)
    arriving.end()
    named = OWN | {"authorization": f"Bearer {token}", "content-type": "application/json", "x-kvmsupervisor": "1"}
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await site.service.routes(Request(method="POST", path=TICKETS, headers=named | found, body=arriving))
    return int(reply.status), json.loads(reply.body)


async def ticket(site: Site, who: str = "con", console: str = "serial", instance: str = "web1") -> str:
    status, found = await post(site, who, {"console": console, "instance": instance})
    assert status == 200, found
    assert found["path"] == f"/api/v1/instances/{instance}/{console}?ticket={found['ticket']}"
    return str(found["ticket"])


async def opened(site: Site, path: str, given: str = "", *, who: str = "con", **headers: str | None) -> Reply:
    """Ask for a WebSocket."""
    named = OWN | {"authorization": f"Bearer {who}"}
    for name, value in headers.items():
        if value is None:
            named.pop(name.replace("_", "-"), None)
        else:
            named[name.replace("_", "-")] = value
    query = {"ticket": [given]} if given else {}
    return await site.service.routes(Request(method="GET", path=path, query=query, headers=named))


SERIAL = "/api/v1/instances/web1/serial"


async def test_a_ticket_opens_one_console(asked: Site) -> None:
    """Law: once, in time, by who got it; operators may, too."""
    for token in ("con", "op"):
        given = await ticket(asked, token)
        reply = await opened(asked, SERIAL, given, who=token)
        assert int(reply.status) == 101
        assert reply.socket is not None
        assert int((await opened(asked, SERIAL, given, who=token)).status) == 403


@pytest.mark.parametrize(
    ("path", "token", "headers", "status"),
    [
        (SERIAL, "con", {"origin": "http://evil.example"}, 403),
        (SERIAL, "con", {"origin": "http://127.0.0.1:9748"}, 403),
        (SERIAL, "con", {"origin": "null"}, 403),
        (SERIAL, "con", {"sec_fetch_site": "cross-site"}, 403),
        (SERIAL, "con", {"sec_fetch_site": "same-site"}, 403),
        (SERIAL, "two", {}, 403),
        (SERIAL, "see", {}, 403),
        (SERIAL, "nobody", {}, 401),
        (SERIAL, "con", {"authorization": None}, 401),
        ("/api/v1/instances/web2/serial", "con", {}, 403),
        ("/api/v1/instances/web1/display", "con", {}, 403),
        ("/api/v1/instances/..%2fweb1/serial", "con", {}, 403),
        (SERIAL, "con", {"host": "evil.example"}, 421),
    ],
)
async def test_the_refusals(asked: Site, path: str, token: str, headers: dict[str, str | None], status: int) -> None:
    """Law: another's, another console's, of another site: refused, and told which; and the ticket is used up by then.

    Only where it is not even looked at who asks, nothing is known of a ticket.
    """
    given = await ticket(asked)
    reply = await opened(asked, path, given, who=token, **headers)
    assert int(reply.status) == status
    assert reply.socket is None
    again = await opened(asked, SERIAL, given)
    assert int(again.status) == (101 if status in {401, 421} else 403)


async def test_no_ticket_and_an_old_one(asked: Site) -> None:
    """Law: refused in words that say how to get one; after ten seconds it is none."""
    assert b"console-tickets" in (await opened(asked, SERIAL)).body
    given = await ticket(asked)
    await asked.pass_by(11)
    assert int((await opened(asked, SERIAL, given)).status) == 403


async def test_who_gets_a_ticket(asked: Site) -> None:
    """Law: who has the role, from a page of ours, for a console that can be had here; all else is told."""
    wish = {"console": "serial", "instance": "web1"}
    assert (await post(asked, "see", wish))[0] == 403
    assert (await post(asked, "con", wish, origin="http://evil.example"))[0] == 403
    assert (await post(asked, "con", wish, content_type="text/plain"))[0] == 415
    for body, status, words in (
        ({"console": "qmp", "instance": "web1"}, 400, "console is one of serial, display"),
        ({"console": "serial"}, 400, "instance is the id of one"),
        (b"{" * 600, 400, "one JSON object"),
        (b"x" * 2000, 413, "more than"),
        ({"console": "serial", "instance": "none"}, 404, "no instance none"),
        ({"console": "serial", "instance": "off"}, 409, "off does not run"),
    ):
        found = await post(asked, "con", body)
        assert found[0] == status
        assert words in found[1]["error"]
    for _ in range(20):
        await ticket(asked)
    assert (await post(asked, "con", wish))[0] == 429
    assert (await post(asked, "two", wish))[0] == 200


async def test_without_people_there_is_no_console(site: Site) -> None:
    """Law: a page that asks nobody who they are has none, and its pages say why."""
    site.world.host("alpha")
    site.world.running("web1")
    await site.pass_by()
    site_reply = await site.service.routes(Request(method="GET", path=SERIAL, headers=OWN))
    assert int(site_reply.status) == 403
    for part in ("console", "display"):
        text = site.page(f"/instances/web1/{part}")
        assert "asks nobody who they are" in text
        assert "serial.js" not in text
        assert 'id="screen"' not in text
    assert "/console" not in site.page("/instances/web1")


class Browser:
    """A WebSocket that stays open until it is closed."""

    def __init__(self) -> None:
        self.closed: list[tuple[int, str]] = []

    def close(self, code: int = 1000, reason: str = "") -> None:
        self.closed.append((code, reason))


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions that last until they are cancelled."""
    from kvmsupervisor.web import console_session  # noqa: PLC0415

    asks: list[Any] = []

    class Session:
        def __init__(self, run_dir: object, request: object, *, clock: object) -> None:
            asks.append(request)

        async def run(self, browser: object) -> str:
            await asyncio.get_running_loop().create_future()
            return ""

    monkeypatch.setattr(console_session, "Session", Session)
    return asks


async def test_their_number_is_bounded_and_roles_end_them(asked: Site, lasting: list[Any]) -> None:
    """Law: so many of one person, and of all; who loses the role loses the console, others do not."""
    tasks, browsers = [], []

    async def begin(token: str) -> int:
        reply = await opened(asked, SERIAL, await ticket(asked, token), who=token)
        if reply.socket is not None:
            browsers.append(Browser())
            tasks.append(asyncio.ensure_future(reply.socket(browsers[-1])))  # type: ignore[arg-type]
            await asyncio.sleep(0)
        return int(reply.status)

    assert [await begin("con") for _ in range(consoles.MOST_OF_ONE)] == [101] * consoles.MOST_OF_ONE
    assert await begin("con") == 429
    assert await begin("two") == 101
    assert lasting[0].who == "token:con (in a browser)"
    metrics = asked.get("/metrics", authorization="Bearer see").body.decode()
    assert f'kvmsupervisor_web_consoles{{console="serial"}} {consoles.MOST_OF_ONE + 1}\n' in metrics

    fewer = Known(tokens=KNOWN.tokens, roles={"token:two": Role.CONSOLE})
    asked.service._consoles.end_unless(lambda name: fewer.gives(name, Role.CONSOLE))
    assert [browser.closed for browser in browsers] == [
        *([[(1008, "you may have no console any more")]] * consoles.MOST_OF_ONE),
        [],
    ]
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert asked.service._consoles.open == {}
    assert asked.service._consoles.counts == {"serial": consoles.MOST_OF_ONE + 1}


async def test_the_pages(asked: Site) -> None:
    """Law: for those who may, with a policy that lets no script in; styles are inline on the serial page alone."""
    for part, script in (("console", "serial.js"), ("display", "display.js")):
        reply = asked.get(f"/instances/web1/{part}", authorization="Bearer con")
        text, policy = reply.body.decode(), reply.headers["Content-Security-Policy"]
        assert f'src="/static/{script}"' in text
        assert 'data-instance="web1"' in text
        assert "script-src 'self';" in policy
        assert "unsafe-eval" not in policy
        assert ("'unsafe-inline'" in policy) is (part == "console")
        assert "frame-ancestors 'none'" in policy
        assert (
            "has not the role console" in asked.get(f"/instances/web1/{part}", authorization="Bearer see").body.decode()
        )
        assert asked.get(f"/instances/none/{part}", authorization="Bearer con").status == 404
    assert asked.get("/instances/web1/other", authorization="Bearer con").status == 404
    assert "/instances/web1/console" in asked.get("/instances/web1", authorization="Bearer con").body.decode()
    assert "/instances/web1/console" not in asked.get("/instances/web1", authorization="Bearer see").body.decode()


@given(st.integers(0, 255), st.binary(max_size=40), st.lists(st.integers(1, 30), max_size=6))
def test_nobody_is_alone(flag: int, rest: bytes, cuts: list[int]) -> None:
    """Law: whatever a viewer asks for and in however many pieces, the flag is set, and nothing else is changed."""
    said = VERSION + b"\x01" + bytes([flag]) + rest
    sharing, passed, at = Sharing(), b"", 0
    for cut in [*cuts, len(said)]:
        passed += sharing.passed(said[at : at + cut])
        at += cut
    assert passed == said[:SHARED_AT] + b"\x01" + rest


@pytest.mark.parametrize("said", [b"RFB 003.003\n\x01", b"GET / HTTP/1.1\r\n", b"\x00"])
def test_another_version_is_refused(said: bytes) -> None:
    """Law: where the flag would be elsewhere, nothing is passed on."""
    with pytest.raises(Unfit):
        Sharing().passed(said)

"""HTTP: what each path answers, to anybody, however they ask."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.adapters.web import ListenError, Reply, Request, Routes, Web, page, server
from kvmsupervisor.adapters.web.exchange import Exchange
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.status import Phase, Status

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = '</td><script>alert(1)</script><img src=x onerror=alert(1)>" onmouseover="alert(1)\' \x1b[31m\u202e\x00'
DEADLINE_S = 20
"""A test that hangs fails by then; nothing is measured."""


def a_status(name: str = "1", **fields: Any) -> Status:
    return Status(
        **{
            "id": name,
            "host": "host-a",
            "phase": Phase.RUNNING,
            "reason": "QEMU runs the guest",
            "since": "2030-01-02T03:00:00Z",
            **fields,
        }
    )


def a_host(name: str = "host-a", **fields: Any) -> HostSession:
    return HostSession(**{"host": name, "version": "1.2.3", "url": "http://h:9746/", "boot_id": "b", **fields})


@dataclass
class FakeView:
    """A supervisor as the tests wish it to be."""

    statuses: list[Status] = field(default_factory=list)
    sessions: list[HostSession] = field(default_factory=list)
    agents_seen: dict[str, str] = field(default_factory=dict)
    is_healthy: bool = True
    is_ready: tuple[bool, str] = (True, "in step with etcd at revision 7")

    def instances(self) -> list[Status]:
        return self.statuses

    def agent_seen(self, instance: str) -> str | None:
        return self.agents_seen.get(instance)

    def hosts(self) -> list[HostSession]:
        return self.sessions

    def healthy(self) -> bool:
        return self.is_healthy

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def metrics(self, accept: str) -> tuple[bytes, str]:
        return f"for {accept}\n".encode(), "text/plain; version=0.0.4"


@dataclass
class RoutesClient:
    """The routes, asked without a socket."""

    view: FakeView

    def get(self, path: str, **request: str) -> Reply:
        routes = Routes(self.view, host="host-a", version="1.2.3", now=lambda: NOW)
        return routes.answer(**{"method": "GET", "path": path, **request})

    def json(self, path: str) -> Any:
        reply = self.get(path)
        assert reply.status == HTTPStatus.OK
        assert reply.content_type == "application/json"
        return json.loads(reply.body)

    def page(self, refresh: str = "") -> str:
        return self.get("/", refresh=refresh).body.decode()


@pytest.fixture
def client() -> RoutesClient:
    return RoutesClient(FakeView())


class Elements(HTMLParser):
    """What a browser would make of the page: elements with their attributes, and the text between them."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: list[str] = []
        self.words = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.targets += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.words += data


class TestApi:
    """`/api/v1`: the facts as JSON."""

    def test_instances_are_the_objects_of_the_status_keys(self, client: RoutesClient) -> None:
        """The array holds the very objects of the status keys, in the view's order."""
        client.view.statuses = [
            a_status("2", pid=7, epoch=3, pending=("ram",)),
            a_status("1", phase=Phase.INVALID, problems=("ram: found 'x'; wanted MiB",)),
        ]
        found = client.json("/api/v1/instances")
        assert found == [json.loads(status.to_json()) for status in client.view.statuses]
        contract = [
            "id",
            "host",
            "phase",
            "reason",
            "since",
            "pid",
            "epoch",
            "restarts",
            "pending",
            "problems",
            "revision",
        ]
        assert set(contract) <= set(found[0])

    def test_no_instances_is_an_empty_array(self, client: RoutesClient) -> None:
        """Nothing to show is not an error."""
        assert client.json("/api/v1/instances") == []
        assert client.json("/api/v1/hosts") == []

    def test_one_instance(self, client: RoutesClient) -> None:
        """An id names its own object."""
        client.view.statuses = [a_status("1"), a_status("web.2")]
        assert client.json("/api/v1/instances/web.2")["id"] == "web.2"

    def test_one_instance_tells_when_its_agent_was_heard(self, client: RoutesClient) -> None:
        """That changes every minute, so it is told here, and neither in the array nor in the status key."""
        client.view.statuses = [a_status("1"), a_status("2")]
        client.view.agents_seen["1"] = "2030-01-02T03:04:00Z"
        assert client.json("/api/v1/instances/1")["agent_seen"] == "2030-01-02T03:04:00Z"
        assert client.json("/api/v1/instances/2")["agent_seen"] is None
        assert all("agent_seen" not in status for status in client.json("/api/v1/instances"))

    @pytest.mark.parametrize("name", ["3", "", "..", "a/b", "a" * 64, "<script>", "\udcff"])
    def test_an_unknown_instance_is_404_in_json(self, client: RoutesClient, name: str) -> None:
        """What is not here, or is no id, is an error that a program can read."""
        client.view.statuses = [a_status("1")]
        reply = client.get(f"/api/v1/instances/{name}")
        assert reply.status == HTTPStatus.NOT_FOUND
        assert "error" in json.loads(reply.body)

    def test_hosts(self, client: RoutesClient) -> None:
        """Every session is shown as its key holds it."""
        client.view.sessions = [a_host("a"), a_host("b", cpus=4)]
        assert client.json("/api/v1/hosts") == [session.to_object() for session in client.view.sessions]

    def test_bytes_that_are_no_text_survive(self, client: RoutesClient) -> None:
        """A lone surrogate, which stands for such a byte, still makes JSON that says the same."""
        client.view.statuses = [a_status(reason="QEMU said \udcff – \U0001f600 \\ \x00")]
        assert client.json("/api/v1/instances")[0]["reason"] == "QEMU said \udcff – \U0001f600 \\ \x00"


class TestProbes:
    """`/healthz`, `/readyz`, `/metrics`."""

    def test_healthz(self, client: RoutesClient) -> None:
        """200 while the supervisor's parts turn, 503 when one has ended."""
        assert client.get("/healthz").status == HTTPStatus.OK
        client.view.is_healthy = False
        assert client.get("/healthz").status == HTTPStatus.SERVICE_UNAVAILABLE

    def test_readyz_says_why_not(self, client: RoutesClient) -> None:
        """200 in step; 503 with the reason otherwise."""
        assert client.get("/readyz").status == HTTPStatus.OK
        client.view.is_ready = (False, "no session: etcd is away \udcff")
        reply = client.get("/readyz")
        assert reply.status == HTTPStatus.SERVICE_UNAVAILABLE
        assert reply.body.startswith(b"no session: etcd is away")

    def test_metrics_passes_the_accept_header_on(self, client: RoutesClient) -> None:
        """The view chooses the form that the scraper asked for; its content type is used."""
        reply = client.get("/metrics", accept="application/openmetrics-text")
        assert reply.body == b"for application/openmetrics-text\n"
        assert reply.content_type == "text/plain; version=0.0.4"


class TestReadOnly:
    """Nothing can be changed here."""

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
    @pytest.mark.parametrize("path", ["/", "/metrics", "/api/v1/instances/1", "/nowhere"])
    def test_other_methods_are_405(self, client: RoutesClient, method: str, path: str) -> None:
        """Every method that could change something is refused, everywhere, and told what is allowed."""
        reply = client.get(path, method=method)
        assert reply.status == HTTPStatus.METHOD_NOT_ALLOWED
        assert reply.headers["Allow"] == "GET, HEAD"

    @pytest.mark.parametrize("path", ["/nowhere", "//", "/metrics/", "/api/v1/instances/1/2", "*", ""])
    def test_other_paths_are_404(self, client: RoutesClient, path: str) -> None:
        """An unknown path names those that exist."""
        reply = client.get(path)
        assert reply.status == HTTPStatus.NOT_FOUND
        if not path.startswith("/api/v1/instances/"):
            assert "/api/v1/instances/<id>" in json.loads(reply.body)["error"]


class TestPage:
    """`/`: the page for people."""

    def test_shows_what_one_wants_to_know(self, client: RoutesClient) -> None:
        """Phase, reason, age, restarts, pending keys, problems and the last end of each instance."""
        client.view.statuses = [
            a_status(
                "web-1",
                phase=Phase.BACKOFF,
                reason="the next start is in 42 s",
                restarts=17,
                pid=4242,
                pending=("ram",),
                problems=("mac: found 'x'",),
                last_exit="crashed (signal 9)",
            )
        ]
        words = Elements(client.page()).words
        for expected in (
            "web-1", "backoff", "the next start is in 42 s", "4 min 5 s", "17", "4242",
            "ram changes at the next restart", "mac: found 'x'", "crashed (signal 9)", "host-a", "1.2.3",
        ):  # fmt: skip
            assert expected in words

    def test_a_guest_that_does_not_run_is_told_from_one_that_does(self, client: RoutesClient) -> None:
        """§4: the phase says what QEMU does; a guest that is halted in it is marked, with its run state."""
        client.view.statuses = [a_status("1", run_state="running"), a_status("2", run_state="io-error")]
        page = client.page()
        assert page.count('<td class="phase running">running</td>') == 1
        assert page.count('<td class="phase halted">running (io-error)</td>') == 1

    def test_says_whether_it_is_in_step(self, client: RoutesClient) -> None:
        """A page of old facts says so."""
        client.view.is_ready = (False, "no session: etcd is away")
        words = Elements(client.page()).words
        assert "not ready" in words
        assert "no session: etcd is away" in words

    @pytest.mark.parametrize("hostile", [HOSTILE, HOSTILE * 1000, "\udcff", "javascript:alert(1)"])
    def test_strangers_text_stays_text(self, client: RoutesClient, hostile: str) -> None:
        """Whatever QEMU, a key or another host says: no element, attribute or link of theirs is on the page."""
        client.view.statuses = [a_status()]
        client.view.sessions = [a_host()]
        harmless = Elements(client.page())
        fields: dict[str, Any] = {
            "run_state": hostile,
            "reason": hostile,
            "last_exit": hostile,
            "since": hostile,
            "problems": (hostile,),
        }
        client.view.statuses = [a_status(**fields, pending=(hostile,))]
        client.view.sessions = [a_host(hostile, url=hostile, version=hostile, started=hostile)]
        client.view.is_ready = (True, hostile)
        shown = Elements(client.page())
        assert shown.tags - harmless.tags <= {"ul", "li", "br"}
        assert shown.attributes == harmless.attributes
        assert shown.targets == harmless.targets

    def test_invisible_characters_are_made_visible(self, client: RoutesClient) -> None:
        """A reversal of the reading direction, or an escape sequence, is spelled out."""
        client.view.statuses = [a_status(reason="exe\u202egnp\x1b[31m")]
        assert r"exe\u202egnp\x1b[31m" in Elements(client.page()).words

    def test_foreign_facts_are_shown_as_text(self, client: RoutesClient) -> None:
        """Another host's session key may hold any text anywhere: the page shows it, and it stays text."""
        wild = HostSession.from_json(b'{"host": "<b>", "version": "</td>", "url": "javascript:1", "boot_id": ""}')
        assert wild is not None
        client.view.sessions = [wild]
        assert "<b>" in Elements(client.page()).words

    @given(text=st.text(), since=st.text() | st.datetimes(timezones=st.just(UTC)).map(lambda t: t.isoformat()))
    def test_any_text_makes_a_page(self, text: str, since: str) -> None:
        """No text stops the page, or the JSON, from being encoded."""
        client = RoutesClient(FakeView(statuses=[a_status(reason=text, since=since)], is_ready=(True, text)))
        assert client.page().count("<tr>") == 2
        assert client.json("/api/v1/instances")[0]["reason"] == text

    def test_long_lists_and_texts_are_cut(self, client: RoutesClient) -> None:
        """10,000 problems of 10,000 characters make a page that a browser can show; it says that there is more."""
        client.view.statuses = [a_status(problems=("x" * 10_000,) * 10_000)]
        document = client.page()
        assert len(document) < 20_000
        assert "and 9992 more" in document

    def test_only_its_own_style_may_load(self, client: RoutesClient) -> None:
        """The security policy allows the one style sheet in the page, by its hash, and no script at all."""
        reply = client.get("/")
        style = re.search(r"<style>(.*)</style>", reply.body.decode(), re.DOTALL)
        assert style is not None
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        policy = reply.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert f"style-src 'sha256-{digest}';" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy

    @pytest.mark.parametrize(("wanted", "seconds"), [("5", 5), ("3600", 3600), ("1", 1)])
    def test_refreshes_when_asked(self, client: RoutesClient, wanted: str, seconds: int) -> None:
        """`?refresh=<seconds>` makes the browser come back, without any script."""
        assert f'<meta http-equiv="refresh" content="{seconds}">' in client.page(wanted)

    @pytest.mark.parametrize("wanted", ["", "0", "-1", "3601", "1e3", "9" * 5000, "٣", '5"><script>', "5;url=//x"])
    def test_refreshes_for_nothing_else(self, client: RoutesClient, wanted: str) -> None:
        """Anything but a sensible number of seconds is as if it were not there."""
        assert "http-equiv" not in client.page(wanted)

    @pytest.mark.parametrize(
        ("ago", "shown"),
        [
            (timedelta(seconds=59), "59 s"),
            (timedelta(seconds=60), "1 min 0 s"),
            (timedelta(hours=5, minutes=7, seconds=59), "5 h 7 min"),
            (timedelta(days=400, hours=23), "400 d 23 h"),
            (timedelta(seconds=-30), "0 s"),
        ],
    )
    def test_age(self, ago: timedelta, shown: str) -> None:
        """Ages are told in two units; a clock that is ahead gives 0."""
        assert page.age((NOW - ago).isoformat(), NOW) == shown

    @pytest.mark.parametrize("since", ["", "yesterday", "2030-01-02T03:00:00", "9" * 10_000])
    def test_age_of_no_time(self, since: str) -> None:
        """What is no time with a zone has no age."""
        assert page.age(since, NOW) == ""


@asynccontextmanager
async def serving(view: FakeView, **limits: Any) -> AsyncIterator[Web]:
    web = Web("127.0.0.1", 0, Routes(view, host="host-a", version="1.2.3"), **limits)
    await web.start()
    try:
        yield web
    finally:
        await web.close()


async def ask(web: Web, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; return status, headers and body of what comes back until the server closes."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        with closing(writer):
            writer.write(request)
            answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


class TestServer:
    """The sockets: real ones, on loopback."""

    async def test_serves_and_says_little(self) -> None:
        """A reply closes its connection, carries the safety headers, and does not name the software behind."""
        async with serving(FakeView(statuses=[a_status("1")])) as web:
            status, headers, body = await ask(web, get("/api/v1/instances"))
        assert status == HTTPStatus.OK
        assert json.loads(body)[0]["id"] == "1"
        assert headers["Content-Type"] == "application/json"
        assert headers["Connection"] == "close"
        assert headers["Server"] == "kvmsupervisor"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]

    async def test_head_has_no_body(self) -> None:
        """HEAD answers with GET's headers only."""
        async with serving(FakeView()) as web:
            status, headers, body = await ask(web, get("/readyz", method="HEAD"))
        assert (status, body) == (HTTPStatus.OK, b"")
        assert int(headers["Content-Length"]) > 0

    async def test_query_and_escapes(self) -> None:
        """The query is not part of the path, and percent-escapes are undone before ids are looked at."""
        async with serving(FakeView(statuses=[a_status("a.b")])) as web:
            assert (await ask(web, get("/?refresh=7")))[2].count(b'content="7"') == 1
            assert (await ask(web, get("/api/v1/instances/a%2Eb")))[0] == HTTPStatus.OK
            assert (await ask(web, get("/api/v1/instances/a%2Fb")))[0] == HTTPStatus.NOT_FOUND
            assert (await ask(web, get("/api/v1/instances/%ff%00")))[0] == HTTPStatus.NOT_FOUND

    @pytest.mark.parametrize(
        ("request_bytes", "expected"),
        [
            (b"GET /healthz HTTP/1.0\r\n\r\n", HTTPStatus.OK),
            (b"GET http://h:1/healthz HTTP/1.1\r\nHost: h\r\n\r\n", HTTPStatus.OK),
            (b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n", HTTPStatus.OK),
            (b"GET //h/healthz HTTP/1.1\r\nHost: h\r\n\r\n", HTTPStatus.NOT_FOUND),
            (b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
            (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", HTTPStatus.METHOD_NOT_ALLOWED),
            (b"GET /healthz HTTP/1.1\r\n\r\n", HTTPStatus.BAD_REQUEST),
            (b"GET /healthz HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n", HTTPStatus.BAD_REQUEST),
        ],
    )
    async def test_requests_of_the_rfc(self, request_bytes: bytes, expected: HTTPStatus) -> None:
        """What RFC 9112, 3.2 wants of targets and of Host, and what RFC 9110, 6.6.1 wants of Date."""
        async with serving(FakeView()) as web:
            status, headers, body = await ask(web, request_bytes)
        assert status == expected
        assert parsedate_to_datetime(headers["Date"]).tzinfo == UTC
        assert int(headers["Content-Length"]) == len(body)

    async def test_one_request_per_connection(self) -> None:
        """What is sent behind a request, at once or later, is no second one."""
        async with serving(FakeView()) as web:
            _, headers, body = await ask(web, get("/healthz") * 3)
        assert len(body) == int(headers["Content-Length"])

    async def test_a_client_that_only_listens_on_is_answered(self) -> None:
        """A client may end its own direction behind the request, even before a long reply has been sent."""
        view = FakeView(statuses=[a_status(reason="x" * 5_000_000)])
        async with serving(view) as web, asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            with closing(writer):
                writer.write(get("/api/v1/instances"))
                writer.write_eof()
                assert len(await reader.read()) > 5_000_000

    async def test_a_body_is_not_read(self) -> None:
        """A client that announces a large body gets its 405 without sending it."""
        async with serving(FakeView()) as web:
            status, _, _ = await ask(web, b"POST /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n")
        assert status == HTTPStatus.METHOD_NOT_ALLOWED

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        ],
        ids=["tls", "version", "line", "header", "headers", "length"],
    )
    async def test_what_is_not_http_gets_400(self, request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
        """Nonsense and excess are refused, without a word about the software and without a line in the log."""
        async with serving(FakeView()) as web:
            status, headers, body = await ask(web, request_bytes)
        assert status == HTTPStatus.BAD_REQUEST
        assert headers["Server"] == "kvmsupervisor"
        assert b"h11" not in body.lower()
        assert caplog.records == []

    async def test_odd_targets_are_404(self, caplog: pytest.LogCaptureFixture) -> None:
        """Targets that are legal in HTTP but no path of ours are answered, not stumbled over."""
        async with serving(FakeView()) as web:
            for target in ("//metrics", "http://elsewhere/x", "/..%2f..", "/%", "/a?%", "/\u00e9", "/;x"):
                assert (await ask(web, get(target)))[0] in {HTTPStatus.NOT_FOUND, HTTPStatus.BAD_REQUEST}, target
        assert caplog.records == []

    async def test_an_error_of_ours_is_500_and_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """A bug in what is shown costs that reply only; its traceback goes to the log, not to the client."""
        view = FakeView(statuses=[None])  # type: ignore[list-item]
        async with serving(view) as web:
            status, headers, body = await ask(web, get("/api/v1/instances"))
            assert (await ask(web, get("/healthz")))[0] == HTTPStatus.OK
        assert status == HTTPStatus.INTERNAL_SERVER_ERROR
        assert headers["Server"] == "kvmsupervisor"
        assert b"Traceback" not in body
        assert caplog.records[0].exc_info is not None

    @pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nA: b"], ids=["silent", "line", "header"])
    async def test_a_slow_sender_is_dropped(self, sent: bytes) -> None:
        """A connection that never completes its request ends when its time is up."""
        async with serving(FakeView(), limit_s=0.2) as web, asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            with closing(writer):
                writer.write(sent)
                assert await until_dropped(reader) == b""

    async def test_a_slow_reader_is_dropped(self) -> None:
        """A client that asks for much and does not read it holds neither memory nor a connection for ever."""
        view = FakeView(statuses=[a_status(reason="x" * 50_000_000)])
        async with serving(view, limit_s=0.5) as web:
            with socket.create_connection(("127.0.0.1", web.port), timeout=DEADLINE_S) as client:
                client.sendall(get("/api/v1/instances"))
                reset = select.poll()
                reset.register(client, 0)  # nothing but errors and hang-ups, which are always told
                assert await asyncio.to_thread(reset.poll, DEADLINE_S * 1000)

    async def test_the_oldest_gives_way(self) -> None:
        """Clients that hoard connections do not lock a scraper out."""
        async with serving(FakeView(), connections=4) as web, asyncio.timeout(DEADLINE_S):
            hoard = [await asyncio.open_connection("127.0.0.1", web.port) for _ in range(4)]
            assert (await ask(web, get("/healthz")))[0] == HTTPStatus.OK
            assert await until_dropped(hoard[0][0]) == b""
            for _, writer in hoard:
                writer.close()

    async def test_many_clients_at_once(self) -> None:
        """Ordinary crowds are all served."""
        async with serving(FakeView(statuses=[a_status(str(n)) for n in range(100)])) as web:
            replies = await asyncio.gather(*(ask(web, get("/")) for _ in range(40)))
        assert {status for status, _, _ in replies} == {HTTPStatus.OK}

    async def test_close_ends_idle_connections_and_frees_the_port(self) -> None:
        """After close nobody is connected and the port can be had at once; closing twice is fine."""
        async with serving(FakeView()) as web, asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            with closing(writer):
                await web.close()
                await web.close()
                assert await until_dropped(reader) == b""
            again = Web("127.0.0.1", web.port, Routes(FakeView(), host="h", version="1"))
            await again.start()
            await again.close()

    async def test_close_lets_a_reply_under_way_end(self) -> None:
        """Who is being answered gets the rest; who has sent half a request gets nothing, and delays nothing."""
        view = FakeView(statuses=[a_status(reason="x" * 20_000_000)])
        async with serving(view) as web, asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            half, other = await asyncio.open_connection("127.0.0.1", web.port)
            with closing(writer), closing(other):
                other.write(b"GET / HT")
                writer.write(get("/api/v1/instances"))
                begun = await reader.read(1)
                answer, _ = await asyncio.gather(reader.read(), web.close())
                assert len(begun + answer) > 20_000_000
                assert await until_dropped(half) == b""

    @pytest.mark.parametrize("cancelled", [False, True])
    async def test_close_waits_for_nobody_for_long(self, cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that does not read its reply is reset when the grace is over, or `close` is cancelled."""
        monkeypatch.setattr(server, "SHUTDOWN_GRACE_S", DEADLINE_S * 10 if cancelled else 0.1)
        view = FakeView(statuses=[a_status(reason="x" * 50_000_000)])
        async with serving(view) as web, asyncio.timeout(DEADLINE_S):
            with socket.create_connection(("127.0.0.1", web.port), timeout=DEADLINE_S) as client:
                client.sendall(get("/api/v1/instances"))
                await asyncio.to_thread(client.recv, 1)
                closing_down = asyncio.create_task(web.close())
                await asyncio.sleep(0)
                if cancelled:
                    closing_down.cancel()
                await asyncio.wait([closing_down])
                assert closing_down.cancelled() == cancelled
                reset = select.poll()
                reset.register(client, 0)
                assert await asyncio.to_thread(reset.poll, DEADLINE_S * 1000)

    async def test_a_start_that_is_cancelled_can_be_closed(self) -> None:
        """The port is free again."""
        web = Web("127.0.0.1", 0, Routes(FakeView(), host="h", version="1"))
        starting = asyncio.create_task(web.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled()
        await web.close()
        socket.create_server(("127.0.0.1", web.port)).close()

    def test_port_before_start(self) -> None:
        """There is no port before there is a server."""
        with pytest.raises(RuntimeError):
            _ = Web("127.0.0.1", 0, Routes(FakeView(), host="h", version="1")).port


@dataclass
class FakeFeed:
    """A feed that a test fills."""

    readers: list[FakeReader] = field(default_factory=list)

    def open(self, wake: Callable[[], None]) -> FakeReader:
        self.readers.append(FakeReader(wake))
        return self.readers[-1]

    def __call__(self, request: Request) -> Reply:
        """The answer of a server with this feed at one path."""
        feed = self if request.path == "/feed" else None
        return Reply(status=HTTPStatus.OK, body=b"begin\n", content_type="text/plain", feed=feed)


@dataclass
class FakeReader:
    wake: Callable[[], None]
    due: list[bytes] = field(default_factory=list)
    closed: bool = False
    over: bool = False

    def take(self) -> bytes:
        return self.due.pop(0) if self.due else b""

    def close(self) -> None:
        self.closed = True

    def tell(self, *pieces: bytes) -> None:
        self.due += pieces
        self.wake()


@asynccontextmanager
async def feeding(**limits: Any) -> AsyncIterator[tuple[Web, FakeFeed]]:
    feed = FakeFeed()
    web = Web("127.0.0.1", 0, feed, **limits)
    await web.start()
    try:
        yield web, feed
    finally:
        await web.close()


async def listen_in(web: Web, version: str = "1.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """Ask for the feed; return the connection, and the head of the reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
    writer.write(f"GET /feed HTTP/{version}\r\nHost: h\r\n\r\n".encode())
    return reader, writer, await reader.readuntil(b"\r\n\r\n")


class TestFeed:
    """A reply that goes on."""

    async def test_pieces_come_as_they_are_told(self) -> None:
        """In chunks, so that their end is told from a lost connection; the body before them first."""
        async with feeding() as (web, feed), asyncio.timeout(DEADLINE_S):
            reader, writer, head = await listen_in(web)
            with closing(writer):
                assert b"transfer-encoding: chunked" in head.lower()
                assert b"content-length" not in head.lower()
                assert await reader.readexactly(11) == b"6\r\nbegin\n\r\n"
                feed.readers[0].tell(b"one\n", b"two\n")
                assert await reader.readexactly(18) == b"4\r\none\n\r\n4\r\ntwo\n\r\n"

    async def test_old_clients_get_them_plain(self) -> None:
        """HTTP/1.0 knows no chunks."""
        async with feeding() as (web, feed), asyncio.timeout(DEADLINE_S):
            reader, writer, head = await listen_in(web, "1.0")
            with closing(writer):
                assert b"chunked" not in head.lower()
                feed.readers[0].tell(b"one\n")
                assert await reader.readexactly(10) == b"begin\none\n"

    async def test_it_outlives_the_limits_of_others(self) -> None:
        """Neither its age nor a crowd ends it; it gives way to none, and none gives way to it."""
        async with feeding(limit_s=0.1, connections=2) as (web, feed), asyncio.timeout(DEADLINE_S):
            reader, writer, _ = await listen_in(web)
            others = [await listen_in(web) for _ in range(5)]
            await reader.readexactly(11)
            await asyncio.sleep(0.3)
            for _ in range(5):
                assert (await ask(web, get("/other")))[0] == HTTPStatus.OK
            feed.readers[0].tell(b"x")
            assert await reader.readexactly(6) == b"1\r\nx\r\n"
            for _, one, _ in [*others, (reader, writer, b"")]:
                one.close()

    async def test_who_leaves_is_forgotten(self) -> None:
        """At once, also while nothing is told."""
        async with feeding() as (web, feed), asyncio.timeout(DEADLINE_S):
            _, writer, _ = await listen_in(web)
            writer.close()
            while not feed.readers[0].closed:  # noqa: ASYNC110 - the kernel tells
                await asyncio.sleep(0.01)

    async def test_what_a_reader_sends_is_ignored(self) -> None:
        """Another request, or anything."""
        async with feeding() as (web, feed), asyncio.timeout(DEADLINE_S):
            reader, writer, _ = await listen_in(web)
            with closing(writer):
                writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 100 + b"\0" * 100_000)
                await reader.readexactly(11)
                feed.readers[0].tell(b"x")
                assert await reader.readexactly(6) == b"1\r\nx\r\n"

    async def test_a_slow_reader_takes_no_more_than_it_reads(self) -> None:
        """While it reads nothing, nothing is taken for it; when it reads nothing for long, it is dropped."""
        async with feeding(limit_s=0.5) as (web, feed), asyncio.timeout(DEADLINE_S):
            _, writer, _ = await listen_in(web)
            with closing(writer):
                feed.readers[0].tell(*[b"x" * 1_000_000] * 100)
                assert len(feed.readers[0].due) > 50
                while not feed.readers[0].closed:  # noqa: ASYNC110 - the kernel tells
                    await asyncio.sleep(0.01)

    async def test_close_ends_it(self) -> None:
        """Without waiting for anything."""
        async with feeding() as (web, feed), asyncio.timeout(DEADLINE_S):
            reader, writer, _ = await listen_in(web)
            with closing(writer):
                await web.close()
                await until_dropped(reader)
                assert feed.readers[0].closed

    async def test_head_gets_no_feed(self) -> None:
        """Its reply is complete."""
        async with feeding() as (web, feed), asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
            with closing(writer):
                writer.write(b"HEAD /feed HTTP/1.1\r\nHost: h\r\n\r\n")
                assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            assert feed.readers == []


class TestExchange:
    """What comes as bytes, in pieces of any size."""

    @given(
        data=st.binary() | st.binary().map(lambda tail: b"GET / HTTP/1.1\r\nHost: h\r\n" + tail), size=st.integers(1)
    )
    def test_any_bytes_get_a_reply_of_ours_or_none(self, data: bytes, size: int) -> None:
        """No bytes make an error, whether they come at once or drop by drop."""
        one = Exchange(Routes(FakeView(), host="h", version="1"))
        for start in range(0, len(data), size):
            if (reply := one.receive(data[start : start + size])) is not None:
                assert re.match(rb"HTTP/1\.1 (200|400|404|405) ", reply)
                break

    @pytest.mark.parametrize("size", [1, 7, 16_384, 1_000_000])
    def test_limits(self, size: int) -> None:
        """Each limit holds however the bytes come; what is below all of them is answered."""

        def ask(target: str, headers: dict[str, str]) -> bytes:
            lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "h", **headers}.items())
            data = f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode()
            one = Exchange(Routes(FakeView(), host="h", version="1"))
            replies = (one.receive(data[start : start + size]) for start in range(0, len(data), size))
            return next(reply for reply in replies if reply is not None)[9:12]

        assert ask("/?" + "a" * 4091, {}) == b"200"
        assert ask("/?" + "a" * 4092, {}) == b"400"
        assert ask("/", {"X": "a" * 8189}) == b"200"
        assert ask("/", {"X": "a" * 8190}) == b"400"
        assert ask("/", {f"X{n}": "a" for n in range(63)}) == b"200"
        assert ask("/", {f"X{n}": "a" for n in range(64)}) == b"400"
        assert ask("/", {f"X{n}": "a" * 2000 for n in range(8)}) == b"200"
        assert ask("/", {f"X{n}": "a" * 2000 for n in range(9)}) == b"400"

    def test_what_cannot_end_well_is_not_kept(self) -> None:
        """A megabyte without an end in one piece is refused, and not looked at beyond the limit."""
        one = Exchange(Routes(FakeView(), host="h", version="1"))
        reply = one.receive(b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 200_000 + b"\r\n")
        assert reply is not None
        assert reply.startswith(b"HTTP/1.1 400 ")


async def until_dropped(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the server ends the connection, in order or not."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def listen_error(host: str, port: int) -> str:
    with pytest.raises(ListenError) as raised:
        await Web(host, port, Routes(FakeView(), host="h", version="1")).start()
    return str(raised.value)


class TestListen:
    """`KVM_LISTEN`: a message for the operator when it cannot be."""

    async def test_a_taken_port_says_how_to_find_who_has_it(self) -> None:
        """The setting, the address and the command that names the other program."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            message = await listen_error("127.0.0.1", port)
        assert message.startswith(f"KVM_LISTEN=127.0.0.1:{port}: another program")
        assert f"ss -ltnp 'sport = :{port}'" in message

    @pytest.mark.parametrize(
        ("host", "port", "expected"),
        [
            ("192.0.2.1", 0, "no interface of this host has the address 192.0.2.1"),
            ("localhost", 9746, "'localhost' is not an IP address (names are not looked up)"),
            ("", 9746, "'' is not an IP address"),
            ("127.0.0.1", 65536, "found port 65536"),
            ("127.0.0.1", -1, "found port -1"),
        ],
    )
    async def test_what_cannot_be_is_explained(self, host: str, port: int, expected: str) -> None:
        """Each message names the setting, what was found and what would be right."""
        message = await listen_error(host, port)
        assert message.startswith("KVM_LISTEN=")
        assert expected in message
        assert "right would be" in message

    async def test_a_refused_port_names_the_capability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the kernel refuses becomes an error of ours, with its errno's meaning."""
        for number, expected in [(13, "CAP_NET_BIND_SERVICE"), (97, "no IPv6"), (23, "Too many open files")]:
            monkeypatch.setattr(socket, "create_server", raiser(OSError(number, "Too many open files")))
            assert expected in await listen_error("127.0.0.1", 80)


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise error

    return fail

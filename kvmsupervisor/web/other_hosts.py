"""Consoles of guests on other hosts: the page of that host has them, and this one asks it in the person's name.

Both show certificates. The other page knows this one as `cert:NAME`, which needs the role `console` there, and is told
for whom it asks (`FOR`): the keyboard's holder and the log have that name. The browser talks to this page only.
"""

from __future__ import annotations

import asyncio
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.aio import until_one_ends
from kvmsupervisor.cluster.overview import Cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.consoles import ConsoleKind, plain
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.web.people import Refusal

if TYPE_CHECKING:
    from kvmsupervisor.adapters.web.websocket import WebSocket

FOR = "x-kvmsupervisor-for"
"""A header that no page's script can give a WebSocket: it says for whom another page asks."""

ANSWER_S = 15.0
"""How long the other page may take. Arbitrary: longer than its supervisor may take."""


def page_of(cluster: Cluster, host: HostName, settings: Settings) -> str:
    """The URL of another host's page.

    Raises:
        Refusal: it is not known, or this page has nothing to show there.
    """
    session = cluster.sessions.get(host)
    said = visible(host)
    if session is None:
        raise Refusal(HTTPStatus.CONFLICT, f"host {said} has no session, so nobody knows where its page is")
    if not session.web:
        raise Refusal(
            HTTPStatus.CONFLICT,
            f"this is a guest of host {said}, which does not say where its own page is (KVM_WEB_URL there); "
            f"on that host there is `kvmsupervisor console`",
        )
    if settings.web_peer_cert is None or settings.web_peer_key is None or settings.web_peer_ca is None:
        raise Refusal(
            HTTPStatus.CONFLICT,
            f"this is a guest of host {said}, whose page is {visible(session.web)}: this page has no certificate to "
            "show there (KVM_WEB_PEER_CERT, KVM_WEB_PEER_KEY, KVM_WEB_PEER_CA)",
        )
    return session.web


def context_of(settings: Settings) -> ssl.SSLContext:
    """Which pages are trusted, and what is shown to them; read anew each time, so that certificates may change.

    Raises:
        OSError: a file cannot be read, or is none (`ssl.SSLError`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    assert settings.web_peer_cert is not None
    context.load_cert_chain(settings.web_peer_cert, settings.web_peer_key, password=lambda: b"")
    context.load_verify_locations(cafile=settings.web_peer_ca)
    return context


async def session(
    browser: WebSocket, url: str, settings: Settings, *, kind: ConsoleKind, instance: InstanceId, who: str
) -> str:
    """Have another page show it; return why it ended, for people.

    Raises:
        Closed: the browser has left.
    """
    # Imported by the first one.
    from kvmsupervisor.adapters.web.dial import NoAnswer, dial  # noqa: PLC0415
    from kvmsupervisor.adapters.web.websocket import ABNORMAL, GOING_AWAY, Closed  # noqa: PLC0415
    from kvmsupervisor.web.console_session import REFUSED  # noqa: PLC0415

    try:
        tls = await asyncio.to_thread(context_of, settings)
    except OSError as error:
        why = f"KVM_WEB_PEER_CERT, KVM_WEB_PEER_KEY or KVM_WEB_PEER_CA cannot be used: {error}"
        browser.close(REFUSED, why)
        return why
    try:
        other = await dial(
            url,
            f"/api/v1/instances/{instance}/{kind}",
            headers={FOR: plain(who), "Origin": url},
            tls=tls,
            timeout_s=ANSWER_S,
        )
    except NoAnswer as error:
        browser.close(REFUSED, str(error))
        return str(error)
    try:
        await until_one_ends(_pass_on(other, browser), _pass_on(browser, other))
    except Closed:
        if browser.is_open:
            code, reason = other.end
            browser.close(GOING_AWAY if code == ABNORMAL else code, reason)
            return reason
        raise
    finally:
        other.close()
    raise AssertionError("neither direction ends by itself")


async def _pass_on(one: WebSocket, other: WebSocket) -> None:
    while True:
        await other.send(await one.receive())

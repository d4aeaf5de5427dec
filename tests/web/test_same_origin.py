"""Law: no page of another site changes anything, opens a console, or has this server work, in a person's name."""

from __future__ import annotations

import pytest

from kvmsupervisor.adapters.web import Peer, Request
from kvmsupervisor.web.people import Refusal
from kvmsupervisor.web.same_origin import need_own_page, need_same_origin

HERE = "vms.example.org"


def request(secure: bool = False, /, **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(method="POST", path="/x", headers={"host": HERE, **named}, peer=Peer(secure=secure))


@pytest.mark.parametrize(
    ("host", "origin", "secure"),
    [
        (HERE, f"https://{HERE}", True),
        (HERE, f"https://{HERE}", False),
        (HERE, f"http://{HERE}", False),
        (f"{HERE}:443", f"https://{HERE}", True),
        (f"{HERE}:9747", f"http://{HERE}:9747", False),
        ("VMS.example.org", f"https://{HERE}", True),
        ("[::1]:9747", "http://[::1]:9747", False),
        ("127.0.0.1:80", "http://127.0.0.1", False),
    ],
)
def test_a_page_of_ours(host: str, origin: str, secure: bool) -> None:
    """Its origin is the address that is asked. In front of a proxy that speaks TLS the scheme may be another one."""
    need_same_origin(request(secure, host=host, origin=origin))
    need_same_origin(request(secure, host=host, origin=origin, sec_fetch_site="same-origin"))


@pytest.mark.parametrize(
    ("origin", "secure"),
    [
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        (f"http://{HERE}", True),
        (f"https://{HERE}:8443", False),
        (f"https://{HERE}.evil.example", False),
        (f"https://evil.example/{HERE}", False),
        (f"https://{HERE}@evil.example", False),
        (f"https://evil.example@{HERE}", False),
        (f"https://{HERE}/", False),
        (f"https://{HERE}, https://{HERE}", False),
        (f"https://{HERE}:x", False),
        ("https://[::1", False),
        ("file://", False),
        (f"ws://{HERE}", False),
        (f"chrome-extension://{HERE}", False),
    ],
)
def test_a_page_of_another_site(origin: str, secure: bool) -> None:
    """Another host, port or scheme, and what is no origin."""
    for more in ({}, {"sec_fetch_site": "same-origin"}, {"authorization": "Bearer x"}):
        with pytest.raises(Refusal) as refusal:
            need_same_origin(request(secure, origin=origin, **more))
        assert refusal.value.refused.status == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "", "SAME-ORIGIN, cross-site"])
def test_what_the_browser_says_of_the_site_counts(site: str) -> None:
    """Also where Origin is ours."""
    with pytest.raises(Refusal, match="Sec-Fetch-Site"):
        need_same_origin(request(origin=f"https://{HERE}", sec_fetch_site=site))


def test_a_program_without_origin_needs_a_token() -> None:
    """Passwords and certificates go along by themselves; tokens do not."""
    need_same_origin(request(authorization="Bearer abc"))
    for headers in ({}, {"authorization": "Basic YTpi"}):
        with pytest.raises(Refusal, match="no Origin"):
            need_same_origin(request(**headers))


def test_a_request_without_host_is_nobodys() -> None:
    """HTTP/1.0 may have none: then there is nothing to compare with."""
    with pytest.raises(Refusal):
        need_same_origin(Request(method="POST", path="/x", headers={"origin": "http://"}))


def test_reading_is_for_own_pages_programs_and_links() -> None:
    """What another site's page loads is not answered; a link on it may be followed."""
    need_own_page(request())
    need_own_page(request(sec_fetch_site="same-origin"))
    need_own_page(request(sec_fetch_site="none", sec_fetch_mode="navigate"))
    need_own_page(request(sec_fetch_site="cross-site", sec_fetch_mode="navigate"))
    for site in ("cross-site", "same-site"):
        with pytest.raises(Refusal):
            need_own_page(request(sec_fetch_site=site, sec_fetch_mode="no-cors"))

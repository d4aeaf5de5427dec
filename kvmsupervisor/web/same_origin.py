"""Whether a request that changes something, or opens a console, comes from a page of ours.

Browsers send passwords, client certificates and a proxy's cookies by themselves, also for a form or a script of another
site, and let any site open a WebSocket. What no site can do is to forge `Origin` and `Sec-Fetch-Site`. A token
(`Authorization: Bearer`) is sent by no browser by itself.

Sources: RFC 6454 (Origin), <https://www.w3.org/TR/fetch-metadata/>, RFC 6455, 10.2.
"""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from kvmsupervisor.adapters.web import Request
from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.web.people import Refusal

HEADER = "x-kvmsupervisor"
"""A header that acts need: a form cannot send it, and a script of another site would have to ask first. Any value."""

PORTS = {"http": 80, "https": 443}


def need_same_origin(request: Request) -> None:
    """Let through what a page of ours asks for, or a program that brings a token.

    For every POST and every WebSocket; call it before anything else is read of the request.

    Raises:
        Refusal: 403.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        raise _foreign(f"Sec-Fetch-Site is {visible(site, 40)!r}: a page of another site asks for this")
    origin = request.headers.get("origin")
    if origin is None:
        if has_token(request):
            return
        raise _foreign(
            "there is no Origin, by which pages of other sites are told from this one; a program brings a token "
            "(Authorization: Bearer), or sends Origin with the address that it calls"
        )
    if not _is_ours(origin, request):
        raise _foreign(
            f"Origin is {visible(origin, 120)!r}, and this is {visible(request.headers.get('host', ''), 120)!r}: "
            "a page of another site asks for this. A proxy in front has to hand the browser's Host on, port included"
        )


def need_json(request: Request) -> None:
    """Let through a POST that no form can send: JSON, and a header of our own unless it brings a token.

    A second wall beside `need_same_origin`, for a browser that would not send Origin.

    Raises:
        Refusal: 415 or 403.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Type is {visible(kind, 80)!r}; right would be application/json",
        )
    if HEADER not in request.headers and not has_token(request):
        raise _foreign("the header X-Kvmsupervisor is missing (any value): a form of another site cannot send it")


def need_own_page(request: Request) -> None:
    """Let through what is read by a page of ours, by a program, or by somebody who follows a link.

    What another site's page loads (an image, a script, a frame's contents) it could not read anyway, but it could have
    this server work, and keep its streams.

    Raises:
        Refusal: 403.
    """
    site = request.headers.get("sec-fetch-site", "none")
    if site not in {"same-origin", "none"} and request.headers.get("sec-fetch-mode") != "navigate":
        raise _foreign(f"Sec-Fetch-Site is {visible(site, 40)!r}: a page of another site asks for this")


def has_token(request: Request) -> bool:
    """Whether the request brings a bearer token."""
    return request.headers.get("authorization", "").partition(" ")[0].lower() == "bearer"


def _is_ours(origin: str, request: Request) -> bool:
    """Whether the page was loaded from where this request goes to.

    Behind a proxy that speaks TLS the page's scheme is not ours; otherwise it has to be.
    """
    host = request.headers.get("host", "")
    scheme, _, place = origin.partition("://")
    if not host or scheme not in PORTS or (request.peer.secure and scheme != "https"):
        return False
    return _place(scheme, place) is not None and _place(scheme, place) == _place(scheme, host)


def _place(scheme: str, text: str) -> tuple[str, int] | None:
    """Host and port; None for what is not just these two."""
    try:
        found = urlsplit(f"{scheme}://{text}")
        port = found.port
    except ValueError:
        return None
    if found.netloc != text or "@" in text or found.hostname is None:
        return None
    return found.hostname.removesuffix("."), PORTS[scheme] if port is None else port


def _foreign(why: str) -> Refusal:
    return Refusal(HTTPStatus.FORBIDDEN, why)

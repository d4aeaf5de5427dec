"""The pages of an instance's consoles. What they show comes over a WebSocket; without scripts they say so."""

from __future__ import annotations

from collections.abc import Iterable

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.overview import Cluster, Instance, shown
from kvmsupervisor.domain.consoles import ConsoleKind
from kvmsupervisor.web.frame import POLICY, State, page
from kvmsupervisor.web.html import NOTHING, Html, join, tag
from kvmsupervisor.web.people import Person, Role
from kvmsupervisor.web.vendored import path_of

PAGES = {"console": ConsoleKind.SERIAL, "display": ConsoleKind.DISPLAY}
"""Behind `/instances/<id>/`."""

TITLES = {ConsoleKind.SERIAL: "Console", ConsoleKind.DISPLAY: "Display"}

POLICIES = {
    # xterm.js makes the styles of its screen by script; nothing else of the page may be inline.
    ConsoleKind.SERIAL: POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'"),
    # noVNC draws the guest's pointer into a picture of its own.
    ConsoleKind.DISPLAY: POLICY.replace("img-src 'self'", "img-src 'self' data:"),
}

SERIAL_KEYS = (
    ("Ctrl+C", 3),
    ("Ctrl+D", 4),
    ("Ctrl+Z", 26),
    ("Ctrl+\\", 28),
    ("Ctrl+]", 29),
    ("Escape", 27),
    ("Tab", 9),
)
"""Keys that browsers keep for themselves, or that leave the terminal, by their characters."""

DISPLAY_KEYS = (
    *("Control+Alt+Delete", "Control+Alt+Backspace", "Alt+Tab", "Alt+F4", "Super", "Escape", "Tab", "Shift+F12"),
    *(f"Control+Alt+F{number}" for number in range(1, 8)),
    *("Print", "Alt+SysRq+b"),
)
"""Combinations that browsers, or their systems, keep for themselves."""


def console_page(instance: Instance, cluster: Cluster, kind: ConsoleKind, state: State, person: Person) -> bytes:
    """The page of one console."""
    view = shown(instance, cluster)
    where = NOTHING if view.host is None else join((" on ", tag("bdi", visible(view.host))))
    main = join(
        (
            tag("h1", tag("a", instance.id, href=f"/instances/{instance.id}"), f": {TITLES[kind].lower()}"),
            tag("p", tag("span", view.phase, class_=f"phase {view.phase}"), where, " · ", _other(instance, kind)),
            _console(instance, kind) if person.may(Role.CONSOLE) else _nothing(person),
        )
    )
    may = person.may(Role.CONSOLE)
    return page(
        title=f"{instance.id} {TITLES[kind].lower()} – kvmsupervisor",
        here="",
        state=state,
        person=person,
        main=main,
        script=("serial.js" if kind is ConsoleKind.SERIAL else "display.js") if may else "refresh.js",
        style=path_of("xterm.css") if may and kind is ConsoleKind.SERIAL else None,
    )


def _other(instance: Instance, kind: ConsoleKind) -> Html:
    name, other = next((name, other) for name, other in PAGES.items() if other is not kind)
    return tag("a", TITLES[other], href=f"/instances/{instance.id}/{name}")


def _nothing(person: Person) -> Html:
    why = (
        f"{visible(person.name)} has not the role console, which this needs."
        if person.name
        else "This page asks nobody who they are, so it only shows; KVM_WEB_CONFIG and KVM_WEB_PEOPLE give roles."
    )
    return tag("p", why, class_="problem")


def _console(instance: Instance, kind: ConsoleKind) -> Html:
    serial = kind is ConsoleKind.SERIAL
    leave = "Shift+F12 leaves the screen; Tab goes on from there."
    return tag(
        "div",
        tag("p", "This needs scripts.", id="said", role="status"),
        _serial_controls() if serial else _display_controls(),
        tag("p", leave, class_="dim"),
        tag(
            "div",
            id="screen",
            class_="terminal-box" if serial else "display-box",
            role="region",
            aria_label=TITLES[kind],
            data_instance=instance.id,
        ),
        NOTHING if serial else _text(),
        class_="console",
    )


def _serial_controls() -> Html:
    return tag(
        "div",
        tag("button", "Take the keyboard", id="take", type="button"),
        tag("button", "Release it", id="release", type="button"),
        tag("label", "Send ", _select(((name, str(code)) for name, code in SERIAL_KEYS))),
        id="controls",
    )


def _display_controls() -> Html:
    return tag(
        "div",
        tag("label", "Send ", _select((name.replace("Control", "Ctrl"), name) for name in DISPLAY_KEYS)),
        tag("label", tag("input", type="checkbox", id="scale", checked="checked"), " Fit into the window"),
        tag("button", "Full screen", id="full", type="button"),
        id="controls",
    )


def _text() -> Html:
    return tag(
        "form",
        tag("label", "Text to type, for a guest with a US keyboard", for_="text"),
        tag("textarea", id="text", rows="3"),
        tag("button", "Type it"),
        id="type",
    )


def _select(options: Iterable[tuple[str, str]]) -> Html:
    return tag(
        "select",
        tag("option", "a key …", value=""),
        *(tag("option", name, value=value) for name, value in options),
        id="keys",
    )

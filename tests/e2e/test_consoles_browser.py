"""Consoles in a real Chromium, on real QEMUs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kvmsupervisor.adapters.console import KeyboardLock
from kvmsupervisor.cli.demo.guest import Guest
from tests.support.browser import ENTER, TAB, Browser, browser
from tests.support.cluster import Host, Hosts, Keys, eventually
from tests.support.page import Page
from tests.support.people import PASSWORD, Person, people

pytestmark = [pytest.mark.browser, pytest.mark.soak]

SAID = "return document.getElementById('said').textContent"
SHIFT, F12, NULL = "\ue008", "\ue03c", "\ue000"

ECHO = bytes.fromhex("baf803 b03e ee30e4 cd16 baf803 ee ebf6")
"""A boot sector that writes `>` and then each key to the first serial port: `mov dx,3f8h; mov al,'>'; out dx,al`, and
again and again `xor ah,ah; int 16h; mov dx,3f8h; out dx,al`."""


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture
def chrome(window: Browser) -> Browser:
    window.size(1100, 850)
    window.open("about:blank")
    window.requested()
    window.complaints()
    return window


@pytest.fixture
def host(hosts: Hosts) -> Host:
    return hosts().start()


@pytest.fixture
def page(keys: Keys, host: Host, tmp_path: Path) -> Iterator[Page]:
    """The page; alice may have consoles."""
    with Page(keys, host, **people(tmp_path, alice="console", bob="viewer")) as made:
        yield made


def enter(chrome: Browser, page: Page, who: str, path: str) -> None:
    """Come in with a password, as a person does who is asked for it."""
    word = PASSWORD.replace(" ", "%20")
    chrome.open(f"http://{who}:{word}@127.0.0.1:{page.port}/hosts")
    chrome.open(f"{page.url}{path}")


def leave(chrome: Browser) -> None:
    """Press Shift and F12 together."""
    keys = [("keyDown", SHIFT), ("keyDown", F12), ("keyUp", F12), ("keyUp", SHIFT)]
    acts = [{"type": kind, "value": key} for kind, key in keys]
    chrome._do("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": acts}]})


def own(chrome: Browser, page: Page) -> bool:
    """Whether every request went to the page's own server."""
    asked = [urlsplit(url) for url in chrome.requested() if url.startswith(("http", "ws"))]
    return {one.netloc.rpartition("@")[2] for one in asked} == {f"127.0.0.1:{page.port}"}


def test_a_serial_console(keys: Keys, host: Host, page: Page, chrome: Browser, guest: Guest) -> None:
    """Requirements 7, 9, 16: it is shown, can be typed in, left, taken; no request leaves, no policy is hurt."""
    flags = shlex.join(guest.options(tag="one", heartbeat_s=60))
    keys.machines(host.name, "one", ram=128, extra_flags=flags)
    host.wait_running("one")
    host.hears("one", "HB 1 ")
    Person(page, "alice").in_step()
    enter(chrome, page, "alice", "/instances/one/console")
    chrome.until("the keyboard", f"{SAID} === 'You have the keyboard.'")
    shown = "return [...document.querySelectorAll('.xterm-rows > div')].map((row) => row.textContent).join('\\n')"
    chrome.until("the log", f"{shown}.includes('HELLO from one')")
    chrome.run("document.querySelector('.xterm-helper-textarea').focus()")
    chrome.type(f"marco{ENTER}")
    chrome.until("what was typed", f"{shown}.includes('marco: no such word')")
    # Tab is the guest's; one combination of keys leaves.
    chrome.type(TAB)
    assert chrome.run("return document.activeElement.className") == "xterm-helper-textarea"
    leave(chrome)
    assert chrome.run("return document.activeElement.closest('#controls') !== null")

    terminal = KeyboardLock(host.run_dir / "one", who="carol <b>")
    terminal.want()
    chrome.until("who has taken it", f"{SAID}.startsWith('carol <b> has taken the keyboard.')")
    assert terminal.take()
    chrome.run("document.getElementById('take').click()")
    eventually("the wish", lambda: terminal.wanted_by() == "alice (in a browser)")
    terminal.want_no_more()
    terminal.release()
    chrome.until("the keyboard again", f"{SAID} === 'You have the keyboard.'")
    chrome.run("document.getElementById('release').click()")
    chrome.until("a free keyboard", f"{SAID} === 'The keyboard is free; you read.'")
    assert own(chrome, page)
    assert chrome.complaints() == []


def test_a_display(keys: Keys, host: Host, page: Page, chrome: Browser, tmp_path: Path) -> None:
    """Requirements 7, 10, 16: a picture; keys, combinations and text arrive as they were meant; it comes again."""
    sector = tmp_path / "echo.img"
    sector.write_bytes(ECHO.ljust(510, b"\0") + b"\x55\xaa" + bytes(1440 * 1024 - 512))
    sector.chmod(0o644)
    flags = f"-drive if=floppy,format=raw,read-only=on,file={sector}"
    keys.machines(host.name, "one", ram=64, extra_flags=flags, display="std", machine="pc", shutdown_timeout=0)
    qemu = host.wait_running("one")["one"]
    Person(page, "alice").in_step()
    enter(chrome, page, "alice", "/instances/one/display")
    chrome.until("the display", f"{SAID}.startsWith('You see the display.')")
    lit = (
        "const canvas = document.querySelector('#screen canvas'); if (!canvas?.width) return false;"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return data.some((value, place) => place % 4 !== 3 && value > 100)"
    )
    chrome.until("a picture", lit)
    text = "".join(map(chr, range(32, 127)))
    chrome.run("document.getElementById('text').value = arguments[0]", f"{text}\nü")

    eventually("the boot sector", lambda: ">" in host.console("one"))
    chrome.run("document.querySelector('#type button').click()")
    chrome.until("the end of typing", f"{SAID}.includes('no key for: ü')")
    eventually("the text", lambda: text in host.console("one"))
    chrome.run("document.querySelector('#screen canvas').focus()")
    chrome.type("z.y")
    eventually("what was pressed", lambda: "z.y" in host.console("one"))
    before = host.console("one").count("\x1b")
    chrome.run(
        "const keys = document.getElementById('keys'); keys.value = 'Escape';"
        "keys.dispatchEvent(new Event('change', { bubbles: true }))"
    )
    eventually("a key of the menu", lambda: host.console("one").count("\x1b") > before)
    chrome.run("document.querySelector('#screen canvas').focus()")
    leave(chrome)
    assert chrome.run("return document.activeElement.closest('#controls') !== null")

    keys.put("one", restart_request="now")
    eventually("another QEMU", lambda: any(one.pid != qemu.pid for one in host.qemus()))
    chrome.until("the display of the next one", f"{SAID}.startsWith('You see the display.')")
    chrome.until("a picture again", lit)
    assert own(chrome, page)
    # A warning is of this test's own look at the picture; 409 is an answer while there is no QEMU.
    said = [one for one in chrome.complaints() if not one.startswith("WARNING:") and "status of 409" not in one]
    assert said == []


def test_who_may_not(keys: Keys, host: Host, page: Page, chrome: Browser, tiny: str) -> None:
    """Law: a viewer is told why there is no console, and no script of one is loaded."""
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, display="std")
    host.wait_running("one")
    Person(page, "alice").in_step()
    enter(chrome, page, "bob", "/instances/one/display")
    assert "bob has not the role console" in chrome.run("return document.getElementById('main').textContent")
    assert not any("novnc" in url for url in chrome.requested())

"""Acts in a real Chromium, on a real etcd: what people press, are asked, and see."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.status import Phase, Status
from tests.support.browser import ESCAPE, Browser, browser
from tests.support.cluster import Host, Keys, eventually
from tests.support.made_up import made_up
from tests.support.page import Page

pytestmark = [pytest.mark.browser, pytest.mark.soak]

HOSTILE = "</option></select><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
DIALOG = "return document.querySelector('dialog[open]')"
NO_DIALOG = "return !document.querySelector('dialog[open]')"
RESULTS = "return document.getElementById('results').textContent"
LIVE = "return document.documentElement.classList.contains('live')"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture
def chrome(window: Browser) -> Browser:
    window.size(1280, 900)
    window.open("about:blank")
    window.requested()
    window.complaints()
    return window


@pytest.fixture
def page(keys: Keys, tmp_path: Path) -> Iterator[Page]:
    """The page of a made-up cluster, for alice and bob, who come with passwords."""
    users = "".join(
        f"  {name}: {bcrypt.hashpw(name.encode(), bcrypt.gensalt(4)).decode()}\n" for name in ("alice", "bob")
    )
    (tmp_path / "web.yml").write_text(f"basic_auth_users:\n{users}")
    (tmp_path / "token").write_text("t" * 40)
    (tmp_path / "people.yml").write_text("operator: [alice, token:test]\ntokens: {test: token}\n")
    keys.together(dict(made_up(8, keys.layout)))
    host = Host(keys, "alpha")
    settings = {"KVM_WEB_CONFIG": str(tmp_path / "web.yml"), "KVM_WEB_PEOPLE": str(tmp_path / "people.yml")}
    with Page(keys, host, **settings) as made:
        made.headers = {"Authorization": f"Bearer {'t' * 40}"}
        made.in_step()
        yield made
    host.close()


def come_in(chrome: Browser, page: Page, name: str, path: str = "/") -> None:
    """As a person who has typed name and password."""
    chrome.open(page.url.replace("http://", f"http://{name}:{name}@") + "/healthz")
    chrome.open(page.url.replace("http://", f"http://{name}:{name}@") + "/static/icon.svg")
    chrome.open(page.url + path)
    chrome.until("the stream", LIVE)


def press(chrome: Browser, selector: str) -> None:
    chrome.until(selector, "return document.querySelector(arguments[0])", selector)
    chrome.run("document.querySelector(arguments[0]).click()", selector)


def agree(chrome: Browser) -> None:
    chrome.run("document.querySelector('dialog form').requestSubmit()")


def value(keys: Keys, instance: str, name: str) -> str | None:
    found = keys.get(keys.layout.wish_key(InstanceId(instance), name))
    return None if found is None else found.decode()


def test_many_at_once(chrome: Browser, page: Page, keys: Keys) -> None:
    """Chosen, asked about by name, done, with a result for each; then what its host makes of it."""
    come_in(chrome, page, "alice")
    chrome.run("for (const id of ['vm1', 'vm2']) document.querySelector(`#i-${id} .chooser`).click()")
    assert chrome.run("return document.querySelector('#bulk output').textContent") == "2 chosen"
    press(chrome, "[data-many='stop']")
    assert chrome.until("the names", "return document.querySelector('dialog .names')?.textContent") == "vm1vm2"
    chrome.type(ESCAPE)
    chrome.until("no dialog", NO_DIALOG)
    assert value(keys, "vm1", "power") is None
    keys.delete("vm2")
    press(chrome, "[data-many='stop']")
    agree(chrome)
    chrome.until("no dialog", NO_DIALOG)
    assert chrome.run("return document.querySelector('#bulk output').textContent") == "0 chosen"
    said = str(chrome.run(RESULTS))
    assert "Shut down vm1: written at revision" in said
    assert "Shut down vm2: " in said
    assert "no keys any more" in said
    assert value(keys, "vm1", "power") == "off"
    acted = Status(
        id="vm1", host="alpha", phase=Phase.STOPPED, reason="`power` is off", since="2026-11-29T00:00:00Z",
        revision=keys.revision,
    )  # fmt: skip
    keys.together({keys.layout.status_key(InstanceId("vm1")): acted.to_json()})
    chrome.until("the fact", f"{RESULTS}.includes('alpha has acted on it: stopped')")
    assert chrome.run("return window.hacked") is None


def test_what_is_refused_stays_in_the_dialog(chrome: Browser, page: Page, keys: Keys) -> None:
    """With the words of the command line, and --force; a deletion wants the id typed."""
    come_in(chrome, page, "alice", "/instances/vm1")
    keys.put("vm1", spice_password="hunter2")
    eventually("the secret", lambda: "spice_password" in page.json("/api/v1/instances/vm1")["keys"])
    press(chrome, "[data-act='set']")
    chrome.until("the keys", "return document.querySelector('dialog [data-key=ram] input')")
    field = "return document.querySelector('dialog [data-key=spice_password] input').value"
    assert chrome.run(field) == ""
    chrome.run("document.querySelector('dialog [data-key=ram] input').value = 'plenty'")
    assert chrome.run("return document.querySelector('dialog .forced').hidden")
    agree(chrome)
    refusal = "return document.querySelector('dialog .refusal').textContent"
    assert "found 'plenty'" in chrome.until("the refusal", refusal)
    chrome.run("document.querySelector('dialog [data-key=ram] input').value = '3G'")
    agree(chrome)
    chrome.until("no dialog", NO_DIALOG)
    assert value(keys, "vm1", "ram") == "3G"
    assert value(keys, "vm1", "spice_password") == "hunter2"
    press(chrome, "[data-act='delete']")
    chrome.until("the question", DIALOG)
    assert chrome.run("return document.querySelector('dialog .danger').disabled")
    chrome.type("vm1")
    chrome.until("the word", "return !document.querySelector('dialog .danger').disabled")
    agree(chrome)
    eventually("the deletion", lambda: value(keys, "vm1", "ram") is None)


def test_a_move_and_a_drain_say_how_they_will_go(chrome: Browser, page: Page, keys: Keys) -> None:
    """Before anything is written; names of hosts are text, whatever is in them."""
    keys.write(f"{keys.layout.hosts_prefix}{HOSTILE}", "no session that can be read")
    come_in(chrome, page, "alice", "/instances/vm1")
    home = value(keys, "vm1", "host")
    target = next(host for host in ("alpha", "beta", "gamma") if host != home)
    press(chrome, "[data-act='move']")
    chrome.until("the hosts", "return document.querySelector('dialog select option[value=beta]')")
    chrome.run(
        "const s = document.querySelector('dialog select'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change', { bubbles: true }))", target,
    )  # fmt: skip
    foreseen = "return document.querySelector('dialog .foreseen')?.textContent"
    assert f"started on {target}" in chrome.until("the foresight", foreseen)
    assert value(keys, "vm1", "host") == home
    agree(chrome)
    chrome.until("no dialog", NO_DIALOG)
    assert value(keys, "vm1", "host") == target
    chrome.open(f"{page.url}/hosts")
    press(chrome, "[data-act='drain'][data-host='beta']")
    chrome.until("the foresight", foreseen)
    agree(chrome)
    chrome.until("no dialog", NO_DIALOG)
    assert keys.get(keys.layout.drain_key(HostName("beta"))) == b"live"
    press(chrome, "[data-act='undrain'][data-host='beta']")
    chrome.until("the question", DIALOG)
    agree(chrome)
    chrome.until("no dialog", NO_DIALOG)
    assert keys.get(keys.layout.drain_key(HostName("beta"))) is None
    assert chrome.run("return window.hacked") is None


def test_a_machine_is_created_from_an_image(chrome: Browser, page: Page, keys: Keys) -> None:
    """A form whose every field is a key, which shows the keys as they are typed, and the command."""
    keys.write(keys.layout.image_key("debian"), f"https://images.example/debian.qcow2 sha256={'0' * 64}")
    eventually("the image", lambda: page.json("/api/v1/images"))
    come_in(chrome, page, "alice", "/create")
    fields = {"id": "new", "host": "beta", "place": "rbd/new", "from": "debian", "more": "x-team=shop\ncpus=4"}
    chrome.run(
        "const form = document.getElementById('create');"
        "for (const [name, value] of Object.entries(arguments[0])) form.elements[name].value = value;"
        "form.dispatchEvent(new Event('input'))", fields,
    )  # fmt: skip
    shown = str(chrome.run("return document.getElementById('keys').textContent"))
    assert f"{keys.layout.prefix}/new/disk/0 = rbd/new size=20G from=debian" in shown.splitlines()
    command = str(chrome.run("return document.getElementById('command').textContent"))
    assert command.startswith("kvmsupervisor create new host=beta ram=2G cpus=4 mac=auto")
    chrome.run("document.getElementById('create').requestSubmit()")
    eventually("its keys", lambda: value(keys, "new", "disk/0") == "rbd/new size=20G from=debian")
    assert (value(keys, "new", "x-team"), value(keys, "new", "cpus")) == ("shop", "4")
    chrome.until("the result", f"{RESULTS}.includes('Create new')")
    chrome.run("document.getElementById('create').requestSubmit()")
    refusal = "return document.getElementById('refusal').textContent"
    assert "exists already" in chrome.until("the refusal", refusal)
    assert [one for one in chrome.complaints() if "409" not in one] == []


def test_who_may_not_act_sees_no_acts(chrome: Browser, page: Page) -> None:
    """Neither boxes nor buttons; nothing that a page asks for is refused."""
    come_in(chrome, page, "bob", "/instances/vm1")
    assert not chrome.run("return document.querySelector('[data-act], .chooser, [data-many]')")
    chrome.open(f"{page.url}/")
    chrome.until("the stream", LIVE)
    assert not chrome.run("return document.querySelector('[data-act], .chooser, [data-many]')")
    assert "bob · viewer" in chrome.run("return document.querySelector('header').textContent")
    assert chrome.complaints() == []


def test_who_is_known_no_more_is_told(chrome: Browser, keys: Keys, tmp_path: Path) -> None:
    """Somebody whose name was taken out of the file: the stream ends, and the page says why.

    With a password Chromium itself asks for another one.
    """
    for name in ("one", "other"):
        (tmp_path / name).write_text(name * 20)
    (tmp_path / "people.yml").write_text("tokens: {one: one, other: other}\n")
    host = Host(keys, "alpha")
    chrome.cdp("Network.enable")
    chrome.cdp("Network.setExtraHTTPHeaders", headers={"Authorization": f"Bearer {'one' * 20}"})
    try:
        with Page(keys, host, KVM_WEB_PEOPLE=str(tmp_path / "people.yml")) as page:
            chrome.open(page.url)
            chrome.until("the stream", LIVE)
            (tmp_path / "people.yml").write_text("tokens: {other: other}\n")
            words = "return document.getElementById('state').textContent.includes('asks who you are')"
            chrome.until("the words", words)
    finally:
        chrome.cdp("Network.setExtraHTTPHeaders", headers={})
        host.close()


class Blank(http.server.BaseHTTPRequestHandler):
    """A site of somebody else: a page without any policy."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!DOCTYPE html><title>elsewhere</title>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Nothing."""


@contextlib.contextmanager
def another_site() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blank) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


ATTEMPTS = """
const [url, order] = arguments;
window.done = 0;
const end = () => { window.done += 1; };
const plain = { method: 'POST', mode: 'no-cors', credentials: 'include', body: order };
fetch(url, plain).then(end, end);
const json = { 'Content-Type': 'application/json', 'X-Kvmsupervisor': '1' };
fetch(url, { method: 'POST', credentials: 'include', body: order, headers: json }).then(end, end);
navigator.sendBeacon(url, order);
const form = document.createElement('form');
Object.assign(form, { action: url, method: 'post', enctype: 'text/plain', target: 'frame' });
const frame = document.createElement('iframe');
frame.name = 'frame';
const field = document.createElement('input');
Object.assign(field, { name: order.slice(0, -1) + ', "x": "', value: '"}' });
form.append(field);
document.body.append(frame, form);
form.submit();
setTimeout(end, 500);
"""
"""What pages of other sites can do: requests without asking first, one that asks first, a beacon, a form."""


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_of_another_site_acts_for_nobody(chrome: Browser, page: Page, keys: Keys, name: str) -> None:
    """Attack: alice has come in, and her browser opens a page of another port, or another name."""
    come_in(chrome, page, "alice")
    before = page.log.count("web.refused")
    with another_site() as port:
        chrome.open(f"http://{name}:{port}/")
        chrome.run(ATTEMPTS, f"{page.url}/api/v1/acts", '{"act": "stop", "instances": ["vm1"]}')
        chrome.until("its attempts", "return window.done === 3")
        if name == "127.0.0.1":
            # Of the same site: what alice has typed goes along with three of the four.
            eventually("its refusals", lambda: page.log.count("web.refused") >= before + 3)
        chrome.open("about:blank")
    assert value(keys, "vm1", "power") is None
    assert '"event": "web.act"' not in page.log

"""The page in a real Chromium, on a real etcd."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.status import Phase, Status
from tests.support.browser import ENTER, ESCAPE, TAB, Browser, browser
from tests.support.cluster import Host, Keys, eventually
from tests.support.etcd import EtcdServer, free_port
from tests.support.made_up import made_up
from tests.support.page import Page

pytestmark = [pytest.mark.browser, pytest.mark.soak]

HOSTILE = "</td><script>window.hacked=1</script><img src=x onerror=window.hacked=1> \u202e txet \x1b[31m"
ROWS = "return [...document.querySelectorAll('#instances tbody tr')].filter(r => !r.hidden).map(r => r.id.slice(2))"
STATE = "return document.getElementById('state').textContent"
LIVE = "return document.documentElement.classList.contains('live')"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """One browser for all tests; each leaves it as it likes."""
    with browser() as made:
        yield made


@pytest.fixture
def chrome(window: Browser) -> Browser:
    """The browser as most people have it."""
    window.scripts(on=True)
    window.size(1280, 900)
    window.dark(on=False)
    window.open("about:blank")
    window.requested()
    window.complaints()
    return window


@pytest.fixture
def page_of(keys: Keys) -> Iterator[Callable[..., Page]]:
    """Starts the page of the cluster, once its keys are written."""
    host = Host(keys, "alpha")
    pages: list[Page] = []

    def start(number: int = 0, **settings: str) -> Page:
        if number:
            keys.together(dict(made_up(number, keys.layout)))
        page = Page(keys, host, **settings)
        pages.append(page)
        page.in_step()
        return page

    yield start
    for page in pages:
        page.__exit__()
    host.close()


def status(keys: Keys, name: str, phase: Phase = Phase.RUNNING, reason: str = "so it is", **fields: Any) -> None:
    """Write an instance's status, which may be too long for a command line."""
    said: dict[str, Any] = {"since": "2026-11-29T00:00:00Z", "revision": 1 << 40, "host": "alpha"} | fields
    found = Status(id=name, phase=phase, reason=reason, **said)
    keys.together({keys.layout.status_key(InstanceId(name)): found.to_json()})


def enter(chrome: Browser, name: str, value: str) -> None:
    """Put a value into a field, as typing or choosing does."""
    chrome.run(
        "const field = document.querySelector(`[name=${arguments[0]}]`); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', { bubbles: true }))",
        name,
        value,
    )


def said(chrome: Browser, words: str) -> None:
    """Wait until the line about etcd has these words."""
    chrome.until(
        f"the words {words!r}", "return document.getElementById('state').textContent.includes(arguments[0])", words
    )


def rows(chrome: Browser) -> list[str]:
    found: list[str] = chrome.run(ROWS)
    return found


def html_of(chrome: Browser, name: str) -> str:
    """A row's HTML, but for what scripts write into its times."""
    found: str = chrome.run("return document.getElementById(arguments[0]).outerHTML", f"i-{name}")
    return re.sub(r"<time[^>]*>[^<]*</time>", "TIME", found)


def test_a_change_is_on_the_page_without_reload(chrome: Browser, page_of: Callable[..., Page], keys: Keys) -> None:
    """Requirement 5: rows that come, change and go; the title counts what needs a look."""
    page = page_of(3)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    chrome.run("window.same = 1")
    assert rows(chrome) == ["vm1", "vm2", "vm3"]
    status(keys, "vm2", Phase.BACKOFF, "it fails")
    chrome.until("the change", "return document.getElementById('i-vm2').textContent.includes('it fails')")
    assert rows(chrome) == ["vm2", "vm1", "vm3"]
    assert chrome.run("return document.title") == "(1) Instances – kvmsupervisor"
    keys.put("new", host="alpha", ram="1G")
    chrome.until("the new one", "return document.getElementById('i-new')")
    keys.delete("vm3")
    keys.together({}, delete=[keys.layout.status_key(InstanceId("vm3"))])
    chrome.until("its removal", "return !document.getElementById('i-vm3')")
    assert chrome.run("return window.same") == 1
    assert chrome.complaints() == []


def test_rows_of_scripts_are_those_of_the_server(chrome: Browser, page_of: Callable[..., Page], keys: Keys) -> None:
    """What two programs make of one row is the same, with everything in it that a row can have."""
    page = page_of(100)
    keys.put("hostile", host="alpha", ram="1G", description=HOSTILE)
    status(
        keys, "hostile", Phase.RUNNING, HOSTILE, pid=5, run_state="io-error", problems=(HOSTILE, "x"), pending=("ram",),
        notice=HOSTILE, last_exit=HOSTILE, restarts=3,
    )  # fmt: skip
    keys.machines("nobody", "rtl", ram="2G", description="خادم البريد الإلكتروني שלום")
    eventually("the one", lambda: page.instances().get("hostile", {}).get("reason") == HOSTILE)
    eventually("the other", lambda: "rtl" in page.instances())
    chrome.scripts(on=False)
    chrome.open(page.url)
    served = {name: html_of(chrome, name) for name in rows(chrome)}
    chrome.scripts(on=True)
    # Without a mark all rows come over the stream.
    chrome.open(f"{page.url}/?q=zzz")
    chrome.until("all rows", "return document.querySelectorAll('#instances tbody tr').length > 100")
    enter(chrome, "q", "")
    chrome.until("all of them shown", f"{ROWS.replace('return', 'const found =')}; return found.length > 101")
    made = {name: html_of(chrome, name).replace(' hidden=""', "") for name in rows(chrome)}
    assert made == served
    assert list(made) == list(served)
    assert chrome.complaints() == []


def test_filter_and_order_are_in_the_address(chrome: Browser, page_of: Callable[..., Page]) -> None:
    """Requirement: what scripts show at once is what the server shows of the same address, and a reload keeps it."""
    page = page_of(120)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    chrome.type("/vm1")
    assert chrome.run("return document.activeElement.name") == "q"

    def agree() -> list[str]:
        address = chrome.run("return location.pathname + location.search")
        served = re.findall(r'<tr id="i-([\w.-]+)"', page.get(address)[1].decode())
        eventually("the same rows", lambda: rows(chrome) == served)
        return served

    assert len(agree()) == 1 + 10 + 21
    assert chrome.run("return location.search") == "?q=vm1"
    chrome.run("document.querySelector('th[data-sort=since] a').click()")
    agree()
    chrome.run("document.querySelector('th[data-sort=since] a').click()")
    found = agree()
    assert chrome.run("return location.search") == "?q=vm1&sort=-since"
    assert chrome.run("return document.querySelector('th[data-sort=since]').getAttribute('aria-sort')") == "descending"
    chrome.run("location.reload()")
    chrome.until("the stream", LIVE)
    eventually("the same rows", lambda: rows(chrome) == found)
    assert chrome.run("return document.querySelector('[name=q]').value") == "vm1"
    chrome.run("document.querySelector('[name=q]').focus()")
    chrome.type(ESCAPE)
    assert len(agree()) == 120
    enter(chrome, "host", "delta")
    assert set(agree()) == {"vm6", "vm103"}
    chrome.run("document.querySelector('.all').click()")
    assert len(agree()) == 120
    assert chrome.run("return location.search") == ""
    chrome.run("document.querySelector('#counts a').click()")
    assert "vm6" in agree()
    assert chrome.complaints() == []


def test_a_thousand_rows_leave_time_to_type(chrome: Browser, page_of: Callable[..., Page]) -> None:
    """Requirement 6: rows that come back are laid out in steps, so that a key is heard in between."""
    page = page_of(1000)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    at_once = chrome.run(
        """
        const q = document.querySelector('[name=q]');
        const type = (text) => { q.value = text; q.dispatchEvent(new Event('input', { bubbles: true })); };
        const shown = () => [...document.querySelectorAll('#instances tbody tr')].filter((row) => !row.hidden).length;
        type('nothing like it');
        const none = shown();
        type('');
        return [none, shown()];
        """
    )
    assert at_once == [0, 100]
    chrome.until("the others", f"{ROWS.replace('return', 'const found =')}; return found.length === 1000")


def test_no_request_leaves_the_origin_and_nothing_is_run(
    chrome: Browser, page_of: Callable[..., Page], keys: Keys
) -> None:
    """Requirements 7, 8, 16: in the network log, in the console, and in what a hostile row could have done."""
    page = page_of(3)
    keys.put("hostile", host=HOSTILE, ram=HOSTILE, description=HOSTILE)
    status(keys, "hostile", Phase.BACKOFF, HOSTILE + "x" * 1_000_000, problems=(HOSTILE,), last_exit=HOSTILE)
    keys.write(
        keys.layout.session_key(HostName("evil")), '{"host": "<script>", "version": "<b>", "url": "", "boot_id": ""}'
    )
    eventually("the hostile one", lambda: page.instances().get("hostile", {}).get("phase") == "backoff")
    for path in ("/", "/hosts", "/instances/hostile", "/instances/nobody", "/api", f"/?q={HOSTILE[:20]}"):
        chrome.open(page.url + path)
        chrome.until("the stream", LIVE)
        assert chrome.run("return window.hacked ?? null") is None, path
        assert chrome.run("return document.querySelectorAll('img, iframe, script:not([src])').length") == 0, path
        assert len(chrome.run("return document.body.innerText")) < 50_000
    asked = {urlsplit(url).netloc for url in chrome.requested() if not url.startswith(("about:", "chrome:", "data:"))}
    assert asked == {urlsplit(page.url).netloc}
    # Of the page that is not there.
    assert [said for said in chrome.complaints() if "404" not in said] == []


def test_the_policy_is_in_force(chrome: Browser, page_of: Callable[..., Page]) -> None:
    """The browser itself refuses what the pages never do."""
    page = page_of(1)
    chrome.open(page.url)
    for script in (
        "document.body.innerHTML = '<b>x</b>'",
        "const s = document.createElement('script'); s.text = 'window.hacked = 1'",
    ):
        outcome = chrome.run(f"try {{ {script} }} catch (error) {{ return 'refused' }}; return 'done'")
        assert outcome == "refused", script
    assert chrome.run("return window.hacked ?? null") is None


def test_it_works_without_scripts(chrome: Browser, page_of: Callable[..., Page]) -> None:
    """Requirement 7: a list, a form that filters, links that sort, and an instance's own page."""
    page = page_of(20)
    chrome.scripts(on=False)
    chrome.open(page.url)
    assert len(rows(chrome)) == 20
    assert chrome.run("return document.querySelector('time').textContent").endswith(" UTC")
    chrome.run("document.querySelector('[name=q]').focus()")
    chrome.type(f"vm1{ENTER}")
    eventually("the filtered list", lambda: len(rows(chrome)) == 11)
    assert "q=vm1" in chrome.run("return location.search")
    chrome.run("document.querySelector('th[data-sort=id] a').click()")
    eventually("the sorted list", lambda: rows(chrome)[:2] == ["vm1", "vm10"])
    chrome.run("document.querySelector('#i-vm1 a').click()")
    eventually("its own page", lambda: chrome.run("return location.pathname") == "/instances/vm1")
    assert "52:54:00:00:00:00" in chrome.run("return document.body.innerText")


def test_it_works_with_a_keyboard_alone(chrome: Browser, page_of: Callable[..., Page]) -> None:
    """Requirement 7: every link, field and head in its order; what has the focus is seen; a change does not take it."""
    page = page_of(3)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    seen = []
    for _ in range(40):
        chrome.type(TAB)
        what = chrome.run(
            "const e = document.activeElement; return [e.tagName, e.name || e.getAttribute('href') || '']"
        )
        if what[1] == "/instances/vm1":
            break
        seen.append(what)
        assert chrome.run("return getComputedStyle(document.activeElement).outlineStyle") != "none", what
    assert seen[0] == ["A", "#main"]
    assert {"q", "host", "phase", "show"} <= {name for _, name in seen}
    assert {"/hosts", "/api"} <= {name for _, name in seen}
    assert sum(tag == "A" and "sort=" in name for tag, name in seen) == 6
    chrome.type(ENTER)
    eventually("its page", lambda: chrome.run("return location.pathname") == "/instances/vm1")


def test_a_change_keeps_the_focus(chrome: Browser, page_of: Callable[..., Page], keys: Keys) -> None:
    """Of a person who walks through the list while it changes."""
    page = page_of(3)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    chrome.run("document.querySelector('#i-vm2 a').focus()")
    status(keys, "vm2", Phase.BACKOFF, "it fails")
    chrome.until("the change", "return document.getElementById('i-vm2').textContent.includes('it fails')")
    assert chrome.run("return document.activeElement.getAttribute('href')") == "/instances/vm2"


PATHS = ("/", "/hosts", "/instances/vm6", "/api", "/?show=problems")
CONTRAST = """
const linear = (value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
const light = (text) => {
  const [r, g, b] = text.match(/[\\d.]+/g).map((part) => linear(Number(part) / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const back = light(getComputedStyle(document.body).backgroundColor);
const least = {};
for (const one of document.querySelectorAll('main *')) {
  if (!one.innerText || !one.childNodes.length) continue;
  const fore = light(getComputedStyle(one).color);
  const ratio = (Math.max(fore, back) + .05) / (Math.min(fore, back) + .05);
  least[one.className || one.tagName] = Math.min(least[one.className || one.tagName] ?? 99, ratio);
}
return [getComputedStyle(document.body).backgroundColor, least];
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_400_pixels_in_dark_and_light(
    chrome: Browser, page_of: Callable[..., Page], keys: Keys, *, dark: bool
) -> None:
    """Requirement 7: nothing runs out of the side, and every text stands off its ground (WCAG 2.2, 1.4.3: 4.5 to 1)."""
    page = page_of(20)
    long = "a-machine-with-the-longest-name-that-an-id-may-have.example.org"
    keys.put(long, host="a.host.with.a.very.long.name.that.goes.on.and.on.example.org", ram="1G", description="x" * 300)
    eventually("the long one", lambda: long in page.instances())
    chrome.dark(on=dark)
    grounds = set()
    for path in (*PATHS, f"/instances/{long}"):
        for width in (400, 1280):
            chrome.size(width, 900)
            chrome.open(page.url + path)
            chrome.until("the stream", LIVE)
            assert chrome.run("return document.documentElement.scrollWidth") <= width, (path, width)
            ground, least = chrome.run(CONTRAST)
            grounds.add(ground)
            assert {name: ratio for name, ratio in least.items() if ratio < 4.5} == {}, path
    assert grounds == {"rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"}


def test_etcd_away_is_seen_and_it_recovers(chrome: Browser, etcd_alone: EtcdServer, etcd_prefix: str) -> None:
    """Requirement 3: the age of what is shown, in sight wherever a person has scrolled to; then all goes on."""
    keys = Keys(etcd_alone, etcd_prefix)
    keys.together(dict(made_up(30, keys.layout)))
    with Host(keys, "alpha") as host, Page(keys, host) as page:
        page.in_step()
        chrome.open(page.url)
        chrome.until("the stream", LIVE)
        etcd_alone.kill()
        said(chrome, "etcd does not answer")
        assert "What you see is as of" in chrome.run(STATE)
        chrome.run("scrollTo(0, 1000)")
        assert chrome.run("return document.getElementById('state').getBoundingClientRect().top") >= 0
        etcd_alone.start()
        etcd_alone.wait_ready()
        said(chrome, "In step")
        keys.put("late", host="alpha", ram="1G")
        chrome.until("the new one", "return document.getElementById('i-late')")


def test_a_page_without_its_server_says_so_and_misses_nothing(
    chrome: Browser, page_of: Callable[..., Page], keys: Keys
) -> None:
    """Requirement 5: the stream is lost, another process answers in its place, and the list is what it is now."""
    listen = f"127.0.0.1:{free_port()}"
    page = page_of(3, KVM_WEB_LISTEN=listen)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    page.kill()
    said(chrome, "server does not answer")
    assert "What you see is as of" in chrome.run(STATE)
    keys.put("new", host="alpha", ram="1G")
    keys.delete("vm3")
    keys.together({}, delete=[keys.layout.status_key(InstanceId("vm3"))])
    page_of(KVM_WEB_LISTEN=listen)
    said(chrome, "In step")
    assert rows(chrome) == ["new", "vm1", "vm2"]


def test_a_hidden_tab_gives_its_connection_back(chrome: Browser, page_of: Callable[..., Page], keys: Keys) -> None:
    """A browser has six to a server; when it is looked at again it has what it missed."""
    page = page_of(3)
    chrome.open(page.url)
    chrome.until("the stream", LIVE)
    hide = (
        "Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )

    def viewers() -> str:
        found = re.search(r"^kvmsupervisor_web_viewers (\d+)$", page.get("/metrics")[1].decode(), re.MULTILINE)
        assert found is not None
        return found[1]

    assert viewers() == "1"
    chrome.run(hide, True)
    eventually("no viewer", lambda: viewers() == "0")
    status(keys, "vm2", Phase.BACKOFF, "it fails")
    chrome.run(hide, False)
    chrome.until("what it missed", "return document.getElementById('i-vm2').textContent.includes('it fails')")


def test_other_pages_follow_too(chrome: Browser, page_of: Callable[..., Page], keys: Keys) -> None:
    """An instance's own page and the hosts, without a reload, and where a person has scrolled to."""
    page = page_of(3)
    chrome.open(f"{page.url}/instances/vm2")
    chrome.until("the stream", LIVE)
    chrome.run("window.same = 1")
    keys.put("vm2", description="quite another one")
    chrome.until("the change", "return document.getElementById('main').textContent.includes('quite another one')")
    chrome.open(f"{page.url}/hosts")
    chrome.until("the stream", LIVE)
    keys.together({}, delete=[keys.layout.session_key(HostName("beta"))])
    chrome.until("its end", "return document.querySelectorAll('.no-session').length")
    assert chrome.complaints() == []

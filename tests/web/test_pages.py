"""The pages: what they show, that it is text, and that they need no script."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.events import Event, to_json
from kvmsupervisor.domain.host_wish import HostProgress, Mode
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase
from tests.web.conftest import CONSOLE, OPERATOR, VIEWER, Site, Viewer
from tests.web.test_html import Elements

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\" onmouseover='alert(1)' \x1b[31m\u202e\x00"
SECRET = "correct-horse-battery"  # noqa: S105 - of nothing


def hostile(site: Site) -> None:
    """Instances, hosts, events, locks: everything that anybody may write, as hostile as it can be."""
    world, layout = site.world, site.world.layout
    world.host("alpha")
    world.keys("1", host=HOSTILE, ram=HOSTILE, description=HOSTILE, mac=HOSTILE)
    world.running("2", description=HOSTILE)
    world.status(
        "2", "alpha", Phase.BACKOFF, HOSTILE, problems=(HOSTILE,), pending=(HOSTILE,), last_exit=HOSTILE,
        notice=HOSTILE, unplugged=(HOSTILE,), machine=HOSTILE, cdrom=HOSTILE, stood={HOSTILE: HOSTILE},
        agent=GuestFacts(os=HOSTILE, hostname=HOSTILE, addresses=(GuestAddress(interface=HOSTILE, address=HOSTILE),)),
    )  # fmt: skip
    world.running("3", host=HOSTILE)
    world.etcd.write(layout.wish_key(InstanceId("2"), HOSTILE.replace("/", "")), HOSTILE)
    world.etcd.write(layout.lock_key(InstanceId("1")), HOSTILE)
    placement = Placement(host=HostName("alpha"), why=HOSTILE, since=HOSTILE, of=1)
    world.etcd.write(layout.placement_key(InstanceId("2")), placement.to_json())
    told = Event(at=HOSTILE[:40], host=HOSTILE, event=HOSTILE, reason=HOSTILE)
    world.etcd.write(layout.events_key(InstanceId("2")), to_json([told])[0])
    session = {"host": HOSTILE, "version": HOSTILE, "url": "javascript:alert(1)", "boot_id": "b", "notice": HOSTILE}
    import json  # noqa: PLC0415

    world.etcd.write(layout.session_key(HostName("evil")), json.dumps(session))


PAGES = ("/", "/hosts", "/instances/1", "/instances/2", "/instances/3", "/api", "/instances/nobody", "/?q=" + "%3Cb%3E")


@pytest.mark.parametrize("path", PAGES)
async def test_everything_is_shown_as_text(site: Site, path: str) -> None:
    """Requirement: what comes from keys, QEMU and guests is text, visible, and leads nowhere."""
    hostile(site)
    await site.pass_by()
    page = site.page(path)
    assert_text(page)
    assert "alert(1)" in Elements(page).words or path in {"/api", "/instances/nobody", "/?q=%3Cb%3E"}


def assert_text(page: str) -> None:
    """Whether nothing in a page comes from anybody else but as text."""
    elements = Elements(page)
    scripts = [said for name, said in elements.found if name == "script"]
    assert all(str(said["src"]).startswith("/static/") for said in scripts)
    assert not {"img", "iframe", "object", "style", "base"} & {name for name, _ in elements.found}
    attributes = {key for _, said in elements.found for key in said}
    assert not {key for key in attributes if key.startswith("on") or key == "style"}
    links = [str(said["href"]) for _, said in elements.found if "href" in said]
    assert all(urlsplit(link).scheme == "" and link[0] in "/#" and not link.startswith("//") for link in links)
    assert page.replace("\n", "").isprintable()


@pytest.mark.parametrize("path", [*PAGES[:5], "/create"])
async def test_what_operators_see_is_text_too(asking: Site, path: str) -> None:
    """The same for buttons and forms, whose values are names of hosts and images."""
    hostile(asking)
    asking.world.etcd.write(asking.world.layout.image_key(HOSTILE.replace("/", "")), HOSTILE)
    asking.world.etcd.write(asking.world.layout.drain_fact_key(HOSTILE), HOSTILE)
    await asking.pass_by()
    page = asking.get(path, authorization=f"Bearer {OPERATOR}").body.decode()
    assert_text(page)
    assert ("data-act" in page) == (path not in {"/", "/create"})


async def test_who_may_not_act_has_no_buttons(asking: Site) -> None:
    """And no form; the server says why."""
    asking.world.host("alpha")
    asking.world.running("1")
    await asking.pass_by()
    for token in (VIEWER, CONSOLE):
        for path in ("/", "/hosts", "/instances/1"):
            page = asking.get(path, authorization=f"Bearer {token}").body.decode()
            assert not re.search("data-act|data-many|<button type", page), path
        assert asking.get("/create", authorization=f"Bearer {token}").status == 403
    assert "data-many" in asking.get("/", authorization=f"Bearer {OPERATOR}").body.decode()


async def test_a_drain_is_shown_as_it_goes_on(asking: Site) -> None:
    """Its order and its progress are news, as `hosts` prints them; held orders have a button that names them."""
    world, layout = asking.world, asking.world.layout
    world.host("alpha", "beta")
    world.running("1")
    await asking.pass_by()

    def page() -> str:
        return asking.get("/hosts", authorization=f"Bearer {OPERATOR}").body.decode()

    viewer = Viewer(asking.get("/api/v1/stream", authorization=f"Bearer {OPERATOR}"))
    viewer.read()
    assert "Return to service" not in page()
    assert (await asking.act("drain", host="alpha"))[0] == 200
    await asking.pass_by()
    assert "change" in viewer.read()
    assert "drains (live); its supervisor has not said anything yet" in page()
    assert "Return to service" in page()
    said = HostProgress(host="alpha", mode=Mode.LIVE, of=1, since="2026-03-01T12:00:00Z", left=("1",))
    world.etcd.write(layout.drain_fact_key("alpha"), said.to_json())
    await asking.pass_by()
    assert "change" in viewer.read()
    assert "drains (live): 1 left" in page()
    world.status("1", "alpha", Phase.RUNNING, pid=4, held=True)
    await asking.pass_by()
    assert 'data-act="confirm-removal" data-host="alpha" data-held="1"' in page()


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_allows_its_own_files_only(site: Site, path: str) -> None:
    """Requirement: a strict policy on every page: nothing inline, no eval, nobody may frame it."""
    hostile(site)
    await site.pass_by()
    policy = site.get(path).headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert "unsafe" not in str(policy)
    assert "data:" not in str(policy)


async def test_no_secret_is_on_any_page_nor_in_the_api(site: Site) -> None:
    """Law: secrets of the keys never leave etcd, whatever key a person put them into."""
    keys = {
        "spice_password": SECRET,
        "spice_pasword": SECRET,
        "user-data": f"#cloud-config\npassword: {SECRET}",
        "extra_flags": f"-object secret,id=s,data={SECRET}",
        "cloud-config": f"http://me:{SECRET}@h/x?token={SECRET}",
        "x-api-token": SECRET,
        "description": f"password={SECRET}",
    }
    site.world.running("1", **keys)
    await site.pass_by()
    viewer = site.view()
    viewer.read()
    paths = ("/", "/instances/1", "/api/v1/instances", "/api/v1/instances/1", "/api/v1/events", "/hosts", "/metrics")
    shown = [site.get(path).body.decode() for path in paths]
    assert SECRET not in "".join(shown) + str(viewer.rows)
    assert "(not shown)" in shown[1]


async def test_the_list_works_without_scripts(site: Site) -> None:
    """Requirement: the whole list, sorted and filtered by its server, with links and a form."""
    site.world.host("alpha")
    site.world.running("web1", description="the shop")
    site.world.running("db1", host="beta")
    site.world.keys("bad", host="alpha", ram="plenty")
    await site.pass_by()
    page = site.page()
    assert re.findall(r'<tr id="i-([\w-]+)"', page) == ["bad", "db1", "web1"]
    assert "<title>(2) Instances" in page
    assert re.findall(r'<tr id="i-([\w-]+)"', site.page("/?q=shop")) == ["web1"]
    assert re.findall(r'<tr id="i-([\w-]+)"', site.page("/?sort=-id")) == ["web1", "db1", "bad"]
    assert re.findall(r'<tr id="i-([\w-]+)"', site.page("/?host=beta")) == ["db1"]
    assert re.findall(r'<tr id="i-([\w-]+)"', site.page("/?phase=unknown&show=problems")) == ["db1"]
    # A page with all rows goes on from there; of one with some the script asks for all.
    assert "data-mark=" in page
    assert "data-mark=" not in site.page("/?q=shop")


async def test_an_instance_has_its_wishes_beside_what_is_observed(site: Site) -> None:
    """Keys with the revisions that wrote them, and what has not come into effect; lock, guest, disks, events."""
    world = site.world
    world.host("alpha")
    world.running("1", rbd="/vms/one", **{"disk/2": "vms/two"})
    agent = GuestFacts(os="Debian", addresses=(GuestAddress(interface="eth0", address="10.0.0.7"),))
    world.status(
        "1", "alpha", Phase.RUNNING, pid=77, run_state="running", pending=("ram",), agent=agent, last_exit="crashed"
    )
    told = Event(at="2026-03-01T12:00:00Z", host="alpha", event="instance.ended", reason="crashed (signal 9)")
    world.etcd.write(world.layout.events_key(InstanceId("1")), to_json([told])[0])
    world.keys("1", cpus="8")
    await site.pass_by()
    words = Elements(site.page("/instances/1")).words
    for wanted in ("vms/one (Ceph)", "vms/two (Ceph)", "10.0.0.7", "crashed (signal 9)", "at the next restart"):
        assert wanted in words
    assert "not seen by its host yet" in words
    assert f"cpus8{world.etcd.revision}" in words
    assert "last exitcrashed" in words


async def test_hosts_are_shown_with_what_they_hold(site: Site) -> None:
    """Those without a session, too."""
    site.world.host("alpha")
    site.world.running("1")
    site.world.running("2", host="gone")
    await site.pass_by()
    words = Elements(site.page("/hosts")).words
    assert "alphaup" in words
    assert "goneno session" in words
    assert "it holds the locks of 2, and may run them" in words


async def test_an_empty_cluster_says_what_to_do(site: Site) -> None:
    """No instances, no hosts."""
    assert "There are no instances" in site.page()
    assert "No host has a session" in site.page("/hosts")


async def test_what_is_not_there(site: Site) -> None:
    """A page of its own for an id that is nobody's, or no id."""
    for path in ("/instances/nobody", "/instances/", "/instances/..%2f", "/instances/a/b"):
        assert site.get(path).status == 404
        assert "All instances" in site.page(path)

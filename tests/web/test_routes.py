"""Paths, names, methods, and what programs read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsupervisor.cluster.host_table import facts_of
from kvmsupervisor.cluster.overview import as_object, read_cluster
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.domain.events import Event, to_json
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.web.routes import STATIC
from tests.web.conftest import Site

ROOT = Path(__file__).resolve().parents[2]


async def test_programs_read_what_list_and_hosts_print(site: Site) -> None:
    """Requirement: the same set, and the same objects."""
    site.world.host("alpha")
    site.world.running("1")
    site.world.running("2", host="gone")
    site.world.keys("10", host="alpha", ram="plenty")
    site.world.keys("nohost", ram="1G")
    await site.pass_by()
    cluster = await read_cluster(site.world.etcd, site.world.layout)
    wanted = [as_object(one, cluster) for one in cluster.instances.values()]
    assert site.json("/api/v1/instances") == json.loads(json.dumps(wanted))
    for one in site.json("/api/v1/instances"):
        details = site.json(f"/api/v1/instances/{one['id']}")
        assert details | one == details
    hosts = site.json("/api/v1/hosts")
    assert [host | fact.to_object() for host, fact in zip(hosts, facts_of(cluster), strict=True)] == hosts
    assert hosts[0]["boot_id"] == "b"


async def test_events_of_all_and_of_one(site: Site) -> None:
    """By time, the newest last; of one, since a time, so many."""

    def event(hour: int, host: str = "alpha") -> Event:
        return Event(at=f"2026-03-01T{hour:02}:00:00Z", host=host, event="instance.running", epoch=hour)

    for name, hours in (("2", (2, 3)), ("1", (1, 4))):
        key = site.world.layout.events_key(InstanceId(name))
        site.world.etcd.write(key, to_json([event(hour) for hour in hours])[0])
    await site.pass_by()
    assert [(one["instance"], one["epoch"]) for one in site.json("/api/v1/events")] == [
        ("1", 1),
        ("2", 2),
        ("2", 3),
        ("1", 4),
    ]
    assert [one["epoch"] for one in site.json("/api/v1/events?instance=1")] == [1, 4]
    assert [one["epoch"] for one in site.json("/api/v1/events?since=2026-03-01T03:00:00%2B00:00")] == [3, 4]
    assert [one["epoch"] for one in site.json("/api/v1/events?limit=1")] == [4]
    assert site.json("/api/v1/events?instance=nobody") == []


@pytest.mark.parametrize(
    "query",
    ["instance=a/b", "since=yesterday", "since=2026-03-01T03:00:00", "since=0001-01-01T00:00:00%2B14:00", "limit=0",
     "limit=x", "limit=99999", "limit=²"],
)  # fmt: skip
async def test_a_parameter_of_no_use_is_named(site: Site, query: str) -> None:
    """Status 400, and what would be right."""
    reply = site.get(f"/api/v1/events?{query}")
    assert reply.status == 400
    assert query.partition("=")[0] in json.loads(reply.body)["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get"])
async def test_nothing_but_reading(site: Site, method: str) -> None:
    """Law: there are no writes."""
    for path in ("/", "/api/v1/instances", "/api/v1/instances/1", "/api/v1/stream"):
        reply = site.get(path, method=method)
        assert (reply.status, reply.headers["Allow"], reply.feed) == (405, "GET, HEAD", None)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("127.0.0.1:9747", "[::1]:9747", "10.0.0.5", "localhost:9747", "LOCALHOST")),
        *((name, 200) for name in ("a.localhost", "alpha:9747", "alpha.", "[::1].evil")),
        *((name, 421) for name in ("evil.example:9747", "127.0.0.1.evil.example", "localhost.evil.example")),
        *((name, 421) for name in ("alpha.evil.example", "x@127.0.0.1", "127.0.0.1@evil", "::1 evil")),
    ],
)
async def test_a_page_from_elsewhere_cannot_point_its_name_here(site: Site, host: str, status: int) -> None:
    """Law: DNS rebinding gets nothing: only addresses, localhost and this host's name are answered."""
    for path in ("/", "/api/v1/instances", "/api/v1/stream", "/metrics"):
        assert site.get(path, host=host).status == status


def test_names_are_a_setting() -> None:
    """Names separated by commas, or any; nothing else."""
    environ = {"KVM_CONFIG": "/dev/null"}
    assert load_settings(environ | {"KVM_WEB_NAMES": "A.example, b"}).web_names == ("a.example", "b")
    assert load_settings(environ | {"KVM_WEB_NAMES": "*"}).web_names == ("*",)
    for wrong in ("http://a", "a:80", "a,,b", "a b", "*.example"):
        with pytest.raises(Exception, match="KVM_WEB_NAMES"):
            load_settings(environ | {"KVM_WEB_NAMES": wrong})
    with pytest.raises(Exception, match="KVM_WEB_LISTEN"):
        load_settings(environ | {"KVM_WEB_LISTEN": "off"})


async def test_no_page_from_elsewhere_may_read(site: Site) -> None:
    """Every reply says so to browsers; none allows another origin."""
    for path in ("/", "/api/v1/instances", "/static/list.js", "/nothing", "/api/v1/stream"):
        headers = site.get(path, origin="http://evil.example").headers
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Frame-Options"] == "DENY"
        assert not [name for name in headers if name.lower().startswith("access-control")]


async def test_the_files_of_the_pages_are_there_and_ask_nobody(site: Site) -> None:
    """Every file that is named is served; none names another place, none evaluates, none writes HTML."""
    folder = ROOT / "kvmsupervisor" / "web" / "static"
    assert {path.name for path in folder.iterdir()} == set(STATIC)
    for name, kind in STATIC.items():
        reply = site.get(f"/static/{name}")
        assert (reply.status, reply.content_type) == (200, kind)
        text = reply.body.decode()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text), name
    for name in ("..%2froutes.py", "../routes.py", "", "x.js", "style.css/"):
        assert site.get(f"/static/{name}").status == 404


async def test_metrics_are_in_the_format(site: Site) -> None:
    """Prometheus' own parser reads them; docs/web.md has each, and no other."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

    site.world.host("alpha")
    site.world.running("1")
    await site.pass_by()
    site.get("/nothing")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(site.get("/metrics").body.decode())
        for sample in family.samples
    }
    assert found["kvmsupervisor_web_etcd_up",] == 1
    assert found["kvmsupervisor_web_instances", "running"] == 1
    assert found["kvmsupervisor_web_hosts", "up"] == 1
    assert found["kvmsupervisor_web_requests_total", "404"] == 1
    told = set(re.findall(r"^\| `(kvmsupervisor_web_\w+)", (ROOT / "docs" / "web.md").read_text(), re.MULTILINE))
    text = site.get("/metrics").body.decode()
    assert set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) == told
    assert {name for name, *_ in found} <= told


async def test_health_and_readiness(site: Site) -> None:
    """It answers; it is in step."""
    assert site.get("/healthz").body == b"ok\n"
    assert site.get("/readyz").body.startswith(b"in step with revision ")


def test_a_page_without_files_imports_nothing_for_them() -> None:
    """Neither YAML nor bcrypt, each of which would be memory for nothing."""
    program = (
        "import sys, kvmsupervisor.web.service, kvmsupervisor.web.access\n"
        "print([name for name in sys.modules if name in ('yaml', 'bcrypt', 'click')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_supervisor_imports_nothing_of_it() -> None:
    """Requirement: none of this room is in a supervisor's process."""
    program = (
        "import sys, kvmsupervisor.cli.supervise, kvmsupervisor.cli.run, kvmsupervisor.adapters.web.exchange\n"
        "import kvmsupervisor.adapters.web.page, kvmsupervisor.cli.exec_command\n"
        "print([name for name in sys.modules if name in ('yaml', 'bcrypt')"
        " or name.startswith(('kvmsupervisor.web', 'kvmsupervisor.cluster.live', 'kvmsupervisor.cluster.acts.inst'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


async def test_a_key_says_whether_it_is_shown_whole(site: Site) -> None:
    """Law: nobody who changes what is shown loses what is not: secrets, and bytes that are no text."""
    site.world.keys("1", ram="1G", spice_password="x" * 8, extra_flags="-device a")
    site.world.etcd.write(site.world.layout.wish_key(InstanceId("1"), "cloud-config"), "https://user:secret@host/x")
    site.world.etcd.write(site.world.layout.wish_key(InstanceId("1"), "description"), b"\xff")
    await site.pass_by()
    keys = site.json("/api/v1/instances/1")["keys"]
    assert {name: key["whole"] for name, key in keys.items()} == {
        "cloud-config": False,
        "description": False,
        "extra_flags": True,
        "ram": True,
        "spice_password": False,
    }

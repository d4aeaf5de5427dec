"""The schemas and the OpenAPI description, against what is written and served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from kvmsupervisor.domain.agent import GuestAddress, GuestFacts
from kvmsupervisor.domain.consoles import ConsoleKind
from kvmsupervisor.domain.events import Event, to_json
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.lock import Destination, Lock, LockState
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.snapshots import Rollback, Snap
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.web.routes import METHODS
from tests.web.conftest import Site

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "kvmsupervisor" / "web" / "schemas"
OPENAPI = json.loads((SCHEMAS / "openapi.json").read_text())

AGENT = GuestFacts(os="Debian", hostname="one", addresses=(GuestAddress(interface="eth0", address="10.0.0.7"),))


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def component(name: str, *, many: bool = False) -> Draft202012Validator:
    """What a component of the description asks for."""
    one: dict[str, Any] = {"$ref": f"#/components/schemas/{name}"}
    found = {"type": "array", "items": one} if many else one
    return Draft202012Validator(found | {"components": OPENAPI["components"]})


def test_they_are_what_the_code_reads_and_writes() -> None:
    """`make schemas` has been run."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "schemas", "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"run `make schemas`: {done.stdout}"


STATUSES = [
    Status(id="1", host="alpha", phase=Phase.WAITING, reason="so", since="2026-03-01T12:00:00Z"),
    Status(
        id="1", host="alpha", phase=Phase.RUNNING, reason="so", since="2026-03-01T12:00:00Z", pid=7, epoch=2,
        pending=("ram",), problems=("x",), agent=AGENT, stood={"ram": "1G"}, files={"file:a": "alpha"}, guarded=True,
        snapshots=(Snap(name="s", at="", size=1, how="off", disks=("rbd",)),),
        rollback=Rollback(request="s:1", name="s"),
        images=("a/b",), unplugged=("x",), cdrom="empty", last_exit="x", machine="pc-q35-7.2", run_state="running",
    ),
]  # fmt: skip


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_is_as_its_schema_says(status: Status) -> None:
    """With nothing, and with everything."""
    validator("status").validate(json.loads(status.to_json()))


def test_events_are_as_their_schema_says() -> None:
    """With nothing, and with everything."""
    short = Event(at="2026-03-01T12:00:00Z", host="alpha", event="instance.running")
    full = Event(
        at="2026-03-01T12:00:00Z", host="alpha", event="instance.ended", epoch=3, reason="crashed", revision=9,
        end="crashed", times=4, since="2026-03-01T11:00:00Z",
    )  # fmt: skip
    validator("events").validate(json.loads(to_json([short, full])[0]))


def test_a_lock_is_as_its_schema_says() -> None:
    """With nothing, and while its guest is on its way to another host."""
    lock = Lock(host=HostName("alpha"), boot_id="b", epoch=1, state=LockState.STARTING, incarnation="i")
    to = Destination(host=HostName("beta"), boot_id="c", incarnation="j", pid=8, starttime=9)
    moving = Lock(
        host=HostName("alpha"), boot_id="b", epoch=1, state=LockState.MIGRATING, incarnation="i", pid=7, starttime=1,
        clients=("192.0.2.1:0/1",), to=to,
    )  # fmt: skip
    for one in (lock, moving):
        validator("lock").validate(json.loads(one.to_json()))


@pytest.mark.parametrize(
    ("name", "value"),
    [("status", {"id": 1}), ("status", []), ("events", [{"at": "x"}]), ("events", {}), ("lock", {"host": "alpha"})],
)
def test_what_is_none_is_refused(name: str, value: object) -> None:
    """The schemas can say no."""
    with pytest.raises(ValidationError):
        validator(name).validate(value)


async def filled(site: Site) -> None:
    """A cluster with everything in it."""
    world = site.world
    world.host("alpha")
    world.running("1", rbd="/vms/one", description="x")
    world.etcd.write(world.layout.status_key(InstanceId("1")), STATUSES[1].to_json())
    world.running("2", host="gone")
    world.keys("3", host="alpha", ram="plenty")
    world.keys("4", ram="1G")
    world.etcd.write(world.layout.lock_key(InstanceId("4")), "no lock")
    world.etcd.write(world.layout.session_key(HostName("other")), "no session")
    world.etcd.write(world.layout.image_key("debian"), f"https://u:p@x/debian.qcow2 sha256={'0' * 64}")
    world.etcd.write(world.layout.image_key("broken"), "nothing")
    placement = Placement(host=HostName("beta"), why="failover", since="", of=1)
    world.etcd.write(world.layout.placement_key(InstanceId("1")), placement.to_json())
    told = Event(at="2026-03-01T12:00:00Z", host="alpha", event="instance.ended", reason="crashed", times=2, since="x")
    world.etcd.write(world.layout.events_key(InstanceId("1")), to_json([told])[0])
    await site.pass_by()


async def test_the_server_serves_what_is_described(site: Site) -> None:
    """Requirement: the description is held against the server: every path, every reply, every parameter."""
    await filled(site)
    component("Instance", many=True).validate(site.json("/api/v1/instances"))
    for name in ("1", "2", "3", "4"):
        component("InstanceDetails").validate(site.json(f"/api/v1/instances/{name}"))
    component("Host", many=True).validate(site.json("/api/v1/hosts"))
    assert len(site.json("/api/v1/hosts")) == 3
    component("Image", many=True).validate(site.json("/api/v1/images"))
    assert [one["problem"] is None for one in site.json("/api/v1/images")] == [False, True]
    component("Me").validate(site.json("/api/v1/me"))
    component("ClusterEvent", many=True).validate(site.json("/api/v1/events"))
    assert len(site.json("/api/v1/events")) == 1
    for path in ("/api/v1/instances/nobody", "/api/v1/events?limit=0"):
        component("Error").validate(json.loads(site.get(path).body))
    viewer = site.view()
    viewer.read()
    component("Row", many=True).validate(list(viewer.rows.values()))
    component("State").validate(viewer.state)
    component("Change").validate({"revision": 1, "rows": list(viewer.rows.values()), "gone": ["x"]})


async def test_every_path_is_described_and_every_described_path_is_served(site: Site) -> None:
    """In both directions."""
    await filled(site)
    routes = site.service.routes
    served = {path for path in routes._table if path.startswith("/api/v1/")} | {"/api/v1/instances/{id}"}
    sockets = {f"/api/v1/instances/{{id}}/{kind}" for kind in ConsoleKind}
    assert {path for path, methods in OPENAPI["paths"].items() if "get" in methods} == served | sockets
    assert {path for path, methods in OPENAPI["paths"].items() if "post" in methods} == set(routes._changing)
    for path, methods in OPENAPI["paths"].items():
        assert {method.upper() for method in methods} <= {*METHODS, "POST"}
        if "get" not in methods:
            continue
        reply = site.get(path.replace("{id}", "1"))
        if path in sockets:
            # Without a ticket, and of nobody.
            assert {"101", str(int(reply.status))} <= methods["get"]["responses"].keys()
            continue
        (kind,) = methods["get"]["responses"]["200"]["content"]
        assert (int(reply.status), reply.content_type) == (200, kind)


async def test_the_descriptions_are_served(site: Site) -> None:
    """So that a program finds them where it finds the rest."""
    assert site.json("/api/v1/openapi.json") == OPENAPI
    for name in ("status", "events", "lock"):
        assert site.json(f"/api/v1/schemas/{name}.json") == json.loads((SCHEMAS / f"{name}.json").read_text())
    assert site.get("/api/v1/schemas/other.json").status == 404


def test_the_description_is_whole() -> None:
    """Every reference leads somewhere."""
    text = json.dumps(OPENAPI)
    import re  # noqa: PLC0415

    wanted = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert wanted <= set(OPENAPI["components"]["schemas"])
    for schema in OPENAPI["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)

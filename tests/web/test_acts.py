"""What people do through the page: the keys and the refusals of the command line, with a result for each."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import ValidationError

from kvmsupervisor.adapters.etcd.api import Denied
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.values import Unfit
from kvmsupervisor.web.order import FIELDS, Act, parse_order
from tests.cli.conftest import World
from tests.fakes.etcd import FakeEtcd
from tests.web.conftest import CONSOLE, OPERATOR, VIEWER, Site
from tests.web.test_schemas import OPENAPI, component


def furnish(world: World) -> None:
    """Machines in several states."""
    world.host("alpha", "beta")
    world.running("1")
    world.running("2", ram="1G", hosts="beta")
    world.keys("off", ram="1G", host="alpha", power="off")
    world.keys("bad", ram="plenty", host="alpha")
    world.running("file", **{"disk/0": "file:a.qcow2"})
    world.status("file", "alpha", Phase.RUNNING, pid=3, files={"file:a.qcow2": "alpha"})
    world.running("held")
    world.status("held", "alpha", Phase.RUNNING, pid=4, held=True)
    world.lock("left", "gone")


SAME: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"act": "create", "instances": ["new"], "keys": {"ram": "1G", "host": "alpha"}},
     ("create", "new", "ram=1G", "host=alpha")),
    ({"act": "create", "instances": ["1"], "keys": {"ram": "1G"}}, ("create", "1", "ram=1G")),
    ({"act": "create", "instances": ["new"], "keys": {"ram": "plenty"}}, ("create", "new", "ram=plenty")),
    ({"act": "create", "instances": ["new"], "keys": {"rma": "1G"}}, ("create", "new", "rma=1G")),
    ({"act": "create", "instances": ["new"], "keys": {"ram": "1G", "host": "alhpa"}},
     ("create", "new", "ram=1G", "host=alhpa")),
    ({"act": "create", "instances": ["new"], "keys": {"ram": "x", "host": "alhpa"}, "force": True},
     ("create", "new", "ram=x", "host=alhpa", "--force")),
    ({"act": "create", "instances": ["left"], "keys": {"ram": "1G"}}, ("create", "left", "ram=1G")),
    ({"act": "create", "instances": ["new"], "keys": {"ram": "1G", "lock": "{}"}},
     ("create", "new", "ram=1G", "lock={}")),
    ({"act": "set", "instances": ["1"], "keys": {"ram": "2G"}, "unset": ["host"]},
     ("set", "1", "ram=2G", "--unset", "host")),
    ({"act": "set", "instances": ["1"], "keys": {"ram": "much"}}, ("set", "1", "ram=much")),
    ({"act": "set", "instances": ["bad"], "keys": {"cpus": "2"}}, ("set", "bad", "cpus=2")),
    ({"act": "set", "instances": ["1"], "unset": ["ram", "host"]}, ("set", "1", "--unset", "ram", "--unset", "host")),
    ({"act": "set", "instances": ["1"], "unset": ["hots"]}, ("set", "1", "--unset", "hots")),
    ({"act": "set", "instances": ["1"], "unset": ["lock"]}, ("set", "1", "--unset", "lock")),
    ({"act": "set", "instances": ["nobody"], "keys": {"ram": "2G"}}, ("set", "nobody", "ram=2G")),
    ({"act": "start", "instances": ["off"]}, ("start", "off")),
    ({"act": "start", "instances": ["nobody"]}, ("start", "nobody")),
    ({"act": "stop", "instances": ["1"]}, ("stop", "1")),
    ({"act": "stop", "instances": ["1"], "now": True}, ("stop", "1", "--now")),
    ({"act": "restart", "instances": ["off"]}, ("restart", "off")),
    ({"act": "reset", "instances": ["off"]}, ("reset", "off")),
    ({"act": "move", "instances": ["1"], "host": "beta"}, ("move", "1", "beta")),
    ({"act": "move", "instances": ["1"], "host": "bata"}, ("move", "1", "bata")),
    ({"act": "move", "instances": ["1"], "host": "bata", "force": True}, ("move", "1", "bata", "--force")),
    ({"act": "move", "instances": ["file"], "host": "beta"}, ("move", "file", "beta")),
    ({"act": "move", "instances": ["nobody"], "host": "beta"}, ("move", "nobody", "beta")),
    ({"act": "delete", "instances": ["1"]}, ("delete", "1", "--yes")),
    ({"act": "delete", "instances": ["left"]}, ("delete", "left", "--yes")),
    ({"act": "drain", "host": "beta"}, ("drain", "beta")),
    ({"act": "drain", "host": "beta", "mode": "stop"}, ("drain", "beta", "--stop")),
    ({"act": "drain", "host": "btta"}, ("drain", "btta")),
    ({"act": "undrain", "host": "beta", "return": "cold"}, ("undrain", "beta", "--return", "--cold")),
    ({"act": "confirm-removal", "host": "alpha", "instances": ["held"]}, ("confirm-removal", "alpha", "--yes")),
    ({"act": "confirm-removal", "host": "beta", "instances": ["held"]}, ("confirm-removal", "beta", "--yes")),
]  # fmt: skip


@pytest.mark.parametrize(("order", "command"), SAME, ids=[" ".join(command) for _, command in SAME])
async def test_it_is_what_the_command_does(asking: Site, order: dict[str, Any], command: tuple[str, ...]) -> None:
    """Law: the same keys, or a refusal in the same words."""
    other = World(FakeEtcd())
    for world in (asking.world, other):
        furnish(world)
    done = await asyncio.to_thread(other.run, *command)
    status, (result,) = await asking.act(**order)
    component("Order").validate(order)
    component("Result").validate(result)
    assert asking.world.etcd.data == other.etcd.data
    if done.exit_code == 0:
        assert (status, result["result"], result["revision"]) == (200, "done", asking.world.etcd.revision)
        for note in result["notes"]:
            assert " ".join(note.split()) in " ".join(done.stderr.split())
    else:
        assert (status, result["result"], result["revision"]) == (409, "refused", None)
        # `move` tells first how it would go.
        said = done.stderr.rpartition("Error: ")[2]
        assert " ".join(said.split()) == " ".join(result["message"].split())


async def test_requests_are_new_each_time(asking: Site) -> None:
    """A restart is asked for by a value that was never there; a reset and one that is urgent say so in it."""
    furnish(asking.world)
    values = []
    for act, more in (("restart", {}), ("restart", {}), ("restart", {"now": True}), ("reset", {})):
        assert (await asking.act(act, "1", **more))[0] == 200
        values.append(asking.world.value("1", "restart_request") or "")
    assert len(set(values)) == 4
    assert [value.partition(":")[0] for value in values[2:]] == ["now", "reset"]
    assert (await asking.act("create", "new", keys={"ram": "1G", "mac": "auto"}))[1][0]["notes"][0].startswith(
        "`mac` is "
    )


async def test_many_at_once_have_a_result_each(asking: Site) -> None:
    """One refusal changes nothing for the others; each id once; the status is that of the worst."""
    furnish(asking.world)
    status, results = await asking.act("stop", "1", "nobody", "2", "1")
    assert status == 409
    assert [(one["instance"], one["result"]) for one in results] == [
        ("1", "done"),
        ("nobody", "refused"),
        ("2", "done"),
    ]
    assert asking.world.value("2", "power") == "off"
    await asking.pass_by()
    rows = {row["id"]: row for row in asking.view_rows(OPERATOR)}
    assert rows["2"]["acted_on"] < results[2]["revision"] <= rows["2"]["revision"]


async def test_what_is_only_foreseen_writes_nothing(asking: Site) -> None:
    """How a move and a drain would go, as `--dry-run` says it; the refusals are the same."""
    furnish(asking.world)
    await asking.pass_by()
    before = asking.world.etcd.revision
    status, (result,) = await asking.act("move", "1", host="beta", dry_run=True)
    assert (status, result["revision"]) == (200, None)
    assert "cold: it is stopped on alpha and started on beta" in result["message"]
    assert (await asking.act("move", "1", host="bata", dry_run=True))[0] == 409
    status, (result,) = await asking.act("drain", host="alpha", dry_run=True)
    said = await asyncio.to_thread(asking.world.run, "drain", "alpha", "--dry-run")
    assert result["notes"] == said.stdout.splitlines()
    assert (await asking.act("drain", host="beta", dry_run=True))[1][0]["message"] == "nothing runs there"
    assert asking.world.etcd.revision == before


async def test_orders_are_posted(asking: Site) -> None:
    """Another method is told so; nothing else takes a POST."""
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        reply = asking.get("/api/v1/acts", method=method, authorization=f"Bearer {OPERATOR}")
        assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    assert (await asking.post({}, path="/api/v1/instances"))[0] == 405


async def test_only_operators_act(asking: Site) -> None:
    """401 for nobody, 403 with the missing role for others; nothing is read of the order, nothing is written."""
    furnish(asking.world)
    before = asking.world.etcd.revision
    order = {"act": "stop", "instances": ["1"]}
    for token, status, said in (
        ("", 401, "asks who you are"),
        ("x" * 40, 401, "nobody has this token"),
        (VIEWER, 403, "token:v has not the role operator"),
        (CONSOLE, 403, "token:c has not the role operator"),
    ):
        origin = {} if token else {"origin": "http://127.0.0.1", "x_kvmsupervisor": "1"}
        assert (found := await asking.post(order, token=token, **origin))[0] == status
        assert said in found[1]["error"]
    assert asking.world.etcd.revision == before


async def test_without_files_nobody_acts(site: Site) -> None:
    """Requirement 14: it only shows, and says how that is changed."""
    furnish(site.world)
    status, found = await site.post(
        {"act": "stop", "instances": ["1"]}, token="", origin="http://127.0.0.1", x_kvmsupervisor="1"
    )
    assert status == 403
    assert "KVM_WEB_CONFIG" in found["error"]
    assert site.world.value("1", "power") is None
    assert 'data-may="viewer"' in site.page()
    assert "/create" not in site.page()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/x-www-form-urlencoded"}, 415),
        ({"content_type": "text/plain; application/json"}, 415),
        ({"origin": "https://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"host": "evil.example"}, 421),
        ({"content_type": "Application/JSON; charset=utf-8"}, 200),
    ],
)
async def test_no_page_of_another_site_acts(asking: Site, headers: dict[str, str], status: int) -> None:
    """Attacks: forms, scripts and names of other sites, with a token that they do not even have."""
    furnish(asking.world)
    assert (await asking.post({"act": "start", "instances": ["1"]}, **headers))[0] == status
    assert (asking.world.value("1", "power") is None) == (status != 200)


async def test_every_act_is_an_event(asking: Site) -> None:
    """Who, from where, what, of which, with which result: for each; names of keys, and never their values."""
    furnish(asking.world)
    with structlog.testing.capture_logs() as logs:
        await asking.act("set", "1", "nobody", keys={"spice_password": "hunter2"}, unset=["description"])
        await asking.act("set", "1", keys={"spice_password": "hunter2" * 99, "ram": "hunter2"})
        await asking.act("drain", host="beta")
        await asking.act("move", "1", host="beta", dry_run=True)
        await asking.post({"act": "stop", "instances": ["1"]}, token=VIEWER)
        await asking.post({"act": "stop", "instances": ["1"]}, sec_fetch_site="cross-site")
    acts = [one for one in logs if one["event"] == "web.act"]
    assert [(one["who"], one["address"], one["act"]) for one in acts] == [
        ("token:o", "192.0.2.7", act) for act in ("set", "set", "set", "drain")
    ]
    assert [one["result"] for one in acts] == ["done", "refused", "refused", "done"]
    assert acts[0]["keys"] == ["spice_password", "-description"]
    assert (acts[0]["instance"], acts[3]["host"], acts[0]["revision"] > 0) == ("1", "beta", True)
    refused = [one for one in logs if one["event"] == "web.refused"]
    assert [(one["who"], one["path"]) for one in refused] == [("token:v", "/api/v1/acts"), ("token:o", "/api/v1/acts")]
    assert "hunter2" not in str(logs)
    assert (
        'acts_total{act="set",result="refused"} 2'
        in asking.get("/metrics", authorization=f"Bearer {VIEWER}").body.decode()
    )


async def test_etcd_away(asking: Site) -> None:
    """Nothing is begun after the first one that was not answered."""
    furnish(asking.world)
    asking.writer.away()
    status, results = await asking.act("start", "1", "2", "off")
    assert (status, [one["result"] for one in results]) == (503, ["away", "untried", "untried"])
    assert asking.world.value("1", "power") is None
    asking.writer.back()
    assert (await asking.act("start", "1"))[0] == 200


async def test_a_lost_answer_of_a_write(asking: Site) -> None:
    """It may have been written: so it says."""
    furnish(asking.world)

    async def lose(call: str) -> None:
        if call == "txn":
            asking.writer.lose_next_reply()

    asking.writer.hook = lose
    status, (result,) = await asking.act("start", "1")
    assert (status, result["result"], result["revision"]) == (503, "unknown", None)
    assert "may or may not have been written" in result["message"]
    assert asking.world.value("1", "power") == "on"


async def test_a_user_of_etcd_without_the_role(asking: Site) -> None:
    """It says which settings name who writes."""
    furnish(asking.world)
    asking.writer.fail_next(Denied("permission denied"), "txn")
    status, (result,) = await asking.act("start", "1")
    assert (status, result["result"]) == (409, "refused")
    assert "KVM_WEB_ETCD_USERNAME" in result["message"]


async def test_an_act_goes_on_when_its_client_leaves(asking: Site) -> None:
    """And is told of in the log, whole."""
    furnish(asking.world)
    gate, arrived = asyncio.Event(), asyncio.Event()

    async def wait(call: str) -> None:
        arrived.set()
        await gate.wait()

    asking.writer.hook = wait
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(asking.act("stop", "1", "2"))
        await arrived.wait()
        task.cancel()
        await asyncio.wait([task])
        gate.set()
        await asking.clock.advance(1)
    assert [one["instance"] for one in logs if one["event"] == "web.act"] == ["1", "2"]
    assert asking.world.value("2", "power") == "off"


async def test_who_waits_too_long_is_told_what_was_not_begun(asking: Site) -> None:
    """Before the connection ends."""
    furnish(asking.world)

    async def crawl(call: str) -> None:
        await asking.clock.sleep(10)

    asking.writer.hook = crawl
    task = asyncio.create_task(asking.act("start", "1", "2", "off"))
    await asking.clock.advance(200)
    status, results = await task
    assert (status, [one["result"] for one in results]) == (503, ["done", "untried", "untried"])


async def test_the_next_act_waits_for_no_confirmation_of_another_order(asking: Site) -> None:
    """What is confirmed is what was shown: an order that is held since then is not among it."""
    furnish(asking.world)
    assert (await asking.act("confirm-removal", "1", "held", host="alpha"))[0] == 409
    assert (await asking.act("confirm-removal", "held", host="alpha"))[0] == 200
    key = Layout().confirmation_key(HostName("alpha"))
    assert json.loads(asking.world.etcd.data[key]) == ["held"]


BAD: list[tuple[object, str]] = [
    (b"", "no JSON"),
    (b"\xff", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    ([], "a JSON object"),
    ({}, "act is one of"),
    ({"act": "strat"}, "act is 'strat'"),
    ({"act": ["start"]}, "act is one of"),
    ({"act": "start"}, "start needs instances"),
    ({"act": "start", "instances": []}, "nothing to do"),
    ({"act": "start", "instances": "1"}, "instances is a list"),
    ({"act": "start", "instances": ["a/b"]}, "is no id"),
    ({"act": "start", "instances": ["../1"]}, "is no id"),
    ({"act": "start", "instances": [".hosts"]}, "is no id"),
    ({"act": "start", "instances": [1]}, "is no id"),
    ({"act": "start", "instances": ["w\u0435b"]}, "U+0435"),
    ({"act": "start", "instances": [f"i{n}" for n in range(1001)]}, "at most 1000"),
    ({"act": "start", "instance": ["1"]}, "did you mean instances?"),
    ({"act": "stop", "instances": ["1"], "force": True}, "stop takes no 'force'"),
    ({"act": "stop", "instances": ["1"], "now": "yes"}, "now is true or false"),
    ({"act": "set", "instances": ["1"]}, "set needs keys, or unset"),
    ({"act": "set", "instances": ["1"], "keys": []}, "keys is an object"),
    ({"act": "set", "instances": ["1"], "keys": {"ram": 1}}, "every value is a text"),
    ({"act": "set", "instances": ["1"], "keys": {"a b": "1"}}, "cannot be the name of a key"),
    ({"act": "set", "instances": ["1"], "keys": {"/ram": "1"}}, "cannot be the name of a key"),
    ({"act": "set", "instances": ["1"], "keys": {"": "1"}}, "cannot be the name of a key"),
    ({"act": "set", "instances": ["1"], "keys": {"x-" + "a" * 300: "1"}}, "cannot be the name of a key"),
    ({"act": "set", "instances": ["1"], "keys": {"x-\n": "1"}}, "cannot be the name of a key"),
    ({"act": "set", "instances": ["1"], "keys": {"x-a": "\ud800"}}, "half a character"),
    ({"act": "set", "instances": ["1"], "keys": {"ram": "1G"}, "unset": ["ram"]}, "both in keys and in unset"),
    ({"act": "create", "instances": ["1", "2"], "keys": {"ram": "1G"}}, "create makes one"),
    ({"act": "create", "instances": ["1"], "keys": {}}, "create needs keys"),
    ({"act": "move", "instances": ["1"]}, "move needs host"),
    ({"act": "move", "instances": ["1"], "host": ""}, "no host"),
    ({"act": "drain", "host": "a/b"}, "no host"),
    ({"act": "drain", "host": "beta", "mode": "quick"}, "mode is 'quick'"),
    ({"act": "undrain", "host": "beta", "return": "stop"}, "return is live or cold"),
    (b'{"act": "start", "act": "stop", "instances": ["1"]}', "'act' stands there twice"),
    (b'{"act": "set", "instances": ["1"], "keys": {"ram": "1G", "ram": "2G"}}', "'ram' stands there twice"),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=range(len(BAD)))
async def test_an_order_that_cannot_be_understood(asking: Site, body: object, said: str) -> None:
    """400, with what was found and what would be right; nothing is written."""
    furnish(asking.world)
    before = asking.world.etcd.revision
    status, found = await asking.post(body)
    assert status == 400
    assert said in found["error"]
    assert asking.world.etcd.revision == before


async def test_a_large_order_is_not_read(asking: Site) -> None:
    """413, by what was announced or what came."""
    assert (await asking.post(b" " * (1 << 21)))[0] == 413


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_an_order_or_unfit(found: object) -> None:
    """No value ends in another error."""
    for act in (None, *Act):
        body = found if act is None or not isinstance(found, dict) else {**found, "act": act.value}
        with contextlib.suppress(Unfit):
            assert parse_order(json.dumps(body).encode()).act


BEYOND = (
    "both in",
    "half a",
    "cannot be the name",
    "set needs keys",
    "create needs keys",
    "no host",
    "stands there twice",
)
"""What the description of an order does not say."""


@pytest.mark.parametrize("body", [body for body, said in BAD if isinstance(body, dict) and not said.startswith(BEYOND)])
def test_the_description_of_orders_can_say_no(body: object) -> None:
    """It is as strict as the server, but for what a schema cannot say well."""
    with pytest.raises(ValidationError):
        component("Order").validate(body)


def test_the_description_has_every_act() -> None:
    """And no other."""
    described = OPENAPI["components"]["schemas"]["Order"]["oneOf"]
    assert [one["properties"]["act"]["const"] for one in described] == [act.value for act in FIELDS]

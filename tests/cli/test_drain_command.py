"""`drain` and `undrain`: what they write, what they foretell, how they wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.host_wish import HostProgress, Mode
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.offer import PROTOCOL, MoveFacts
from kvmsupervisor.domain.placement import Placement
from tests.cli.conftest import World

MOVES = MoveFacts(protocol=PROTOCOL, address="192.0.2.1:9747", accel="tcg", qemu="7.2.0")


def session(world: World, host: str, **fields: object) -> None:
    value = HostSession(host=host, version="1", url="", boot_id="b", moves=MOVES, memory_mib=8192, guests_mib=4096)
    world.etcd.write(world.layout.session_key(HostName(host)), replace(value, **fields).to_json())  # type: ignore[arg-type]


def machine(world: World, name: str, **keys: str) -> None:
    world.running(name, **keys)
    status = world.etcd.data[world.layout.status_key(name)]  # type: ignore[arg-type]
    told = status.replace(b'"accelerator":null', b'"accelerator":"tcg"').replace(
        b'"machine":null', b'"machine":"pc-q35-7.2"'
    )
    world.etcd.write(world.layout.status_key(name), told)  # type: ignore[arg-type]


def key(world: World, host: str = "alpha") -> str | None:
    found = world.etcd.data.get(world.layout.drain_key(host))
    return None if found is None else found.decode()


def says(world: World, **fields: object) -> None:
    # Of the order that the test gives next.
    of = world.etcd.revision + 2
    told = HostProgress(host="alpha", mode=Mode.LIVE, of=of, since="12:00")
    world.etcd.write(world.layout.drain_fact_key("alpha"), replace(told, **fields).to_json())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "value"), [([], "live"), (["--cold"], "cold"), (["--stop"], "stop")], ids=["live", "cold", "stop"]
)
def test_it_writes_one_key(world: World, options: list[str], value: str) -> None:
    """§6: without HOST it is this host; an earlier order to return is no more."""
    world.host("alpha")
    world.etcd.write(world.layout.return_key("alpha"), "live")
    found = world.run("drain", *options)
    assert (found.exit_code, found.stdout) == (0, f"alpha drains ({value})\n")
    assert key(world) == value
    assert world.layout.return_key("alpha") not in world.etcd.data


def test_a_host_that_is_not_there_is_probably_another(world: World) -> None:
    """A typo must not wait for a host of that name; `--force` drains one that is off."""
    world.host("alpha")
    found = world.run("drain", "alpah")
    assert found.exit_code == 1
    assert "alpah has no session; did you mean alpha?" in found.stderr
    assert key(world, "alpah") is None
    assert world.run("drain", "off", "--force").exit_code == 0
    assert key(world, "off") == "live"
    assert world.run("drain", "a/b").exit_code == 2
    assert world.run("drain", "--cold", "--stop").exit_code == 2


def test_what_would_be(world: World) -> None:
    """§6: each machine, where it would go, or why it cannot; nothing is written; only some go: 1."""
    session(world, "alpha")
    session(world, "beta")
    machine(world, "1", hosts="beta")
    machine(world, "2", hosts="beta", **{"disk/1": "file:data.qcow2 size=1G"})
    machine(world, "3")
    machine(world, "4", hosts="beta", cdrom="empty")
    found = world.run("drain", "--dry-run")
    assert found.exit_code == 1
    lines = dict(line.split(": ", 1) for line in found.stdout.splitlines())
    assert lines["1"] == "goes to beta, while it runs"
    assert "stays: it has files of this host: disk/1 is file:data.qcow2" in lines["2"]
    assert "KVM_DRAIN_ANY is not 1" in lines["3"]
    assert "stays: beta cannot have it while its guest runs" in lines["4"]
    assert key(world) is None
    cold = world.run("drain", "--cold", "--dry-run").stdout
    assert "4: goes to beta, while it runs if it can, else cold" in cold
    assert "2: is shut down: it has files" in world.run("drain", "--stop", "--dry-run").stdout


def test_what_would_be_counts_memory_and_who_drains(world: World) -> None:
    """Each that is foreseen counts before the next one."""
    session(world, "alpha", drain_any=True)
    session(world, "beta", guests_mib=2000)
    session(world, "gamma")
    world.etcd.write(world.layout.drain_key("gamma"), "")
    machine(world, "1")
    machine(world, "2")
    found = world.run("drain", "--dry-run")
    assert "1: goes to beta, while it runs" in found.stdout
    assert "2: stays: " in found.stdout
    assert "MiB of memory free, and it needs 1088 MiB" in found.stdout
    assert "gamma takes nobody in" in found.stdout


def test_an_empty_host_has_nothing_to_tell(world: World) -> None:
    world.host("alpha", "beta")
    found = world.run("drain", "--dry-run")
    assert (found.exit_code, found.stdout) == (0, "nothing runs there\n")


def test_it_waits_until_the_host_is_empty(world: World) -> None:
    """Exit status 0."""
    world.host("alpha")
    says(world, drained="12:30", moved={"1": "beta"})
    found = world.run("drain", "--wait")
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (0, "alpha is empty since 12:30; moved: 1 → beta")


def test_it_waits_until_only_people_can_go_on(world: World) -> None:
    """Exit status 1: each that stays, and why."""
    world.host("alpha")
    says(world, left=("2",), refused={"2": "it has files"})
    found = world.run("drain", "--wait")
    assert found.exit_code == 1
    assert "alpha is not empty" in found.stderr
    assert "2 stays: it has files" in found.stderr


@pytest.mark.parametrize("later", [(), ("2",)], ids=["one is on its way", "one is asked for again"])
def test_it_times_out(world: World, later: tuple[str, ...]) -> None:
    """Exit status 4, and what is left."""
    world.host("alpha")
    moving = {} if later else {"1": "beta"}
    says(world, left=("1", "2") if moving else ("2",), refused={"2": "no room"}, moving=moving, later=later)
    found = world.run("drain", "--wait", "--timeout", "0.2")
    assert found.exit_code == 4
    assert "2 stays: no room" in found.stderr


def test_what_an_earlier_drain_said_is_not_waited_for(world: World) -> None:
    world.host("alpha")
    says(world, drained="11:00", of=1)
    assert world.run("drain", "--wait", "--timeout", "0.2").exit_code == 4


def test_undrain(world: World) -> None:
    """§6: taking the key away is the return to service; what stands elsewhere comes back only when asked for."""
    world.host("alpha")
    world.etcd.write(world.layout.drain_key("alpha"), "live")
    assert world.run("undrain").stdout == "alpha is in service\n"
    assert key(world) is None
    assert world.layout.return_key("alpha") not in world.etcd.data
    assert "did not drain, and takes back" in world.run("undrain", "alpha", "--return").stdout
    assert world.etcd.data[world.layout.return_key("alpha")] == b"live"
    world.run("undrain", "--return", "--cold")
    assert world.etcd.data[world.layout.return_key("alpha")] == b"cold"
    assert world.run("undrain", "--cold").exit_code == 2


def test_hosts_shows_it(world: World) -> None:
    """Capacity, promised memory, state of the drain."""
    session(world, "alpha")
    session(world, "beta")
    machine(world, "1")
    world.etcd.write(world.layout.drain_key("alpha"), "cold")
    says(world, mode=Mode.COLD, of=world.etcd.revision, left=("1",), refused={"1": "it has files"}, moved={"2": "beta"})
    row = world.rows("hosts")["alpha"]
    assert row[0] == "draining"
    assert row[-1] == "drains (cold): 1 left, 1 moved, 1 stays: it has files"
    (alpha, beta) = world.json("hosts")
    assert (alpha["drain"], alpha["guests_mib"], alpha["promised_mib"]) == ("cold", 4096, 1024)
    assert alpha["progress"]["refused"] == {"1": "it has files"}
    assert (beta["drain"], beta["progress"]) == (None, None)
    says(world, mode=Mode.COLD, of=world.etcd.revision - 1, drained="12:30")
    assert world.rows("hosts")["alpha"][0] == "drained"


def test_check_tells_of_keys_that_mean_nothing(world: World) -> None:
    """A typo below `.hosts` is not passed over."""
    world.host("alpha")
    for name, value in (("alpha/drain", "yes"), ("alpha/darin", "live"), ("gone/drain", "live")):
        world.etcd.write(f"/kvm/.hosts/{name}", value)
    said = world.run("check").stdout
    assert "holds 'yes', which counts as live" in said
    assert "/kvm/.hosts/alpha/darin" in said
    assert "gone, which has no session" in said


def test_a_machine_at_home_goes_back_first(world: World) -> None:
    """One that stands here for another host goes to that before all others."""
    for host in ("alpha", "beta", "home"):
        session(world, host)
    machine(world, "1", hosts="beta")
    placement = Placement(host=HostName("alpha"), why="failover", since="", of=world.keys("1", host="home"))
    world.etcd.write("/kvmsupervisor/placements/1", placement.to_json())
    assert "1: goes to home" in world.run("drain", "--dry-run").stdout

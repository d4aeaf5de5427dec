"""`list`, `show`, `check` and `argv`, against hand-made keys."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.placement import Placement
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import SINCE, World

Acting = Callable[[Callable[[str], None]], None]


# --- list ------------------------------------------------------------------------------------------------------


def test_list_has_one_row_for_each_instance_in_the_order_people_count(world: World) -> None:
    """Wishes, statuses and locks each make a row; 9 comes before 10."""
    world.host("alpha")
    world.running("10")
    world.keys("9", host="alpha", ram="1G")
    world.status("8", "alpha", Phase.STOPPING)
    world.lock("7", "alpha")
    assert list(world.rows("list")) == ["7", "8", "9", "10"]


def test_list_shows_what_the_host_observed(world: World) -> None:
    """A row is what its host says, with the age of its phase."""
    world.host("alpha")
    world.running("1")
    world.status("1", "alpha", Phase.RUNNING, "all is well", pid=77, epoch=3, restarts=2, pending=("ram", "mac"))
    assert world.rows("list")["1"] == ["alpha", "running", "3m", "77", "3", "2", "ram,mac", "all is well"]


def test_a_guest_that_does_not_run_is_told_from_one_that_does(world: World) -> None:
    """§4: `running` is what QEMU does; `list`, `show` and `check` tell a guest that is halted, JSON keeps the phase."""
    world.host("alpha")
    for name, run_state in (("1", "running"), ("2", "io-error")):
        world.running(name)
        world.status(name, "alpha", Phase.RUNNING, pid=4321, run_state=run_state)
    rows = world.rows("list")
    assert (rows["1"][1], rows["2"][1]) == ("running", "running (io-error)")
    assert [(one["phase"], one["run_state"]) for one in world.json("list")] == [
        ("running", "running"),
        ("running", "io-error"),
    ]
    assert "running (io-error) for" in world.run("show", "2").output
    assert found(world) == [("2", "/kvmsupervisor/instances/2", "its guest does not run: io-error, by alpha")]


def test_check_finds_a_guest_without_network(world: World) -> None:
    """A NIC that is plugged in nowhere is wrong, although its guest runs."""
    world.host("alpha")
    world.running("1")
    world.status("1", "alpha", Phase.RUNNING, pid=4321, unplugged=("its nic0 (tap3) has no network: tap3 is down",))
    assert found(world) == [
        ("1", "/kvmsupervisor/instances/1", "its nic0 (tap3) has no network: tap3 is down, by alpha")
    ]


def test_list_calls_a_status_without_a_session_unknown(world: World) -> None:
    """A fact outlives its host: without a session nobody knows, whatever the status says."""
    world.host("beta")
    world.running("1", host="alpha")
    row = world.rows("list")["1"]
    assert row[:3] == ["alpha", "unknown", "3m"]
    assert row[-1] == "host alpha has no session (with a session: beta); last seen: running"
    (found,) = world.json("list")
    assert (found["phase"], found["last_phase"]) == ("unknown", "running")


def test_list_says_when_host_names_nobody_and_who_could_be_meant(world: World) -> None:
    """A `host` without a session, and no `host` at all, are said so with the hosts that have one."""
    world.host("beta", "alpha")
    world.keys("1", host="Alpha", ram="1G")
    world.keys("2", ram="1G")
    world.keys("3", host="beta", ram="1G")
    rows = world.rows("list")
    said = "(with a session: alpha, beta; did you mean alpha?)"
    assert rows["1"][-1] == f"`host` names Alpha, which has no session {said}"
    assert rows["2"][-1] == "no host: nothing runs it until `host` is set (with a session: alpha, beta)"
    assert rows["3"][-1] == "host beta has not said anything yet"
    assert {row[0] for row in (rows["1"][1:], rows["3"][1:])} == {"waiting"}


def test_list_says_where_an_instance_is_wanted(world: World) -> None:
    """A status of the host before, and a `host` key that says another: both are in the row."""
    world.host("alpha")
    world.running("1")
    world.keys("1", host="gamma")
    assert world.rows("list")["1"][-1] == (
        "so it is; the `host` key now says gamma, which has no session (with a session: alpha)"
    )


def placed(world: World, on: str = "beta") -> None:
    """A machine of alpha's that runs elsewhere in its place."""
    of = world.keys("1", ram="1G", host="alpha")
    placement = Placement(host=HostName(on), why="failover", since=SINCE, of=of)
    world.etcd.write(world.layout.placement_key(InstanceId("1")), placement.to_json())
    world.lock("1", on)
    world.status("1", on, Phase.RUNNING, "runs in place of alpha", placed_for="alpha", pid=1)


def test_a_placed_instance_is_shown_with_both_hosts(world: World) -> None:
    """Law 10: where it runs, and for whom; that its own host is away is nothing wrong with it."""
    world.host("beta")
    placed(world)
    row = world.rows("list")["1"]
    assert (row[0], row[1], row[-1]) == ("beta (for alpha)", "running", "runs in place of alpha")
    (found,) = world.json("list")
    assert (found["host"], found["placed_for"]) == ("beta", "alpha")
    shown = world.run("show", "1").stdout
    assert shown.startswith("1 on beta (for alpha): running")
    assert "Placement (/kvmsupervisor/placements/1)" in shown
    assert "Session of host beta" in shown
    assert world.json("show", "1")["placement"]["why"] == "failover"
    assert world.run("check").exit_code == 0


def test_a_placement_on_a_host_that_is_gone(world: World) -> None:
    """Law 10: it is the host of the placement that is missed."""
    world.host("gamma")
    placed(world)
    assert "host beta has no session" in world.rows("list")["1"][-1]
    checked = world.run("check")
    assert checked.exit_code == 1
    assert "/kvmsupervisor/placements/1" in checked.stdout
    assert "'beta', which has no session" in checked.stdout


def test_a_placement_that_has_ended_or_is_damaged_says_nothing(world: World) -> None:
    """Law 10: a newer `host` ends it; one that cannot be read is a problem, and `show` says what to do."""
    world.host("alpha", "beta")
    placed(world)
    world.keys("1", host="alpha")
    assert "beta (for" not in world.run("list").stdout
    assert "the `host` key now says alpha" in world.rows("list")["1"][-1]
    assert "ended: `host` was written since" in world.run("show", "1").stdout
    world.etcd.write(world.layout.placement_key(InstanceId("1")), b"?")
    assert "cannot read" in world.run("show", "1").stdout
    checked = world.run("check", "1")
    assert checked.exit_code == 1
    assert "delete that key" in checked.stdout


def test_list_counts_problems_and_wide_names_them(world: World) -> None:
    """A bad wish shows how many problems it has; `-o wide` has their words."""
    world.host("alpha")
    world.keys("4", host="alpha", ram="much", mac="zz")
    assert world.rows("list")["4"][-1].endswith("(2 problems: see check 4)")
    wide = world.run("list", "-o", "wide").stdout
    assert "ram: found 'much'" in wide
    assert "mac: found 'zz'" in wide


def test_list_json_is_an_array_of_status_objects(world: World) -> None:
    """JSON has at least the fields of the contract, whether or not a host has spoken."""
    world.host("alpha")
    world.running("1")
    world.keys("2", host="alpha", ram="1G")
    fields = {"id", "host", "phase", "reason", "since", "pid", "epoch", "restarts", "pending", "problems", "revision"}
    found = world.json("list")
    assert [one["id"] for one in found] == ["1", "2"]
    assert all(fields <= one.keys() for one in found)
    assert found[1]["since"] is None


def test_list_of_nothing_is_an_empty_table_or_array(world: World) -> None:
    """No instances: a heading, or `[]`, and exit code 0."""
    assert world.run("list").stdout.split()[0] == "ID"
    assert world.json("list") == []


def test_list_in_a_pipe_is_plain_and_complete(world: World) -> None:
    """A pipe gets no ANSI, no box characters and no truncation; a value cannot move a cursor."""
    world.host("alpha")
    world.running("1")
    world.status("1", "alpha", Phase.BACKOFF, "x" * 400 + " \x1b[31mred\nnext")
    out = world.run("list").stdout
    assert "x" * 400 in out
    assert out.isascii()
    assert "\x1b" not in out
    assert r"\x1b[31mred\nnext" in out
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize(
    "value",
    [
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"id":1,"host":[],"phase":"running","reason":null,"since":0}',
        b'{"id":"1","host":"a","phase":"running","reason":"r","since":"s","epoch":"many"}',
        b'{"id":"1","host":"a","phase":"running","reason":"\\ud800","since":"s"}',
    ],
)
def test_no_status_value_hurts_the_readers(world: World, value: bytes) -> None:
    """Whatever stands in a status key, list, show and check print something and end."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    world.etcd.write("/kvmsupervisor/instances/1", value)
    world.etcd.write("/kvmsupervisor/hosts/beta", value)
    world.etcd.write("/kvm/1/lock", value)
    world.etcd.write(b"/kvm/\xff/ram", value)
    for args in (["list"], ["list", "-o", "wide"], ["list", "-o", "json"], ["show", "1"], ["show", "1", "-o", "json"]):
        assert world.run(*args).exit_code == 0, args
    assert world.run("check").exit_code == 1


def test_list_reads_locks_that_lie_elsewhere(world: World) -> None:
    """A `LOCK` template outside the wishes' prefix is read, too."""
    world.environ["LOCK"] = "/locks/%i/l"
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    world.etcd.write("/locks/1/l", "garbage")
    assert "garbage" in world.run("show", "1").stdout


# --- show ------------------------------------------------------------------------------------------------------


def test_show_has_keys_status_lock_and_session(world: World) -> None:
    """Everything about one instance is on one page."""
    world.host("alpha")
    world.running("1", mac="52:54:00:00:00:01")
    out = world.run("show", "1").stdout
    assert out.startswith("1 on alpha: running for 3m\n")
    for words in ("mac 52:54:00:00:00:01", "pid 4321", "epoch 1", "url http://alpha:9746", "incarnation i1"):
        assert words in " ".join(out.split()), words


def test_show_json_has_keys_status_lock_and_session(world: World) -> None:
    """The same for programs."""
    world.host("alpha")
    world.running("1")
    found = world.json("show", "1")
    assert found["keys"]["ram"]["value"] == "1G"
    assert found["lock"]["host"] == found["session"]["host"] == found["status"]["host"] == "alpha"


def test_show_of_nothing_is_refused(world: World) -> None:
    """An instance that is not there: exit code 1."""
    result = world.run("show", "1")
    assert result.exit_code == 1
    assert result.stderr == "Error: there is no instance 1\n"


@pytest.mark.parametrize("text", ["..", "a/b", "-x", "", "x" * 64, "é"])
def test_an_id_that_is_none_is_a_usage_error(world: World, text: str) -> None:
    """Ids are checked before etcd is asked: exit code 2."""
    assert world.run("show", "--", text).exit_code == 2


# --- check -----------------------------------------------------------------------------------------------------


def found(world: World, *args: str) -> list[tuple[str, str, str]]:
    """What `check` finds: (instances, key, found)."""
    result = world.run("check", *args)
    findings = world.json("check", *args)
    assert result.exit_code == (1 if findings else 0)
    return [(",".join(one["instances"]), one["key"], one["found"]) for one in findings]


def test_check_of_a_healthy_cluster_finds_nothing(world: World) -> None:
    """Nothing wrong: exit code 0, and it says how much it looked at."""
    world.host("alpha")
    world.running("1")
    assert found(world) == []
    assert world.run("check").stderr == "1 instance checked, nothing wrong\n"


def test_check_names_every_bad_key(world: World) -> None:
    """Each problem of the parser is a finding with key, found and wanted."""
    world.host("alpha")
    world.running("1", ram="much", mac="zz", sipce_port="1")
    assert [key for _, key, _ in found(world)] == ["mac", "ram", "unknown key"]
    assert "did you mean spice_port?" in world.run("check").stdout


def test_check_names_keys_of_no_instance(world: World) -> None:
    """Ids that are none, keys without a key, and facts that cannot be read."""
    for key in (b"/kvm/../ram", b"/kvm/a b/ram", b"/kvm/lonely", b"/kvm/\xff/ram"):
        world.etcd.write(key, "1")
    world.etcd.write("/kvmsupervisor/instances/1", "nonsense")
    world.etcd.write("/kvmsupervisor/hosts/beta", "nonsense")
    keys = [key for _, key, _ in found(world)]
    assert keys == [
        "/kvm/../ram",
        "/kvm/a b/ram",
        "/kvm/lonely",
        r"/kvm/\xff/ram",
        "/kvmsupervisor/instances/1",
        "/kvmsupervisor/hosts/beta",
    ]


def test_check_names_a_host_without_a_session_and_who_has_one(world: World) -> None:
    """`host` is compared exactly: Alpha is not alpha."""
    world.host("alpha", "beta")
    world.keys("1", host="Alpha", ram="1G")
    assert found(world) == [("1", "host", "'Alpha', which has no session")]
    assert "with a session: alpha, beta" in world.run("check").stdout


def test_check_names_wishes_that_the_host_has_not_acted_on(world: World) -> None:
    """A status older than its wish, and none at all, while the host lives."""
    world.host("alpha")
    world.running("1")
    world.keys("1", ram="2G")
    world.keys("2", host="alpha", ram="1G")
    (one, two) = found(world)
    assert one[:2] == ("1", "/kvmsupervisor/instances/1")
    assert two == ("2", "/kvmsupervisor/instances/2", "nothing")


def test_check_looks_twice_before_it_calls_a_host_late(world: World, acting: Acting) -> None:
    """A host that acts within the time to settle is not late."""
    world.host("alpha")
    world.keys("1", host="alpha", ram="1G")
    lists = 0

    def act(call: str) -> None:
        nonlocal lists
        lists += call == "list"
        if lists == 4:
            world.status("1", "alpha", Phase.RUNNING)

    acting(act)
    assert world.run("check").exit_code == 0


def test_check_names_locks_of_dead_hosts_and_unreadable_ones(world: World) -> None:
    """A lock whose holder has no session, and a lock that is none."""
    world.host("alpha")
    world.running("1")
    world.lock("1", "gamma", epoch=4)
    world.running("2")
    world.etcd.write("/kvm/2/lock", "garbage")
    assert found(world) == [
        ("1", "/kvm/1/lock", "held by gamma (epoch 4, running), which has no session"),
        ("2", "/kvm/2/lock", "garbage"),
    ]


def test_check_names_every_nic_and_forward_that_is_used_twice(world: World) -> None:
    """Law: a MAC of any NIC counts, and a port of `forward` on one host; the same port elsewhere is another one."""
    world.host("alpha", "beta")
    user = {"bridge": ":user", "forward": "tcp:2222:22 udp:2222:53"}
    world.running("1", mac="52:54:00:00:00:01", **user)
    world.running("2", **{"mac": "52:54:00:00:00:02", "nic/1/mac": "52-54-00-00-00-01"}, **user)
    world.running("3", "beta", mac="52:54:00:00:00:03", **user)
    said = {(key, text) for _, key, text in found(world)}
    assert ("mac", "52:54:00:00:00:01, used by 1, 2") in said
    assert {("forward", f"{kind} 2222 on host alpha, used by 1, 2") for kind in ("tcp", "udp")} < said
    assert not any("beta" in text for _, text in said)


def test_check_names_what_is_used_twice(world: World) -> None:
    """MACs and images anywhere, SPICE ports on one host; however they are written."""
    world.host("alpha", "beta")
    world.running("1", mac="52:54:00:00:00:0a", rbd="rbd/a", spice_port="5900")
    world.running("2", mac="52-54-00-00-00-0A", rbd="/rbd/a", spice_port="5900")
    world.running("3", host="beta", spice_port="5900")
    assert found(world) == [
        ("1,2", "mac", "52:54:00:00:00:0a, used by 1, 2"),
        ("1,2", "rbd", "rbd/a, used by 1, 2"),
        ("1,2", "spice_port", "5900 on host alpha, used by 1, 2"),
    ]


def test_check_of_one_instance_tells_only_of_it(world: World) -> None:
    """`check ID` leaves the others out, but not what it shares with them."""
    world.host("alpha")
    world.running("1", ram="much")
    world.running("2", rbd="rbd/a")
    world.running("3", rbd="rbd/a")
    assert found(world, "2") == [("2,3", "rbd", "rbd/a, used by 2, 3")]
    assert world.run("check", "99").exit_code == 1


def test_check_names_a_status_that_nobody_will_clean_up(world: World) -> None:
    """A status of an instance without keys, whose host has no session."""
    world.status("1", "gamma", Phase.STOPPING)
    assert [key for _, key, _ in found(world)] == ["/kvmsupervisor/instances/1"]


# --- argv ------------------------------------------------------------------------------------------------------


def test_argv_has_one_option_on_each_line(world: World) -> None:
    """Each option stands with its argument; `--shell` is one line, JSON an array."""
    world.environ["KVM_ACCEL"] = "tcg"
    world.keys("1", ram="64M", extra_flags="-append 'a b' -no-reboot")
    lines = world.run("argv", "1").stdout.splitlines()
    assert lines[0] == "qemu-system-x86_64"
    assert "-m size=65664K" in lines
    assert lines[-2:] == ["-append 'a b'", "-no-reboot"]
    words = world.json("argv", "1")
    assert words[-3:] == ["-append", "a b", "-no-reboot"]
    assert world.run("argv", "1", "--shell").stdout.endswith("-append 'a b' -no-reboot\n")


def test_argv_foresees_what_a_start_makes(world: World, tmp_path: Path) -> None:
    """Law: media, UEFI variables and the key to Ceph are those that the supervisor would give to QEMU."""
    ceph_conf = tmp_path / "ceph.conf"
    ceph_conf.touch()
    # A run directory has a short path, which pytest's folders have not.
    with tempfile.TemporaryDirectory(prefix="kvs") as run_dir:
        world.environ |= {"KVM_ACCEL": "tcg", "KVM_RUN_DIR": run_dir, "CEPH_CONF": str(ceph_conf)}
        world.keys("1", ram="1G", rbd="rbd/vm1", firmware="uefi", **{"cloud-config": "https://example.org/config"})
        words = world.run("argv", "1").stdout
        assert '"image":"vm1.nvram"' in words
        assert '"id":"ceph0","file":"/proc/self/fd/' in words
        assert f"{run_dir}/1/seed.iso" in words

        ignition = Path(run_dir, "1/ignition.json")
        ignition.parent.mkdir()
        ignition.touch()
        words = world.run("argv", "1").stdout
        assert "opt/com.coreos/config,file=/proc/self/fd/" in words
        assert "seed.iso" not in words


def test_argv_of_bad_keys_names_every_problem(world: World) -> None:
    """Nothing is made of keys with problems."""
    world.keys("1", ram="much", mac="zz")
    result = world.run("argv", "1")
    assert result.exit_code == 1
    assert "ram: found 'much'" in result.stderr
    assert "mac: found 'zz'" in result.stderr


def test_argv_says_what_this_host_lacks(world: World) -> None:
    """Sound keys that this host cannot run: exit code 1 and what is missing."""
    world.keys("1", ram="1G", mac="52:54:00:00:00:01")
    result = world.run("argv", "1")
    assert result.exit_code == 1
    assert "BRIDGE_IF" in result.stderr


# --- single mode -----------------------------------------------------------------------------------------------


def test_a_container_in_single_mode_is_its_host(world: World) -> None:
    """Law: what it says counts while it has its session; no supervisor is missed; nothing is found wrong."""
    world.host("alpha/1")
    world.keys("1", host="alpha", ram="1G")
    world.lock("1", "alpha/1")
    world.status("1", "alpha/1", Phase.RUNNING, "runs", pid=7)
    assert world.rows("list")["1"][:2] == ["alpha/1", "running"]
    assert world.rows("list")["1"][-1] == "runs"
    assert world.run("check").exit_code == 0
    world.keys("1", host="beta")
    assert "the `host` key now says beta" in world.rows("list")["1"][-1]


def test_a_container_that_has_ended_stays_ended(world: World) -> None:
    """Law: its session goes with it, and that it stopped stays true; that it runs does not."""
    world.keys("1", host="alpha", ram="1G")
    world.status("1", "alpha/1", Phase.STOPPED, "its container was told to stop")
    world.status("2", "alpha/2", Phase.RUNNING, pid=7)
    rows = world.rows("list")
    assert rows["1"][:2] == ["alpha/1", "stopped"]
    assert rows["2"][:2] == ["alpha/2", "unknown"]

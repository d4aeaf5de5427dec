"""The writing commands: what they write, when they refuse, and that they never write half of it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.domain.history import HistoryName
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World

Acting = Callable[[Callable[[str], None]], None]


def wishes(world: World) -> dict[str, str]:
    """All wishes and locks in etcd."""
    return {key: value.decode() for key, value in world.etcd.data.items() if key.startswith("/kvm/")}


def before_a_write(world: World, *, times: int = 99, **values: str) -> Callable[[str], None]:
    """Somebody who writes keys of instance 1 just before this command does."""
    left = iter(range(times))

    def act(call: str) -> None:
        if call == "txn" and next(left, None) is not None:
            world.keys("1", **values)

    return act


# --- create ----------------------------------------------------------------------------------------------------


def test_create_writes_all_keys_in_one_revision(world: World) -> None:
    """One transaction: a supervisor never sees half an instance."""
    world.host("alpha")
    before = world.etcd.revision
    result = world.run("create", "web1", "host=alpha", "ram=2G", "extra_flags=-append a=b")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "web1 created\n", "")
    assert wishes(world) == {
        "/kvm/web1/host": "alpha",
        "/kvm/web1/ram": "2G",
        "/kvm/web1/extra_flags": "-append a=b",
    }
    assert world.etcd.revision == before + 1


def test_create_refuses_an_id_that_has_any_key(world: World) -> None:
    """Even one key that means nothing: exit code 1, and nothing is written."""
    world.keys("1", description="mine")
    result = world.run("create", "1", "ram=1G")
    assert result.exit_code == 1
    assert "exists already, with the keys description" in result.stderr
    assert wishes(world) == {"/kvm/1/description": "mine"}


def test_create_that_races_another_is_refused(world: World, acting: Acting) -> None:
    """A key that appears between reading and writing: refused, nothing written."""
    acting(before_a_write(world, cpus="2"))
    assert world.run("create", "1", "ram=1G").exit_code == 1
    assert wishes(world) == {"/kvm/1/cpus": "2"}


def test_create_names_every_problem_and_writes_nothing(world: World) -> None:
    """All problems at once; `--force` writes all the same and says what is wrong."""
    result = world.run("create", "1", "mac=zz", "memory=1G")
    assert result.exit_code == 1
    assert "mac: found 'zz'" in result.stderr
    assert "did you mean ram?" in result.stderr
    assert "ram: found nothing" in result.stderr
    assert wishes(world) == {}
    forced = world.run("create", "1", "mac=zz", "ram=1G", "--force")
    assert forced.exit_code == 0
    assert "1: problem: mac: found 'zz'" in forced.stderr
    assert world.value("1", "mac") == "zz"


def test_create_says_when_nothing_will_run_it(world: World) -> None:
    """Without `host`, or with one that has no session."""
    world.host("alpha")
    assert "nothing runs 1 until `host` is set (with a session: alpha)" in world.run("create", "1", "ram=1G").stderr
    assert "which has no session" in world.run("create", "2", "ram=1G", "host=beta", "--force").stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("aplha", "which has no session (with a session: alpha, gamma; did you mean alpha?)"),
        ("alpha.example.org", "did you mean alpha?"),
        ("ALPHA", "did you mean alpha?"),
        ("zeta", "which has no session (with a session: alpha, gamma). --force"),
    ],
)
@pytest.mark.parametrize("command", ["create", "set"])
def test_a_host_that_nobody_has_a_session_under_is_refused(world: World, command: str, typed: str, said: str) -> None:
    """§7: a move to nobody, exit code 1, and nothing is written; `--force` does it, for a host that is down."""
    world.host("alpha", "gamma")
    if command == "set":
        world.running("1")
    before = wishes(world)
    args = (command, "1", "ram=1G", f"host={typed}")
    refused = world.run(*args)
    assert refused.exit_code == 1
    assert said in refused.stderr
    assert wishes(world) == before
    assert world.run(*args, "--force").exit_code == 0
    assert world.value("1", "host") == typed


def test_a_cluster_without_any_supervisor_is_told_so(world: World) -> None:
    """§7: nobody has a session: nothing runs yet, or this is another etcd or prefix than theirs."""
    refused = world.run("create", "1", "ram=1G", "host=alpha")
    assert refused.exit_code == 1
    assert "no host has a session" in refused.stderr
    assert "ETCD_ENDPOINTS" in refused.stderr
    assert wishes(world) == {}


def test_other_keys_may_change_while_its_host_is_away(world: World) -> None:
    """§7: only a `host` that is written now is looked at."""
    world.keys("1", host="alpha", ram="1G")
    assert world.run("set", "1", "ram=2G").exit_code == 0
    assert world.run("set", "1", "host= alpha ").exit_code == 1
    world.host("alpha")
    assert world.run("set", "1", "host= alpha ").exit_code == 0


def test_candidates_that_are_not_there_are_told_of(world: World) -> None:
    """A typo in `hosts` would be noticed on the day of the failover only."""
    world.host("alpha", "beta")
    done = world.run("create", "1", "ram=1G", "host=alpha", "hosts=alpha btea")
    assert done.exit_code == 0
    assert "hosts without a session, which cannot take it over: btea; did you mean beta?" in done.stderr


def test_a_host_that_stops_all_its_guests_is_told_of(world: World) -> None:
    """§4: it is there, and nobody to move to before that ends."""
    session = HostSession(host="beta", version="1", url="", boot_id="b", draining=True)
    world.etcd.write(world.layout.session_key(HostName("beta")), session.to_json())
    done = world.run("create", "1", "ram=1G", "host=beta")
    assert done.exit_code == 0
    assert "beta is stopping all its guests" in done.stderr


def test_a_container_that_waits_for_the_lock_is_somebody(world: World) -> None:
    """§7: in single mode no supervisor has a session under the host's name, but the instance's own container has."""
    world.host("beta/1@4026531836")
    assert world.run("create", "2", "ram=1G", "host=beta").exit_code == 1
    assert world.run("create", "1", "ram=1G", "host=beta").exit_code == 0


def test_create_says_when_an_old_lock_is_there(world: World) -> None:
    """The lock of a predecessor is no reason to refuse, but to say so."""
    world.host("alpha")
    world.lock("1", "alpha")
    result = world.run("create", "1", "ram=1G", "host=alpha")
    assert result.exit_code == 0
    assert "a lock from before is still there, held by alpha" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["1"],
        ["1", "ram"],
        ["1", "=1G"],
        ["1", "a//b=1"],
        ["1", "ram=1G", "ram=2G"],
        ["../1", "ram=1G"],
    ],
)
def test_create_usage_errors(world: World, args: list[str]) -> None:
    """What cannot be a key or an id is exit code 2."""
    assert world.run("create", *args).exit_code == 2
    assert wishes(world) == {}


@pytest.mark.parametrize("command", [["create", "1", "ram=1G", "lock=x"], ["set", "1", "lock=x"]])
def test_the_lock_is_no_wish(world: World, command: list[str]) -> None:
    """A lock belongs to its holder; no command of these writes one."""
    if command[0] == "set":
        world.running("1")
    before = wishes(world)
    assert world.run(*command).exit_code == 1
    assert wishes(world) == before


# --- set -------------------------------------------------------------------------------------------------------


def test_set_changes_and_unsets_in_one_revision(world: World) -> None:
    """Several keys at once, deletions among them."""
    world.host("alpha")
    world.running("1", mac="52:54:00:00:00:01")
    before = world.etcd.revision
    result = world.run("set", "1", "ram=4G", "cpus=2", "--unset", "mac")
    assert (result.exit_code, result.stdout) == (0, "1 changed\n")
    assert (world.value("1", "ram"), world.value("1", "cpus"), world.value("1", "mac")) == ("4G", "2", None)
    assert world.etcd.revision == before + 1


def test_set_refuses_a_new_problem(world: World) -> None:
    """A value that is bad, a required key that goes, a name that nobody knows."""
    world.running("1")
    before = wishes(world)
    for args in (["ram=much"], ["--unset", "ram"], ["sipce_port=1"], ["ram="]):
        result = world.run("set", "1", *args)
        assert result.exit_code == 1, args
        assert "1 was not changed" in result.stderr
    assert wishes(world) == before
    assert world.run("set", "1", "ram=much", "--force").exit_code == 0


def test_set_mends_one_problem_at_a_time(world: World) -> None:
    """An old problem elsewhere does not stand in the way; it is told."""
    world.host("alpha")
    world.running("1", ram="much", mac="zz", foo="1", bar="2")
    for args in (["ram=1G"], ["--unset", "foo"]):
        result = world.run("set", "1", *args)
        assert result.exit_code == 0, result.stderr
        assert "problem: mac: found 'zz'" in result.stderr
    assert world.run("set", "1", "baz=1").exit_code == 1


def test_set_plans_anew_when_somebody_else_was_faster(world: World, acting: Acting) -> None:
    """A change between reading and writing: read again, judge again, write."""
    world.host("alpha")
    world.running("1")
    acting(before_a_write(world, times=1, cpus="3"))
    assert world.run("set", "1", "ram=2G").exit_code == 0
    assert (world.value("1", "ram"), world.value("1", "cpus")) == ("2G", "3")


def test_set_gives_up_when_others_never_stop(world: World, acting: Acting) -> None:
    """Somebody who writes all the time: refused, nothing written."""
    world.running("1")
    acting(before_a_write(world, cpus="3"))
    result = world.run("set", "1", "ram=2G")
    assert result.exit_code == 1
    assert world.value("1", "ram") == "1G"


def test_set_of_nothing_or_nobody(world: World) -> None:
    """No instance: exit code 1. Nothing to change, or both ways at once: 2. Nothing left: 1."""
    assert world.run("set", "1", "ram=1G").exit_code == 1
    world.keys("1", ram="1G")
    assert world.run("set", "1").exit_code == 2
    assert world.run("set", "1", "ram=1G", "--unset", "ram").exit_code == 2
    assert world.run("set", "1", "--unset", "ram", "--force").exit_code == 1


def test_set_on_an_instance_with_very_many_keys(world: World) -> None:
    """More keys than one transaction compares are no reason to fail."""
    world.host("alpha")
    world.running("1", **{f"junk{number}": "x" for number in range(300)})
    assert world.run("set", "1", "ram=2G").exit_code == 0
    assert world.run("delete", "1", "--yes").exit_code == 0
    assert list(wishes(world)) == ["/kvm/1/lock"]


# --- start, stop, restart --------------------------------------------------------------------------------------


def test_start_and_stop_write_power(world: World) -> None:
    """`power` on and off; a start writes it anew even when it stands there: a fresh order."""
    world.host("alpha")
    world.running("1")
    assert world.run("stop", "1").stdout == "1 to be stopped\n"
    assert world.value("1", "power") == "off"
    world.run("start", "1")
    before = world.etcd.revision
    assert world.run("start", "1").exit_code == 0
    assert world.value("1", "power") == "on"
    assert world.etcd.revision == before + 1


def test_restart_asks_with_a_value_never_used_before(world: World) -> None:
    """Each request differs from the last, even in the same second."""
    world.running("1")
    world.run("restart", "1")
    first = world.value("1", "restart_request")
    world.run("restart", "1")
    assert first is not None
    assert first.startswith("2026-03-01T12:00:00Z-")
    assert world.value("1", "restart_request") != first


def test_restart_of_a_machine_that_is_off_is_refused(world: World) -> None:
    """power=off wins: exit code 1, and the way out is named."""
    world.running("1", power="off")
    result = world.run("restart", "1")
    assert result.exit_code == 1
    assert "start it with `start 1`" in result.stderr


@pytest.mark.parametrize("command", ["start", "stop", "restart"])
def test_one_refusal_does_not_keep_the_others_from_it(world: World, command: str) -> None:
    """Several ids: those that exist are acted on; exit code 1 for the one that does not; nothing is revived."""
    world.host("alpha")
    world.running("1")
    world.running("3")
    result = world.run(command, "1", "2", "3")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == "Error: there is no instance 2\n"
    assert not [key for key in wishes(world) if key.startswith("/kvm/2/")]


# --- delete ----------------------------------------------------------------------------------------------------


def test_delete_removes_the_wishes_and_not_the_lock(world: World) -> None:
    """The lock belongs to its holder, who deletes it when QEMU is proven gone. One revision."""
    world.host("alpha")
    world.running("1")
    world.running("10")
    before = world.etcd.revision
    assert world.run("delete", "1", "--yes").stdout == "1 removed\n"
    assert [key for key in wishes(world) if key.startswith("/kvm/1/")] == ["/kvm/1/lock"]
    assert world.value("10", "host") == "alpha"
    assert world.etcd.revision == before + 1


def test_delete_with_locks_elsewhere(world: World) -> None:
    """With `LOCK` outside the prefix every key below the id goes, whatever its name."""
    world.environ["LOCK"] = "/locks/%i"
    world.keys("1", ram="1G", lock="mine")
    world.etcd.write(b"/kvm/1/\xff", "x")
    world.etcd.write("/locks/1", "l")
    assert world.run("delete", "1", "--yes").exit_code == 0
    assert wishes(world) == {}
    assert world.etcd.data["/locks/1"] == b"l"


def test_delete_needs_a_person_or_yes(world: World) -> None:
    """In a pipe nobody can be asked: exit code 2 without --yes, and nothing happens."""
    world.running("1")
    before = wishes(world)
    assert world.run("delete", "1", input_text="y\n").exit_code == 2
    assert wishes(world) == before


def test_delete_of_nobody(world: World) -> None:
    """No such instance: exit code 1; one on its way out is said to be."""
    assert world.run("delete", "1", "--yes").exit_code == 1
    world.host("alpha")
    world.status("1", "alpha", Phase.STOPPING)
    assert "host alpha says stopping" in world.run("delete", "1", "--yes").stderr


# --- confirm-removal -------------------------------------------------------------------------------------------


def test_confirm_removal_names_and_writes_exactly_what_is_held(world: World) -> None:
    """The word holds the ids that the person saw, of this host by default, of another when named."""
    for instance, host, held in (
        ("1", "alpha", True),
        ("2", "alpha", True),
        ("3", "alpha", False),
        ("4", "beta", True),
    ):
        world.status(instance, host, Phase.RUNNING, held=held)
    result = world.run("confirm-removal", "--yes")
    assert (result.exit_code, result.stdout) == (
        0,
        "host alpha holds the removal of 2 instances: 1, 2\nconfirmed\n",
    )
    assert json.loads(world.etcd.data["/kvmsupervisor/confirm-removal/alpha"]) == ["1", "2"]
    assert world.run("confirm-removal", "beta", "--yes").exit_code == 0
    assert json.loads(world.etcd.data["/kvmsupervisor/confirm-removal/beta"]) == ["4"]


def test_confirm_removal_shows_what_was_and_what_is(world: World) -> None:
    """§4: nobody confirms what he cannot see; passwords are not shown."""
    world.running("1", host="beta", ram="2G", spice_password="secret")
    stood = {"host": "alpha", "ram": "1G", "mac": "52:54:00:00:00:01", "spice_password": "(not shown)"}
    world.status("1", "alpha", Phase.RUNNING, held=True, stood=stood)
    shown = world.run("confirm-removal", "--yes").stdout
    assert "1: host was 'alpha', now 'beta'" in shown
    assert "1: ram was '1G', now '2G'" in shown
    assert "1: mac was '52:54:00:00:00:01', now removed" in shown
    assert "1: spice_password was '(not shown)', now differs" in shown
    assert "secret" not in shown


def test_confirm_removal_gives_up_on_a_host_that_others_wait_for(world: World) -> None:
    """Law 11: an operator's word that a host is gone for good; not of one that lives, nor of a mistyped one."""
    world.host("alpha")
    key = world.layout.history_key
    world.etcd.write(key, HistoryName(id="n", number=1, by="alpha", hosts=("alpha", "beta")).to_json())
    assert "beta have not said" in world.run("check").stdout
    for name in ("alpha", "bta", "gamma"):
        assert world.run("confirm-removal", name, "--yes").exit_code != 0
    result = world.run("confirm-removal", "beta", "--yes")
    assert result.exit_code == 0, result
    present = HistoryName.from_json(world.etcd.data[key])
    assert present is not None
    assert (present.id, present.hosts, present.gone) == ("n", ("alpha", "beta"), ("beta",))
    assert world.run("confirm-removal", "beta", "--yes").exit_code == 1


def test_confirm_removal_of_nothing(world: World) -> None:
    """Nothing is held: it says so, exit code 1, and writes nothing."""
    world.running("1")
    result = world.run("confirm-removal", "--yes")
    assert result.exit_code == 1
    assert result.stderr == "Error: host alpha holds no removal: there is nothing to confirm\n"
    assert not [key for key in world.etcd.data if "confirm" in key]


def test_confirm_removal_waits_until_the_host_took_it(world: World, acting: Acting) -> None:
    """`--wait` ends when the host deletes the word; without a host it times out with exit code 4."""
    world.status("1", "alpha", Phase.RUNNING, held=True)
    key = "/kvmsupervisor/confirm-removal/alpha"
    assert world.run("confirm-removal", "--yes", "--wait", "--timeout", "0.05").exit_code == 4
    acting(lambda call: world.etcd.erase(key) if call == "get" else None)
    assert world.run("confirm-removal", "--yes", "--wait").exit_code == 0


def test_keys_with_a_slash_are_keys(world: World) -> None:
    """Further disks and NICs are created, changed and taken away like every other wish."""
    world.host("alpha")
    made = world.run("create", "web1", "host=alpha", "ram=1G", "rbd=rbd/a", "nic/1/mac=52:54:00:00:00:01")
    assert made.exit_code == 0, made.stderr
    assert world.run("set", "web1", "disk/1=rbd/foo").exit_code == 0
    assert world.value("web1", "disk/1") == "rbd/foo"
    assert world.run("set", "web1", "--unset", "disk/1", "--unset", "nic/1/mac").exit_code == 0
    assert world.value("web1", "disk/1") is None
    assert world.value("web1", "nic/1/mac") is None
    assert world.value("web1", "ram") == "1G"
    assert world.etcd._server.history[-1].kv.key == b"/kvm/web1/ram", "a status can tell of a deletion"
    refused = world.run("set", "web1", "disk/99=rbd/foo")
    assert refused.exit_code == 1
    assert "disk/99" in refused.stderr


# --- at once ---------------------------------------------------------------------------------------------------


def test_at_once_is_a_value_of_its_own(world: World) -> None:
    """`stop --now`, `restart --now`, `reset`: keys that etcdctl can write, too; no other key is touched."""
    world.host("alpha")
    world.running("1")
    assert world.run("restart", "1", "--now").exit_code == 0
    assert (world.value("1", "restart_request") or "").startswith("now:2026-03-01T12:00:00Z-")
    assert world.run("reset", "1").stdout == "1 to be reset\n"
    assert (world.value("1", "restart_request") or "").startswith("reset:2026-03-01T12:00:00Z-")
    assert world.run("stop", "1", "--now").exit_code == 0
    assert world.value("1", "power") == "off-now"
    assert world.value("1", "shutdown_timeout") is None
    assert "switched off" in world.run("reset", "1").stderr
    assert world.run("stop", "--all", "--local", "--now").exit_code == 2


def test_a_key_that_is_not_there_is_not_unset_in_silence(world: World) -> None:
    """A typo is refused and named, with nothing written; a known key that is not there is told, and is no error."""
    world.running("1", mac="52:54:00:00:00:01", **{"x-owner": "me"})
    before = world.etcd.revision
    refused = world.run("set", "1", "cpus=2", "--unset", "x-owner", "--unset", "maac")
    assert (refused.exit_code, world.etcd.revision) == (1, before)
    assert refused.stderr == "Error: 1 was not changed: it has no key 'maac'; did you mean mac? (--force ignores it)\n"
    assert world.run("set", "1", "cpus=2", "--unset", "maac", "--force").exit_code == 0
    told = world.run("set", "1", "--unset", "rbd")
    assert (told.exit_code, told.stdout) == (0, "1 changed\n")
    assert "1: `rbd` was not there" in told.stderr


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("set", "1", "host=\u0430lpha"), "U+0430 CYRILLIC SMALL LETTER A"),
        (("set", "1", "ram=\uff12G"), "U+FF12 FULLWIDTH DIGIT TWO"),
        (("set", "1", "r\u0430m=2G"), "U+0430 CYRILLIC SMALL LETTER A"),
        (("set", "1", "host=alpha\u3164"), "U+3164 HANGUL FILLER"),
        (("show", "w\u0435b1"), "U+0435 CYRILLIC SMALL LETTER IE"),
        (("stop", "1\u200b"), "U+200B ZERO WIDTH SPACE"),
    ],
)
def test_what_looks_right_and_is_not_is_named(world: World, args: tuple[str, ...], named: str) -> None:
    """A letter of another script looks as it should: the message has its code point, and nothing is written."""
    world.host("alpha")
    world.running("1")
    before = world.etcd.revision
    result = world.run(*args)
    assert result.exit_code in {1, 2}
    assert f"which holds {named}" in result.stderr
    assert world.etcd.revision == before


def test_a_secret_is_not_told_by_its_letters(world: World) -> None:
    """What is left out of a message is not described either."""
    world.running("1")
    refused = world.run("set", "1", "extra_flags=-object secret,data=\u00fcber,id=k 'open")
    assert refused.exit_code == 1
    assert "U+00FC" not in refused.stderr


def test_a_huge_word_is_not_repeated_whole(world: World) -> None:
    """Whatever was pasted by mistake: the message is short."""
    for args in (("show", "w" * 100_000), ("set", "1", "w" * 100_000), ("set", "1", "a b" * 100_000 + "=1")):
        result = world.run(*args)
        assert result.exit_code == 2
        assert len(result.stderr) < 1000


def test_no_time_is_no_number_of_seconds(world: World) -> None:
    """`nan` is neither below nor above any limit."""
    world.running("1")
    result = world.run("stop", "1", "--wait", "--timeout", "nan")
    assert (result.exit_code, world.value("1", "power")) == (2, None)


@pytest.mark.parametrize("command", ["stop", "start", "restart", "reset", "delete", "show", "set"])
@pytest.mark.parametrize(
    "word",
    ["web", "we", "w", "*b", "web?x", "WEB*", "web[!1]", "web1 ", "web1/", "web1/*", "/kvm/*", "1", "", "WEB1", "."],
)
def test_no_command_takes_a_part_for_the_whole(world: World, command: str, word: str) -> None:
    """Neither a prefix, a pattern of a part, a path nor another case of an id is that id; nothing is written."""
    for name in ("web1", "web10", "web1.x"):
        world.running(name)
    before = world.etcd.revision
    more = {"delete": ["--yes"], "stop": ["--yes"], "set": ["ram=2G"]}.get(command, [])
    assert world.run(command, word, *more).exit_code in {1, 2}
    assert world.etcd.revision == before


@pytest.mark.parametrize("command", ["restart", "reset", "set"])
@pytest.mark.parametrize("word", ["web*", "web1*", "*", "web[1]"])
def test_other_commands_take_no_pattern(world: World, command: str, word: str) -> None:
    """A pattern is for `show`, `delete`, `start` and `stop`, which say or ask what it means; else it is no id."""
    world.running("web1")
    before = world.etcd.revision
    assert world.run(command, word, *(["ram=2G"] if command == "set" else [])).exit_code == 2
    assert world.etcd.revision == before


def test_what_is_asked_is_about_the_whole_id(world: World) -> None:
    """db.customer1 is not called db when somebody is asked whether it shall go, and no other one goes with it."""
    for name in ("db", "db.customer1", "db.customer10"):
        world.running(name)
    result = world.run("delete", "db.customer1", input_text="y\n", asked=True)
    assert "Shut the guest of instance db.customer1 down" in result.stdout
    left = {key.decode() if isinstance(key, bytes) else key for key in world.etcd.data}
    assert not any(key.startswith("/kvm/db.customer1/") and not key.endswith("/lock") for key in left)
    assert {"/kvm/db/host", "/kvm/db.customer10/host"} <= left


def test_names_of_keys_cannot_act_on_a_terminal(world: World) -> None:
    """Who writes keys of one instance may call them anything: messages repeat none as it is, nor all of them."""
    for number in range(10_000):
        world.etcd.write(f"/kvm/1/k{number}", b"x")
    world.etcd.write("/kvm/1/a\x1b[2J\r\n\u202e", b"x")
    for args in (("create", "1", "ram=1G"), ("set", "1", "ram=1G"), ("show", "1"), ("check",), ("list", "-o", "wide")):
        result = world.run(*args)
        said = result.stdout + result.stderr
        assert all(line.isprintable() for line in said.split("\n")), args
        assert len(said) < 10_000, args
    assert "and 9972 more" in world.run("create", "1", "ram=1G").stderr


def test_an_error_is_printed_so_that_it_cannot_act() -> None:
    """Law: whatever a message repeats; its own lines stay lines."""
    assert Refused("one\x1b[2J\n  two\r\u202e").format_message() == "one\\x1b[2J\n  two\\r\\u202e"


def test_a_huge_value_is_refused_by_name(world: World) -> None:
    """Also in a key for people: every host would keep it, and etcd would refuse it without naming the key."""
    world.running("1")
    for args in (("create", "2", "ram=1G"), ("set", "1")):
        result = world.run(*args, f"x-notes={'b' * 65_537}")
        assert result.exit_code == 1
        assert "x-notes: found 65537 bytes; a value has at most 65536 bytes" in result.stderr
        assert len(result.stderr) < 300
    assert world.value("1", "x-notes") is None
    assert world.run("set", "1", f"x-notes={'b' * 65_536}").exit_code == 0


def test_a_local_disk_does_not_go_along(world: World) -> None:
    """Another `host` is refused with the disks that stay behind; --force writes it all the same."""
    world.host("alpha", "beta")
    world.keys("1", host="alpha", ram="1G", **{"disk/0": "file:a.raw"})
    world.status("1", "alpha", Phase.RUNNING, files={"file:a.raw": "alpha"})
    refused = world.run("set", "1", "host=beta")
    assert refused.exit_code == 1
    assert "disk/0 is on alpha" in refused.stderr
    assert world.run("set", "1", "ram=2G").exit_code == 0
    assert world.run("set", "1", "host=beta", "--force").exit_code == 0

"""One host under another name or prefix for one run, in virtual time (law 12).

Whatever one setting says for one run: nothing ends, nothing is deleted, and afterwards all is as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters.clock import boot_id
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.identity import HostIdentity, Mismatch, judge
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.supervisor.identity import Standing
from tests.fakes.qemu import FakeQemu
from tests.supervisor.test_supervisor import ME, Bench

WRONG = {
    "another name": ({"KVM_HOSTNAME": "b"}, "KVM_HOSTNAME=b"),
    "another prefix": ({"KVM_PREFIX": "/vms"}, "KVM_PREFIX=/vms"),
    "other facts": ({"KVM_FACTS_PREFIX": "/elsewhere"}, "KVM_FACTS_PREFIX=/elsewhere"),
    "another lock": ({"LOCK": "/locks/%i"}, "LOCK=/locks/%i"),
    "all of them": (
        {"KVM_HOSTNAME": "b", "KVM_PREFIX": "/vms", "KVM_FACTS_PREFIX": "/elsewhere", "LOCK": "/locks/%i"},
        "KVM_HOSTNAME=b, KVM_PREFIX=/vms, KVM_FACTS_PREFIX=/elsewhere, LOCK=/locks/%i",
    ),
}

LONG_S = 900.0
"""Longer than any deadline and any pause of a supervisor."""

wrong = pytest.mark.parametrize(("settings", "told"), WRONG.values(), ids=WRONG)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.close()


async def two_run(bench: Bench) -> dict[str, FakeQemu]:
    """Two guests run, a third instance is off; the supervisor has stopped."""
    bench.create("off")
    bench.etcd.write("/kvm/off/power", "off")
    await bench.begin()
    return await bench.running("1", "2")


def statuses(bench: Bench) -> dict[str, Status]:
    return {status.id: replace(status, since="") for status in bench.host.http_view.instances()}


def told_of(bench: Bench, names: set[str]) -> dict[bytes | str, bytes]:
    """What etcd holds of these top-level folders."""
    return {key: value for key, value in bench.etcd.data.items() if key.split("/")[1] in names}


@wrong
async def test_one_run_under_other_settings_touches_nothing(bench: Bench, settings: dict[str, str], told: str) -> None:
    """Law 12: nothing ends, nothing starts, nothing is deleted or written elsewhere; it is told, and can be taken back.

    On the last release, another name had every guest killed, and another prefix every record deleted.
    """
    qemus = await two_run(bench)
    before = statuses(bench)
    locks = told_of(bench, {"kvm"})
    await bench.end()
    bench.more = settings
    with capture_logs() as logs:
        await bench.begin(virtual_s=LONG_S)
        bench.create("new")
        bench.create("other", host="b")
        bench.etcd.write("/vms/1/host", "b")
        bench.etcd.write("/vms/1/ram", "64")
        await bench.clock.advance(LONG_S)
    # All goes on, and nothing begins.
    assert bench.of("1", "2") == qemus
    assert len(bench.qemus.all) == 2
    assert [qemu.presses for qemu in qemus.values()] == [[], []]
    assert locks.items() <= bench.etcd.data.items()
    assert all((bench.path / name / "incarnation.json").exists() for name in qemus)
    written = {key.split("/")[1] for key in bench.etcd.data} - {"vms"}
    assert written == {"kvm", "kvmsupervisor"}
    assert not [key for key in bench.etcd.data if key.startswith("/vms") and "lock" in key]
    # It is told everywhere.
    ready, why = bench.host.http_view.ready()
    assert not ready
    assert told in why
    assert "KVM_HOSTNAME=b" not in why or "KVM_HOSTNAME=a" in why
    assert "`kvmsupervisor confirm-identity`" in why
    assert bench.metric("kvmsupervisor_identity_mismatch") == 1.0
    (line,) = [line for line in logs if line["event"] == "identity.mismatch"]
    assert (line["reason"], line["instances"]) == (why, ["1", "2"])
    (host,) = bench.host.http_view.hosts()
    assert (host.host, host.notice) == (ME, why)
    seen = statuses(bench)
    assert {name: (status.phase, status.pid) for name, status in seen.items()} == {
        "1": (Phase.RUNNING, qemus["1"].pid),
        "2": (Phase.RUNNING, qemus["2"].pid),
        "off": (Phase.STOPPED, None),
        "new": (Phase.WAITING, None),
    }
    assert all(told in status.reason for status in seen.values())
    status = Status.from_json(bench.etcd.data["/kvmsupervisor/instances/1"])
    assert status is not None
    assert status.reason == seen["1"].reason
    # The session of the host is kept: nobody takes its guests over.
    assert "/kvmsupervisor/hosts/a" in bench.etcd.data
    await bench.end()
    # And taken back.
    bench.remove("new", "other")
    bench.more = {}
    await bench.begin()
    assert bench.of("1", "2") == qemus
    assert len(bench.qemus.all) == 2
    assert statuses(bench) == before
    assert bench.metric("kvmsupervisor_identity_mismatch") == 0.0
    assert bench.metric("kvmsupervisor_adopted_total") == 2.0
    assert bench.host.http_view.ready()[0]
    assert locks.items() <= bench.etcd.data.items()
    assert not (bench.path / "_identity.json").exists()


async def test_a_host_where_nothing_lives_simply_has_its_new_name(bench: Bench) -> None:
    """Law 12: an empty host that was renamed, or got another prefix, works at once; nothing has to be said."""
    await bench.begin()
    await bench.running("1")
    bench.etcd.write("/kvm/1/power", "off")
    await bench.clock.advance(10.0)
    await bench.end()
    bench.more = {"KVM_HOSTNAME": "b"}
    bench.create("2", host="b")
    await bench.begin(virtual_s=30.0)
    assert bench.phases == {"2": Phase.RUNNING}
    assert bench.host.http_view.ready()[0]
    assert "/kvmsupervisor/hosts/b" in bench.etcd.data


async def test_once_nothing_lives_any_more_the_settings_count(bench: Bench) -> None:
    """Law 12: the last guest of the former identity has ended by itself: nobody is asked any more."""
    qemus = await two_run(bench)
    await bench.end()
    bench.more = {"KVM_HOSTNAME": "b"}
    await bench.begin()
    qemus["1"].shut_down()
    await bench.clock.advance(10.0)
    assert not bench.again
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.pid, status.last_exit) == (Phase.WAITING, None, "guest-shutdown")
    qemus["2"].crash()
    await bench.clock.advance(10.0)
    assert bench.again
    await bench.end()
    await bench.begin()
    assert bench.host.http_view.ready()[0]
    assert len(bench.qemus.all) == 2
    assert not (bench.path / "_identity.json").exists()


async def test_what_ended_while_nobody_watched_is_not_started_under_another_name(bench: Bench) -> None:
    """Law 12: a guard, or the kernel, killed all guests, and the next supervisor has a wrong name for one run.

    It started them, for their locks were of this boot, and `host` named somebody without a session; back under its own
    name nothing could be done without a person.
    """
    qemus = await two_run(bench)
    await bench.end()
    for qemu in qemus.values():
        qemu.crash()
    locks = told_of(bench, {"kvm"})
    bench.more = {"KVM_HOSTNAME": "b"}
    await bench.begin(virtual_s=60.0)
    assert bench.again
    await bench.end()
    await bench.begin(virtual_s=3600.0)
    assert bench.host.http_view.ready()[0]
    assert len(bench.qemus.all) == 2
    assert locks.items() <= bench.etcd.data.items()
    await bench.end()
    bench.more = {}
    await bench.begin(virtual_s=600.0)
    assert {name: bench.phases[name] for name in qemus} == dict.fromkeys(qemus, Phase.RUNNING)
    assert len(bench.qemus.all) == 4


async def test_a_host_that_shuts_down_stops_its_guests_under_any_name(bench: Bench) -> None:
    """Law 12: `stop --all --local` is a person's clear order; it goes by what lives, not by settings."""
    qemus = await two_run(bench)
    await bench.end()
    bench.more = {"KVM_HOSTNAME": "b", "KVM_PREFIX": "/vms"}
    await bench.begin()
    RunDir(bench.path).mark_draining(boot_id())
    bench.supervisor.heed_draining()
    await bench.clock.advance(5.0)
    assert [(len(qemu.presses), qemu.alive) for qemu in qemus.values()] == [(1, False), (1, False)]
    assert not [key for key in bench.etcd.data if key.endswith("/lock")]


def word(bench: Bench) -> None:
    """A person says that what lives goes on under the present settings."""
    settings = bench.settings()
    wanted = HostIdentity.of(settings.hostname, settings.layout)
    standing = Standing(bench.qemus, RunDir(bench.path), wanted=wanted, boot_id=boot_id())
    note = standing.note()
    assert note is not None
    assert note.wanted == wanted
    standing.confirm(note)


async def test_a_renamed_host_goes_on_with_the_same_guests(bench: Bench) -> None:
    """Law 12: the new name in `host`, and a person's word: the lock gets the new name by a swap, the guests go on."""
    qemus = await two_run(bench)
    await bench.end()
    bench.more = {"KVM_HOSTNAME": "b"}
    await bench.begin()
    before = {name: Lock.from_json(bench.etcd.data[f"/kvm/{name}/lock"]) for name in qemus}
    bench.create("1", "2", "off", host="b")
    word(bench)
    await bench.clock.advance(10.0)
    assert bench.again
    await bench.end()
    await bench.begin(virtual_s=60.0)
    assert bench.of("1", "2") == qemus
    assert len(bench.qemus.all) == 2
    for name, lock in before.items():
        assert lock is not None
        assert Lock.from_json(bench.etcd.data[f"/kvm/{name}/lock"]) == replace(lock, host=HostName("b"))
    assert bench.host.http_view.ready()[0]
    assert {name: (status.host, status.phase) for name, status in statuses(bench).items()} == {
        "1": ("b", Phase.RUNNING), "2": ("b", Phase.RUNNING), "off": ("b", Phase.STOPPED),
    }  # fmt: skip
    # It lasts: the next one asks nobody.
    await bench.end()
    await bench.begin()
    assert bench.host.http_view.ready()[0]
    bench.etcd.write("/kvm/1/power", "off")
    await bench.clock.advance(10.0)
    assert bench.of("1", "2").keys() == {"2"}
    assert "/kvm/1/lock" not in bench.etcd.data


async def test_keys_that_moved_to_another_prefix(bench: Bench) -> None:
    """Law 12: the same keys below another prefix, and a person's word: the guests go on, with locks there."""
    qemus = await two_run(bench)
    await bench.end()
    bench.more = {"KVM_PREFIX": "/vms"}
    await bench.begin()
    for key, value in tuple(bench.etcd.data.items()):
        if key.startswith("/kvm/") and not key.endswith("/lock"):
            bench.etcd.write(key.replace("/kvm/", "/vms/"), value)
    word(bench)
    await bench.clock.advance(10.0)
    await bench.end()
    await bench.begin(virtual_s=60.0)
    assert bench.of("1", "2") == qemus
    assert [qemu.presses for qemu in qemus.values()] == [[], []]
    assert bench.phases == {"1": Phase.RUNNING, "2": Phase.RUNNING, "off": Phase.STOPPED}
    lock = Lock.from_json(bench.etcd.data["/vms/1/lock"])
    assert lock is not None
    assert lock.pid == qemus["1"].pid


async def test_a_word_on_something_else_counts_for_nothing(bench: Bench) -> None:
    """Law 12: what was confirmed is what the settings said then; with yet another name it is asked again."""
    qemus = await two_run(bench)
    await bench.end()
    bench.more = {"KVM_HOSTNAME": "b"}
    await bench.begin()
    await bench.end()
    word(bench)
    bench.more = {"KVM_HOSTNAME": "c"}
    await bench.begin()
    assert not bench.host.http_view.ready()[0]
    assert bench.of("1", "2") == qemus
    await bench.clock.advance(60.0)
    assert not bench.again


def rewrite(bench: Bench, name: str, change: Callable[[dict[str, object]], object]) -> None:
    path = bench.path / name / "incarnation.json"
    found = json.loads(path.read_bytes())
    change(found)
    path.write_text(json.dumps(found))


@wrong
async def test_records_of_an_earlier_release(bench: Bench, settings: dict[str, str], told: str) -> None:
    """An upgrade with settings that changed at once: the session's file and the processes tell who this was."""
    qemus = await two_run(bench)
    await bench.end()
    for name in qemus:
        rewrite(bench, name, lambda found: found.pop("under"))
    bench.more = settings
    await bench.begin(virtual_s=60.0)
    assert bench.of("1", "2") == qemus
    assert [qemu.presses for qemu in qemus.values()] == [[], []]
    # Where locks lie is on no record of an earlier release, and nothing else differs.
    only_lock = settings.keys() == {"LOCK"}
    assert bench.host.http_view.ready()[0] is only_lock
    await bench.end()
    bench.more = {}
    await bench.begin(virtual_s=60.0)
    assert bench.of("1", "2") == qemus
    assert [qemu.presses for qemu in qemus.values()] == [[], []]


async def test_an_upgrade_asks_nobody(bench: Bench) -> None:
    """Records of an earlier release, and settings that did not change: adopted, and put on record under those."""
    qemus = await two_run(bench)
    await bench.end()
    for name in qemus:
        rewrite(bench, name, lambda found: found.pop("under"))
    await bench.begin(virtual_s=60.0)
    assert bench.host.http_view.ready()[0]
    assert bench.of("1", "2") == qemus
    record = RunDir(bench.path).instance(InstanceId("1")).read_incarnation()
    assert record is not None
    assert record.under == HostIdentity.of(HostName(ME), Layout())


async def test_one_of_another_identity_among_ours(bench: Bench) -> None:
    """Law 12: one process that was started under other settings is left alone, and told; the others go on."""
    qemus = await two_run(bench)
    await bench.end()
    elsewhere = {"host": ME, "prefix": "/vms", "facts": "/vmssupervisor", "lock": "/vms/%i/lock"}
    rewrite(bench, "2", lambda found: found.update(under=elsewhere))
    await bench.begin(virtual_s=600.0)
    assert bench.host.http_view.ready()[0]
    assert bench.of("1", "2") == qemus
    status = bench.status("2")
    assert status is not None
    assert (status.phase, status.pid) == (Phase.RUNNING, qemus["2"].pid)
    assert "was started under KVM_PREFIX=/vms" in status.reason
    bench.etcd.write("/kvm/2/power", "off")
    bench.etcd.write("/kvm/1/power", "off")
    await bench.clock.advance(600.0)
    assert bench.of("1", "2") == {"2": qemus["2"]}
    # Its end is the end of that.
    qemus["2"].crash()
    bench.etcd.write("/kvm/2/power", "on")
    await bench.clock.advance(600.0)
    assert bench.of("1", "2").keys() == {"2"}


async def test_renamed_and_without_its_records(bench: Bench) -> None:
    """Law 12: another name and an empty run directory at once, the keys with the new name: no second QEMU.

    So does a container that has neither a name nor a run directory of its host's (kubernetes#13860, nomad#9512).
    """
    qemus = await two_run(bench)
    await bench.end()
    for name in qemus:
        shutil.rmtree(bench.path / name)
    (bench.path / "_session.json").unlink()
    bench.more = {"KVM_HOSTNAME": "b"}
    bench.create("1", "2", host="b")
    await bench.begin(virtual_s=600.0)
    assert bench.of("1", "2") == qemus
    assert len(bench.qemus.all) == 2
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.pid) == (Phase.WAITING, qemus["1"].pid)
    assert f"its record was kept in {bench.path}/1" in status.reason
    qemus["1"].crash()
    await bench.clock.advance(600.0)
    assert len(bench.of("1")) == 1


# --- records that cannot be read ------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def of_a_newer_release(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 2}))


def unreadable(path: Path) -> None:
    path.rename(path.with_suffix(".aside"))
    path.mkdir()


@pytest.mark.parametrize("file", ["incarnation.json", "memory.json"])
@pytest.mark.parametrize("spoilt", [spoil, of_a_newer_release, unreadable])
async def test_what_cannot_be_read_is_told(bench: Bench, spoilt: Callable[[Path], None], file: str) -> None:
    """A record that cannot be read: its QEMU is listed, with its pid and the way out; nothing is done to it.

    On the last release its instance was in no list, no status and no metric.
    """
    qemus = await two_run(bench)
    await bench.end()
    path = bench.path / "1" / file
    content = path.read_bytes()
    spoilt(path)
    with capture_logs() as logs:
        await bench.begin(virtual_s=600.0)
    (line,) = [line for line in logs if line["event"] == "instance.unreadable"]
    assert line["instance"] == "1"
    assert bench.of("1", "2") == qemus
    assert len(bench.qemus.all) == 2
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.pid) == (Phase.RUNNING, qemus["1"].pid)
    assert str(path) in status.reason
    assert f"QEMU {qemus['1'].pid} runs on" in status.reason
    assert bench.metric('kvmsupervisor_instance_phase{host="a",instance="1",phase="running"}') == 1.0
    published = Status.from_json(bench.etcd.data["/kvmsupervisor/instances/1"])
    assert published is not None
    assert (published.reason, published.pid) == (status.reason, status.pid)
    # Whatever is asked for, it is not touched.
    bench.etcd.write("/kvm/1/power", "off")
    bench.etcd.write("/kvm/2/power", "off")
    await bench.clock.advance(600.0)
    assert bench.of("1", "2") == {"1": qemus["1"]}
    # Whoever mends it needs not even start the supervisor again.
    bench.etcd.write("/kvm/1/power", "on")
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)
    await bench.clock.advance(30.0)
    assert bench.of("1", "2") == {"1": qemus["1"]}
    assert bench.metric("kvmsupervisor_adopted_total") == 2.0
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.reason) == (Phase.RUNNING, "runs")


async def test_what_could_not_be_read_and_is_gone_is_not_said_to_live(bench: Bench) -> None:
    """A person has ended it, and it is to run elsewhere: its status, which has no incarnation, is taken back.

    Otherwise its next host waits for this one for ever (simulation, seed 3206).
    """
    qemus = await two_run(bench)
    await bench.end()
    spoil(bench.path / "1" / "incarnation.json")
    await bench.begin(virtual_s=60.0)
    told = Status.from_json(bench.etcd.data["/kvmsupervisor/instances/1"])
    assert told is not None
    assert (told.pid, told.incarnation) == (qemus["1"].pid, None)
    await bench.end()
    bench.there("b")
    bench.etcd.write("/kvm/1/host", "b")
    bench.etcd.erase("/kvm/1/lock")
    (bench.path / "1" / "incarnation.json").unlink()
    await bench.begin(virtual_s=60.0)
    assert bench.etcd.data["/kvmsupervisor/instances/1"] == told.to_json()
    await bench.end()
    qemus["1"].crash()
    await bench.begin(virtual_s=60.0)
    told = Status.from_json(bench.etcd.data["/kvmsupervisor/instances/1"])
    assert told is not None
    assert (told.phase, told.pid) == (Phase.STOPPED, None)
    assert bench.of("1", "2") == {"2": qemus["2"]}


async def test_a_folder_that_was_copied(bench: Bench) -> None:
    """A record of another instance is none of this one: two loops would have one QEMU."""
    qemus = await two_run(bench)
    await bench.end()
    shutil.copytree(bench.path / "1", bench.path / "3", ignore=shutil.ignore_patterns("*.sock"))
    bench.create("3")
    await bench.begin(virtual_s=60.0)
    assert bench.of("1", "2", "3") == qemus
    status = bench.status("3")
    assert status is not None
    assert (status.phase, status.pid) == (Phase.WAITING, None)
    assert "incarnation.json: it is the record of instance 1" in status.reason


async def test_a_run_directory_by_another_path(bench: Bench) -> None:
    """/var/run is /run: the QEMU of a record that cannot be read is found all the same."""
    qemus = await two_run(bench)
    await bench.end()
    spoil(bench.path / "1" / "incarnation.json")
    link = f"{bench.path}l"
    os.symlink(bench.path, link)  # noqa: PTH211 - in memory
    try:
        bench.more = {"KVM_RUN_DIR": link}
        await bench.begin(virtual_s=60.0)
        assert bench.of("1", "2") == qemus
        status = bench.status("1")
        assert status is not None
        assert status.pid == qemus["1"].pid
    finally:
        os.unlink(link)  # noqa: PTH108 - in memory


@pytest.mark.parametrize("release", ["this one", "an earlier one"])
async def test_the_qemu_of_a_record_is_sought(bench: Bench, release: str) -> None:
    """By the folder in its environment; one of an earlier release by the files that it opened there."""
    qemus = await two_run(bench)
    qemu = qemus["1"]
    if release == "an earlier one":
        del qemu.environment["KVMSUPERVISOR_FOLDER"]
    assert process_identity.seek(bench.qemus, bench.path / "1") == (qemu.pid, qemu.starttime)
    assert process_identity.seek(bench.qemus, bench.path / "3") is None
    assert process_identity.seek(bench.qemus, Path("/elsewhere/1")) is None


async def test_what_cannot_be_read_and_has_ended(bench: Bench) -> None:
    """Nothing is started beside a record that nobody understands, until it is gone; then the instance goes on."""
    qemus = await two_run(bench)
    await bench.end()
    path = bench.path / "1" / "incarnation.json"
    spoil(path)
    await bench.begin()
    qemus["1"].crash()
    await bench.clock.advance(600.0)
    status = bench.status("1")
    assert status is not None
    assert (status.phase, status.pid) == (Phase.WAITING, None)
    assert "no QEMU is found for it" in status.reason
    assert "delete the file" in status.reason
    path.unlink()
    await bench.clock.advance(60.0)
    assert len(bench.of("1")) == 1


async def test_an_unreadable_record_tells_of_another_identity_too(bench: Bench) -> None:
    """Law 12: all that lives has a damaged record, and the prefix is another for one run: nothing is touched."""
    qemus = await two_run(bench)
    await bench.end()
    for name in qemus:
        spoil(bench.path / name / "incarnation.json")
    bench.more = {"KVM_PREFIX": "/vms"}
    await bench.begin(virtual_s=60.0)
    assert not bench.host.http_view.ready()[0]
    assert bench.of("1", "2") == qemus


# --- the judgement --------------------------------------------------------------------------------------------


def identity(host: str = "a", prefix: str = "/kvm", **more: str) -> HostIdentity:
    layout = {"facts": f"{prefix}supervisor", "lock": f"{prefix}/%i/lock"} | more
    return HostIdentity(host=HostName(host), prefix=prefix, **layout)


A, B, C = identity(), identity("b"), identity("c")


@pytest.mark.parametrize(
    ("wanted", "living", "found"),
    [
        (A, [], A), (A, [A], A), (A, [B, B, A], A), (A, [B], B), (A, [C, B, B], B), (A, [C, B], C),
    ],
)  # fmt: skip
def test_who_this_host_is(wanted: HostIdentity, living: list[HostIdentity], found: HostIdentity) -> None:
    """The settings count where nothing lives, or anything of theirs; otherwise what most was started under."""
    lives = [(InstanceId(str(number)), one) for number, one in enumerate(living)]
    chosen, mismatch = judge(wanted, lives)
    assert chosen == found
    assert (mismatch is None) is (chosen == wanted)
    if mismatch is not None:
        assert mismatch == Mismatch(
            recorded=found, wanted=wanted, living=tuple(name for name, one in lives if one == found)
        )


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (A, A, ""),
        (A, B, "KVM_HOSTNAME=a"),
        (identity(prefix="/vms"), A, "KVM_PREFIX=/vms"),
        (identity(facts="/f"), A, "KVM_FACTS_PREFIX=/f"),
        (A, identity(facts="/f"), "KVM_FACTS_PREFIX="),
        (identity(lock="/l/%i"), B, "KVM_HOSTNAME=a, LOCK=/l/%i"),
    ],
)
def test_it_is_told_as_people_write_it(one: HostIdentity, other: HostIdentity, told: str) -> None:
    """Settings by name; what follows from the prefix by default is not named."""
    assert one.unlike(other) == told

"""`snapshot`: snapshots of instances, listed, taken, taken away and rolled back to, by their keys."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Op, Put, Store, Target
from kvmsupervisor.cli.choice import WORD, Word, chosen
from kvmsupervisor.cli.common import (
    INSTANCE,
    Tools,
    complete,
    output_option,
    pass_tools,
    wait_options,
    with_store,
)
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import Cell, Column, age, echo_json, echo_table, printable
from kvmsupervisor.cli.unknown import TellingGroup
from kvmsupervisor.cli.waiting import Goal, Sighting, Verdict
from kvmsupervisor.cli.write_commands import act, confirm, need_an_answer, yes_option
from kvmsupervisor.cluster.acts import instances
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster, read_instance
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.local_disk import DiskFormat
from kvmsupervisor.domain.snapshots import DELETE, KEY, ROLLBACK, Snap, is_deleted, rollback_request, snapshot_name
from kvmsupervisor.domain.spec import Power, Spec
from kvmsupervisor.domain.status import Phase, Status
from kvmsupervisor.domain.values import Unfit, some

COLUMNS = (
    Column(title="ID"),
    Column(title="NAME"),
    Column(title="AGE", right=True),
    Column(title="SIZE", right=True),
    Column(title="STATE"),
    Column(title="DISKS", spare=True),
    Column(title="NOTE", long=True),
)

NAMED = 20
"""Snapshots that a message names; the others are counted."""


class SnapshotType(click.ParamType):  # type: ignore[type-arg]
    """The name of a snapshot; completion asks etcd for those of the instance before it."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check that it can be one."""
        try:
            return snapshot_name(str(value))
        except Unfit as unfit:
            self.fail(f"{str(value)!r} is no name: {unfit}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the snapshots that the instance has."""
        instance = ctx.params.get("instance")
        if instance is None:
            return []

        async def work(store: Store, settings: Settings) -> list[str]:
            found, _ = await read_instance(store, settings.layout, instance)
            return sorted(_known(found))

        return [CompletionItem(name) for name in complete(ctx, work) if name.startswith(incomplete)]


SNAPSHOT = SnapshotType()


@click.group(cls=TellingGroup)
def snapshot() -> None:
    """Take, list and delete snapshots of instances, or roll one back: all of its disks at one instant."""


@snapshot.command("list")
@click.argument("words", type=WORD, metavar="[ID]...", nargs=-1)
@output_option
@pass_tools
def list_command(tools: Tools, words: Sequence[Word], output: str) -> None:
    """List the snapshots: how old and how large they are, and whether their file systems are clean.

    SIZE is what the disks had in all at that instant, not what the snapshot takes. STATE says `frozen` or `off` where
    the file systems are clean, `paused` or `at once` where they are as after a power cut.
    """

    async def read(store: Store, settings: Settings) -> Cluster:
        return await read_cluster(store, settings.layout)

    cluster = with_store(tools, read)
    there = cluster.instances.values()
    ids = chosen(words, there) if words else [one.id for one in there]
    rows = [row for one in ids for row in _rows(cluster.instances[one])]
    if output == "json":
        echo_json(rows)
        return
    shown = [index for index, column in enumerate(COLUMNS) if output == "wide" or column.title != "DISKS"]
    cells = [_cells(row, tools) for row in rows]
    echo_table([COLUMNS[index] for index in shown], [[row[index] for index in shown] for row in cells])


def _rows(instance: Instance) -> list[dict[str, Any]]:
    """Its snapshots, those that are still to be taken included."""
    known, wished = _known(instance), {wish.name: wish.delete for wish in instance.wish.snapshots}
    rows = []
    for name in sorted({*known, *(name for name, delete in wished.items() if not delete)}):
        snap = known.get(name)
        raw = instance.keys.get(f"{KEY}{name}".encode())
        text = "" if raw is None else raw.value.decode("utf-8", "replace").strip()
        state = "to be taken" if snap is None else "being deleted" if wished.get(name) else snap.how
        rows.append(
            {
                "id": instance.id,
                "name": name,
                "at": None if snap is None else snap.at or None,
                "size": None if snap is None else snap.size,
                "state": state,
                "consistent": None if snap is None else snap.is_consistent,
                "why": None if snap is None else snap.why,
                "disks": [] if snap is None else list(snap.disks),
                "note": None if wished.get(name) or not text else text,
                "wished": name in wished,
            }
        )
    return rows


def _cells(row: Mapping[str, Any], tools: Tools) -> list[Cell]:
    size = "" if row["size"] is None else _size(row["size"])
    return [
        Cell(row["id"]),
        Cell(printable(row["name"])),
        Cell(age(row["at"], tools.now()) if row["at"] else "-"),
        Cell(size or "-"),
        Cell(printable(row["state"]), "green" if row["consistent"] else "yellow"),
        Cell(printable(", ".join(row["disks"]) or "-")),
        Cell(printable(row["note"] or "-")),
    ]


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


@snapshot.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("name", type=SNAPSHOT)
@click.option("--note", "text", default="-", metavar="TEXT", help="What it is for; people read it.")
@wait_options
@pass_tools
def create(tools: Tools, *, instance: InstanceId, name: str, text: str, wait: bool, timeout_s: float) -> None:
    """Have a snapshot taken of all disks of an instance, at one instant.

    Of a machine that runs, its guest's agent freezes the file systems where it answers; otherwise they are as after a
    power cut. The key `snapshot/NAME` asks for it; deleting that key does not delete the snapshot.

    Example: kvmsupervisor snapshot create web1 before-upgrade --note 'Debian 13' --wait
    """
    try:
        is_order = is_deleted(text.strip())
    except Unfit as unfit:
        raise click.BadParameter(f"{unfit}.", param_hint="--note") from unfit
    if is_order:
        raise click.BadParameter(f"`{DELETE}` is what deletes a snapshot; give another note.", param_hint="--note")

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        def plan(found: Instance, _: Cluster) -> Sequence[Op]:
            if name in _known(found):
                raise Refused(f"{instance} has a snapshot {name} already")
            if found.wish.spec is not None:
                refuse_what_cannot_be(instance, found.wish.spec)
            return [
                Put(settings.layout.wish_key(instance, f"{KEY}{name}"), (text.strip() or "-").encode()),
                *_swept(settings.layout, found, but=name),
            ]

        return await instances.rewrite(store, settings.layout, instance, plan, [f"{KEY}{name}"])

    act(tools, [instance], action, f"{name} to be taken", _until_taken(name), wait=wait, timeout_s=timeout_s)


@snapshot.command("delete")
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("name", type=SNAPSHOT)
@wait_options
@pass_tools
def delete_command(tools: Tools, *, instance: InstanceId, name: str, wait: bool, timeout_s: float) -> None:
    """Have a snapshot of an instance taken away from all disks. What the disks hold now stays.

    This writes `delete` into the key `snapshot/NAME`; with --wait that key is deleted, too, once the snapshot is gone.
    A snapshot with clones stays, and the reason of the instance says so.
    """

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        def plan(found: Instance, _: Cluster) -> Sequence[Op]:
            key = settings.layout.wish_key(instance, f"{KEY}{name}")
            _refuse_unknown(found, name)
            return [Put(key, DELETE.encode()), *_swept(settings.layout, found, but=name)]

        return await instances.rewrite(store, settings.layout, instance, plan, [f"{KEY}{name}"])

    act(tools, [instance], action, f"{name} to be deleted", _until_deleted(name), wait=wait, timeout_s=timeout_s)
    if wait:

        async def sweep(store: Store, settings: Settings) -> None:
            found, _ = await read_instance(store, settings.layout, instance)
            for op in _swept(settings.layout, found):
                raw = found.keys[op.key.rpartition(f"/{instance}/")[2].encode()]
                await store.txn([Compare(op.key, Target.MOD_REVISION, raw.mod_revision)], [op])

        with_store(tools, sweep)


@snapshot.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("name", type=SNAPSHOT)
@yes_option
@wait_options
@pass_tools
def rollback(tools: Tools, *, instance: InstanceId, name: str, yes: bool, wait: bool, timeout_s: float) -> None:
    """Give all disks of an instance that is off the content and the size that they had in a snapshot.

    What was written since is lost, unless a later snapshot has it: those stay. The command asks first; without a
    terminal, --yes is needed. The instance stays off: `start` runs it.

    Example: kvmsupervisor snapshot rollback web1 before-upgrade --wait
    """
    need_an_answer(yes=yes)
    confirm(f"Roll the disks of instance {instance} back to {name}, and lose what was written since?", yes=yes)
    request = f"{name}:{tools.now():%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(4)}"
    assert rollback_request(request) == name

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        def plan(found: Instance, _: Cluster) -> Sequence[Op]:
            _refuse_unknown(found, name)
            status = found.status
            if found.wish.power is not Power.OFF or (status is not None and status.phase is Phase.RUNNING):
                raise Refused(f"{instance} is not off: shut it down first, by `stop {instance} --wait`")
            return [Put(settings.layout.wish_key(instance, ROLLBACK), request.encode())]

        return await instances.rewrite(store, settings.layout, instance, plan, [ROLLBACK, "power"])

    done = f"to be rolled back to {name}"
    act(tools, [instance], action, done, lambda _: _until_rolled_back(request, name), wait=wait, timeout_s=timeout_s)


# --- what is there ----------------------------------------------------------------------------------------------


def _known(instance: Instance) -> dict[str, Snap]:
    return {} if instance.status is None else {snap.name: snap for snap in instance.status.snapshots}


def _refuse_unknown(found: Instance, name: str) -> None:
    """Refuse a snapshot that is not there.

    Raises:
        Refused: neither a status nor a key tells of it.
    """
    there = {*_known(found), *(wish.name for wish in found.wish.snapshots)}
    if name not in there:
        have = some(sorted(there), NAMED) if there else "none"
        raise Refused(f"{found.id} has no snapshot {name}; it has {have}")


def refuse_what_cannot_be(instance: InstanceId, spec: Spec) -> None:
    """Refuse a snapshot of disks that keep none.

    Raises:
        Refused: a disk is a .raw file, or there is no disk to snapshot.
    """
    raw = [disk.key for disk, file in spec.files if not file.ro and file.format is DiskFormat.RAW]
    if raw:
        raise Refused(
            f"{instance}: no snapshot of {', '.join(raw)}: a .raw file keeps none; with the machine off "
            "`qemu-img convert -O qcow2` makes one of it that does"
        )
    if all(disk.ro for disk in spec.all_disks):
        raise Refused(f"{instance} has no disk that it writes to, so there is nothing to snapshot")


def _swept(layout: Layout, found: Instance, *, but: str = "") -> list[Delete]:
    """Keys that have a snapshot taken away, and that is done."""
    status = found.status
    if status is None:
        return []
    known = _known(found)
    return [
        Delete(layout.wish_key(found.id, f"{KEY}{wish.name}"))
        for wish in found.wish.snapshots
        if wish.delete and wish.name not in known and wish.name != but and status.revision >= wish.revision
    ]


# --- goals ------------------------------------------------------------------------------------------------------


def _until_taken(name: str) -> Any:
    def goal_of(written: Written) -> Goal:
        def judge(sighting: Sighting) -> Verdict:
            snap = _seen(sighting, written, name)
            if snap is None:
                return None
            more = "" if snap.why is None else f": {snap.why}"
            return True, f"{name} taken ({snap.how}{more}), of {', '.join(snap.disks)}"

        return judge

    return goal_of


def _seen(sighting: Sighting, written: Written, name: str) -> Snap | None:
    status = _acted(sighting, written)
    return None if status is None else next((snap for snap in status.snapshots if snap.name == name), None)


def _acted(sighting: Sighting, written: Written) -> Status | None:
    """The status, once its host has read what was written."""
    status = sighting.status
    return status if status is not None and status.revision >= written.revision else None


def _until_deleted(name: str) -> Any:
    def goal_of(written: Written) -> Goal:
        def judge(sighting: Sighting) -> Verdict:
            is_gone = _acted(sighting, written) is not None and _seen(sighting, written, name) is None
            return (True, f"{name} deleted") if is_gone else None

        return judge

    return goal_of


def _until_rolled_back(request: str, name: str) -> Goal:
    def judge(sighting: Sighting) -> Verdict:
        last = None if sighting.status is None else sighting.status.rollback
        is_done = last is not None and last.request == request and last.done and not sighting.locked
        return (True, f"rolled back to {name}") if is_done else None

    return judge

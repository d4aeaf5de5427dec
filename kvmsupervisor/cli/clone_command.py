"""`clone`: an instance whose disks begin as another one's. It writes wishes only; hosts do what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from kvmsupervisor.adapters.etcd.api import Op, Put, Store
from kvmsupervisor.cli import waiting
from kvmsupervisor.cli.common import ASSIGNMENT, INSTANCE, Tools, pass_tools, wait_options
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import note
from kvmsupervisor.cli.snapshot_command import SNAPSHOT, refuse_what_cannot_be
from kvmsupervisor.cli.write_commands import act, force_option, unique
from kvmsupervisor.cluster.acts import instances
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.clones import Clone, Unclonable, clone
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.snapshots import KEY
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.domain.storage import names_of


@click.command("clone")
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("new", type=INSTANCE, metavar="NEW")
@click.argument("assignments", type=ASSIGNMENT, metavar="[KEY=VALUE]...", nargs=-1)
@click.option(
    "--snapshot", "name", type=SNAPSHOT, help="Begin with this snapshot of ID; without it a new one is taken."
)
@click.option(
    "--full", is_flag=True, help="Copy images in Ceph, so that nothing depends on ID's; takes as long as that."
)
@force_option
@wait_options
@pass_tools
def clone_command(
    tools: Tools,
    *,
    instance: InstanceId,
    new: InstanceId,
    assignments: Sequence[tuple[str, str]],
    name: str | None,
    full: bool,
    force: bool,
    wait: bool,
    timeout_s: float,
) -> None:
    """Create instance NEW with disks that begin as those of ID, and otherwise the same keys.

    Images in Ceph become clones of a snapshot of all disks of ID, which may run meanwhile; files become copies on the
    host that has them, while ID is off. NEW gets MAC addresses of its own, no `forward` and no `spice_port`, and its
    guest is a new one to cloud-init. KEY=VALUE wins over what ID has.

    Example: kvmsupervisor clone web1 web2 host=node2 --wait
    """
    given = unique(assignments)
    snapshot = name or f"clone-{new}"[:63]

    async def action(store: Store, settings: Settings, new: InstanceId) -> Written:
        cluster = await read_cluster(store, settings.layout)
        source = cluster.instances.get(instance)
        if source is None or not source.keys:
            raise Refused(f"there is no instance {instance}")
        planned = _plan(source, new, cluster, given=given, snapshot=snapshot, full=full)
        if not force:
            _refuse(source, planned, cluster, name)
        also: list[Op] = []
        if planned.images and name is None:
            also = [Put(settings.layout.wish_key(instance, f"{KEY}{snapshot}"), f"for the clone {new}".encode())]
        written = await instances.create(store, settings.layout, new, planned.keys, force=force, also=also)
        if also:
            stays = "is copied" if full else "has its disks"
            note(f"{new} begins with the snapshot {snapshot} of {instance}, which stays as long as {new} {stays}")
        return written

    goal_of = waiting.until_as_written(tools.heard_of)
    act(tools, [new], action, f"to be made, a clone of {instance}", goal_of, wait=wait, timeout_s=timeout_s)


def _plan(
    source: Instance, new: InstanceId, cluster: Cluster, *, given: Mapping[str, str], snapshot: str, full: bool
) -> Clone:
    spec = source.wish.spec
    if spec is None:
        said = "; ".join(str(problem) for problem in source.wish.problems[:3])
        raise Refused(f"{source.id} is not cloned, as its keys have problems: {said}")
    taken = {
        title
        for one in cluster.instances.values()
        if one.wish.spec is not None and one.id != new
        for title in names_of(one.wish.spec)
    }
    keys = {
        key.decode(errors="replace"): raw.value.decode(errors="replace").strip() for key, raw in source.keys.items()
    }
    try:
        return clone(source.id, new, keys=keys, spec=spec, given=given, snapshot=snapshot, full=full, taken=taken)
    except Unclonable as error:
        raise Refused(f"{new} was not made: {error}") from error


def _refuse(source: Instance, planned: Clone, cluster: Cluster, name: str | None) -> None:
    """Refuse what no host could do.

    Raises:
        Refused: the snapshot is not there or does not have a disk; a file is in use, or on another host.
    """
    status, spec = source.status, source.wish.spec
    assert spec is not None
    if planned.images and name is None:
        refuse_what_cannot_be(source.id, spec)
        if not cluster.takes(source.id, source.wish.runs_on):
            raise Refused(
                f"no snapshot of {source.id} can be taken, as its host {source.wish.runs_on or '(none)'} has no "
                "session: name one that is there, by --snapshot"
            )
    if planned.images and name is not None:
        snap = next((one for one in status.snapshots if one.name == name), None) if status is not None else None
        if snap is None:
            raise Refused(f"{source.id} has no snapshot {name}: `snapshot list {source.id}` shows those that it has")
        if missing := [key for key in planned.images if key not in snap.disks]:
            raise Refused(f"the snapshot {name} of {source.id} does not have {', '.join(missing)}, which came later")
    files = {} if status is None else dict(status.files or {})
    for key, title in planned.files.items():
        where, wanted = files.get(title), planned.keys.get("host")
        if where is not None and wanted != where:
            raise Refused(
                f"{key} of {source.id} is a file of {where}, and a copy of it is made there: give host={where}, or "
                f"{key}='…' (then copy the file to {wanted or 'the other host'} yourself, with {source.id} off)"
            )
        if status is not None and (status.pid is not None or status.phase is Phase.RUNNING):
            raise Refused(
                f"{key} of {source.id} is a file that its QEMU has open, and it is copied while nobody has: shut it "
                f"down first, by `stop {source.id} --wait`"
            )

"""The commands that only read: `list`, `show`, `check`, `argv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli import checks, views
from kvmsupervisor.cli.cluster import Cluster, Instance, as_object, read_cluster, read_instance
from kvmsupervisor.cli.common import HOST, INSTANCE, Tools, output_option, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.filters import LABEL, PHASE, Filters
from kvmsupervisor.cli.output import (
    OutputFormat,
    echo_blocks,
    echo_json,
    echo_table,
    note,
    on_terminal,
    quoted,
)
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.argv import Channels, Identity, Provision, build_argv, host_problems, instance_uuid
from kvmsupervisor.domain.hardware import TapFds
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.secrecy import cleaned_words


@click.command("list")
@click.option("--host", "hosts", type=HOST, multiple=True, help="Only those of this host; may be repeated.")
@click.option("--phase", "phases", type=PHASE, multiple=True, help="Only those in this phase; may be repeated.")
@click.option(
    "-l",
    "--label",
    "labels",
    type=LABEL,
    multiple=True,
    help="Only those with this key for people and this value, such as x-team=shop; of several, all must be so.",
)
@output_option
@pass_tools
def list_command(
    tools: Tools,
    hosts: Sequence[str],
    phases: Sequence[str],
    labels: Sequence[tuple[str, str]],
    output: OutputFormat,
) -> None:
    """List the instances: their hosts, phases and reasons.

    AGE is how long the phase has lasted. The phase is `unknown` when the reporting host has no session. `-o wide` adds
    RAM, the etcd revision that the host acted on, the incarnation, the last exit, the guest's addresses, the
    description and every problem.

    Example: kvmsupervisor list --host alpha --phase running -l x-team=shop
    """
    filters = Filters(hosts=hosts, phases=phases, labels=labels)

    async def work(store: Store, settings: Settings) -> Cluster:
        return await read_cluster(store, settings.layout)

    cluster = with_store(tools, work)
    instances = filters.choose(cluster.instances.values(), cluster)
    if cluster.instances and not instances:
        note(filters.why_nothing(cluster))
    if output == "json":
        echo_json([as_object(instance, cluster) for instance in instances])
        return
    wide = output == "wide"
    now = tools.now()
    rows = [views.list_row(instance, cluster, now, wide=wide) for instance in instances]
    if rows or not on_terminal(sys.stdout):
        echo_table(views.WIDE_COLUMNS if wide else views.LIST_COLUMNS, rows)
    elif not cluster.instances:
        note(f"there are no instances ({cluster.who_has_sessions()}); make one with `create`")


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@output_option
@pass_tools
def show(tools: Tools, instance: InstanceId, output: OutputFormat) -> None:
    """Show everything about one instance: keys, status, guest, lock, its host's session, problems.

    The block "Guest" (addresses, system) is there once the guest's agent has answered. The command asks the host when
    the agent last answered, and waits a second for that.
    """
    found, cluster, settings = _existing(tools, instance)
    seen = _agent_seen(tools, found, cluster)
    if output == "json":
        echo_json(views.show_object(found, cluster, seen))
    else:
        echo_blocks(views.show_blocks(found, cluster, settings.layout, tools.now(), seen))


def _agent_seen(tools: Tools, instance: Instance, cluster: Cluster) -> str | None:
    """When the guest's agent last answered, if there is one and its host can be asked."""
    status = instance.status
    session = cluster.sessions.get(status.host) if status is not None else None
    if status is None or status.agent is None or session is None:
        return None
    return tools.agent_seen(session.url, instance.id)


@click.command()
@click.argument("instance", type=INSTANCE, metavar="[ID]", required=False)
@output_option
@pass_tools
def check(tools: Tools, instance: InstanceId | None, output: OutputFormat) -> None:
    """Find all that is wrong with ID, or with all instances.

    The command names: every bad value and unknown key; keys that belong to no valid id; a `host` that has no session;
    wishes that their host has not acted on; instances that should run and do not, since when and why; shutdowns that
    last too long; locks that cannot be read, or whose holder has no session; MACs, RBD images and SPICE ports that two
    instances use. The exit code is 1 if anything was found.
    """

    async def work(store: Store, settings: Settings) -> tuple[Cluster, list[checks.Finding]]:
        patience = checks.Patience(
            settle_s=tools.settle_s, shutdown_timeout_s=settings.shutdown_timeout_s, now=tools.now()
        )
        return await checks.check_all(store, settings.layout, patience)

    cluster, findings = with_store(tools, work)
    if instance is not None:
        if instance not in cluster.instances:
            raise Refused(f"there is no instance {instance}")
        findings = checks.concerning(findings, instance)
    if output == "json":
        echo_json([finding.to_object() for finding in findings])
    elif findings:
        echo_table(views.FINDING_COLUMNS, [views.finding_row(finding) for finding in findings])
    else:
        count = 1 if instance is not None else len(cluster.instances)
        note(f"{count} instance{'' if count == 1 else 's'} checked, nothing wrong")
    click.get_current_context().exit(1 if findings else 0)


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["lines", "json"]),
    default="lines",
    show_default=True,
    help="Format of the output.",
)
@click.option("--shell", is_flag=True, help="Print one line, quoted for a shell.")
@pass_tools
def argv(tools: Tools, instance: InstanceId, output: str, shell: bool) -> None:
    """Print the QEMU command line of ID, made of its keys and of this host's settings, one option per line.

    The supervisor opens the descriptors (fd=3 and so on) and writes the files below the run directory. The machine type
    is the one with which the guest was first started. User data that this host has not fetched yet counts as
    cloud-config. Secrets in extra_flags are left out.
    """
    found, _, settings = _existing(tools, instance)
    words = cleaned_words(command_line(found, settings))
    if shell:
        click.echo(quoted(words))
    elif output == "json":
        echo_json(words)
    else:
        for line in option_lines(words):
            click.echo(quoted(line))


def command_line(instance: Instance, settings: Settings) -> tuple[str, ...]:
    """The QEMU command line that the keys give with this host's settings.

    Raises:
        Refused: the keys have problems, or this host lacks something.
    """
    spec = instance.wish.spec
    if spec is None:
        problems = instance.wish.problems
        if not problems:
            raise Refused(f"{instance.id} has no keys any more")
        raise Refused("\n".join([f"{instance.id} has problems:", *(f"  {problem}" for problem in problems)]))
    # Imported here: other commands need no adapters of a host.
    from kvmsupervisor.adapters import accelerator  # noqa: PLC0415
    from kvmsupervisor.adapters.rundir import InstanceDir  # noqa: PLC0415
    from kvmsupervisor.machine.host import host_side  # noqa: PLC0415
    from kvmsupervisor.machine.provisioning import foresee  # noqa: PLC0415

    host = host_side(settings, accelerator.choose(settings.accel.value))
    identity = Identity(instance=instance.id, uuid=instance_uuid(settings.layout.prefix, instance.id))
    problems = host_problems(spec, host)
    if problems:
        raise Refused("\n".join([f"{instance.id} cannot run on this host:", *(f"  {one}" for one in problems)]))
    directory, status = InstanceDir(settings.run_dir / instance.id), instance.status
    ready = foresee(instance.id, spec, directory=directory, state_dir=settings.state_dir)
    provision = Provision(
        run_dir=str(directory.path),
        channels=Channels(qmp=3, spare=4, console=5, agent=6, console_log=7),
        machine=None if status is None or status.machine_key != spec.machine else status.machine,
        taps=tuple(TapFds(fd=7 + number) for number in range(len(spec.all_nics))),
        files=tuple(range(7 + len(spec.all_nics), 7 + len(spec.all_nics) + len(spec.files))),
        media=ready.media,
        ignition=ready.ignition,
        nvram=ready.nvram,
        spice_password=None if spec.spice_password is None else str(directory.spice_password),
        ceph_key=ready.ceph_key,
    )
    return build_argv(spec, identity=identity, host=host, provision=provision)


def option_lines(words: Sequence[str]) -> list[list[str]]:
    """Group a command line: the program, then each option with what follows it."""
    lines: list[list[str]] = []
    for word in words:
        if not lines or word.startswith("-"):
            lines.append([word])
        else:
            lines[-1].append(word)
    return lines


def _existing(tools: Tools, instance: InstanceId) -> tuple[Instance, Cluster, Settings]:
    """Read an instance of which etcd has any key.

    Raises:
        Refused: there is no such instance.
    """

    async def work(store: Store, settings: Settings) -> tuple[Instance, Cluster, Settings]:
        return *await read_instance(store, settings.layout, instance), settings

    found, cluster, settings = with_store(tools, work)
    if instance not in cluster.instances:
        raise Refused(f"there is no instance {instance}")
    return found, cluster, settings

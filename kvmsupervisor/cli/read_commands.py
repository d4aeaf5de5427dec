"""The commands that only read: `list`, `show`, `check`, `argv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import count, islice

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli import checks, views
from kvmsupervisor.cli.ceph_remark import remark_on_ceph
from kvmsupervisor.cli.choice import WORD, Pattern, Word, chosen, has_pattern, meant_by
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
from kvmsupervisor.cluster.details import details
from kvmsupervisor.cluster.overview import Cluster, Instance, as_object, read_cluster, read_instance
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.argv import Channels, Identity, Provision, build_argv, host_problems, instance_uuid
from kvmsupervisor.domain.hardware import Handed, Nvram, TapFds
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.secrecy import cleaned_words
from kvmsupervisor.domain.spec import Firmware


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
@click.option("-w", "--watch", is_flag=True, help="Go on: show it anew, or in a pipe each changed row, until Ctrl-C.")
@output_option
@pass_tools
def list_command(
    tools: Tools,
    *,
    hosts: Sequence[str],
    phases: Sequence[str],
    labels: Sequence[tuple[str, str]],
    watch: bool,
    output: OutputFormat,
) -> None:
    """List the instances: their hosts, phases and reasons.

    AGE is how long the phase has lasted. The phase is `unknown` when the reporting host has no session. `-o wide` adds
    RAM, the etcd revision that the host acted on, the incarnation, the last exit, the guest's addresses, the
    description and every problem.

    Example: kvmsupervisor list --host alpha --phase running -l x-team=shop
    """
    filters = Filters(hosts=hosts, phases=phases, labels=labels)
    if watch:
        from kvmsupervisor.cli.list_watch import watch_list  # noqa: PLC0415 - most lists are not watched

        watch_list(tools, filters, output)
        return

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
@click.argument("words", type=WORD, metavar="ID...", nargs=-1, required=True)
@output_option
@pass_tools
def show(tools: Tools, words: Sequence[Word], output: OutputFormat) -> None:
    """Show everything about instances: keys, status, guest, lock, its host's session, problems.

    The block "Guest" (addresses, system) is there once the guest's agent has answered. Of one ID, the command asks the
    host when the agent last answered, and waits a second for that. An ID may be a pattern, such as 'web*'.
    """
    if has_pattern(words) or len(words) > 1:
        _show_several(tools, words, output)
        return
    (instance,) = words
    assert not isinstance(instance, Pattern)
    found, cluster, settings = _existing(tools, instance)
    seen = _agent_seen(tools, found, cluster)
    if output == "json":
        echo_json(details(found, cluster, seen))
    else:
        echo_blocks(views.show_blocks(found, cluster, settings.layout, tools.now(), seen))


def _show_several(tools: Tools, words: Sequence[Word], output: OutputFormat) -> None:
    """Show those that are there, one after the other, and then say which are not."""

    async def work(store: Store, settings: Settings) -> tuple[Cluster, Settings]:
        return await read_cluster(store, settings.layout), settings

    cluster, settings = with_store(tools, work)
    ids = chosen(words, cluster.instances.values(), all_or_none=False)
    found = [cluster.instances[name] for name in ids if name in cluster.instances]
    if output == "json":
        echo_json([details(one, cluster) for one in found])
    else:
        echo_blocks([block for one in found for block in views.show_blocks(one, cluster, settings.layout, tools.now())])
    lacking = [f"{name}{meant_by(name, cluster.instances)}" for name in ids if name not in cluster.instances]
    if lacking:
        raise Refused(f"there is no instance {', '.join(lacking)}")


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
    last too long; locks that cannot be read, or whose holder has no session; MACs, RBD images and ports that two
    instances use. The exit code is 1 if anything was found. It also says when Ceph is so old that its keys are no wall,
    where `ceph` can be asked from here.
    """

    async def work(store: Store, settings: Settings) -> tuple[Cluster, list[checks.Finding]]:
        patience = checks.Patience(
            settle_s=tools.settle_s, shutdown_timeout_s=settings.shutdown_timeout_s, now=tools.now()
        )
        cluster, findings = await checks.check_all(store, settings.layout, patience)
        if (said := await remark_on_ceph(settings, cluster)) is not None:
            note(said)
        return cluster, findings

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
    from kvmsupervisor.machine.handover import foresee  # noqa: PLC0415
    from kvmsupervisor.machine.host import host_side  # noqa: PLC0415

    host = host_side(settings, accelerator.choose(settings.accel.value))
    identity = Identity(instance=instance.id, uuid=instance_uuid(settings.layout.prefix, instance.id))
    problems = host_problems(spec, host)
    if problems:
        raise Refused("\n".join([f"{instance.id} cannot run on this host:", *(f"  {one}" for one in problems)]))
    directory, status = InstanceDir(settings.run_dir / instance.id), instance.status
    ready = foresee(instance.id, spec, directory=directory, state_dir=settings.state_dir)
    numbers = count(3)
    nvram = Nvram(rbd=ready.variables_image)
    if ready.variables is not None:
        nvram = Nvram(file=Handed(next(numbers), ready.variables))
    qmp, spare, console, agent, console_log = islice(numbers, 5)
    provision = Provision(
        run_dir=str(directory.path),
        channels=Channels(qmp=qmp, spare=spare, console=console, agent=agent, console_log=console_log),
        machine=None if status is None or status.machine_key != spec.machine else status.machine,
        taps=tuple(TapFds(fd=next(numbers)) for _ in spec.bridged_nics),
        files=tuple(islice(numbers, len(spec.files))),
        media=tuple(Handed(next(numbers), path) for path in ready.media),
        ignition=None if ready.ignition is None else next(numbers),
        cdrom=None if ready.medium is None else Handed(next(numbers), ready.medium),
        nvram=None if spec.firmware is not Firmware.UEFI else nvram,
        spice_password=None if spec.spice_password is None else next(numbers),
        ceph_key=None if ready.ceph_key is None else next(numbers),
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

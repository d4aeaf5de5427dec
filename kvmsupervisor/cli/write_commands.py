"""The commands that write wishes: `create`, `set`, `delete`, `start`, `stop`, `restart`, `reset`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli import reach, waiting
from kvmsupervisor.cli.choice import WORD, Word, has_pattern, is_one, question, read_chosen, without_patterns
from kvmsupervisor.cli.common import (
    ASSIGNMENT,
    INSTANCE,
    KEY_NAME,
    Tools,
    pass_tools,
    tools_of,
    wait_options,
    with_store,
)
from kvmsupervisor.cli.errors import CommandError, Refused, TimedOut
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cli.progress import progress
from kvmsupervisor.cli.waiting import Goal
from kvmsupervisor.cluster.acts import instances as actions
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.cluster.acts.refused import Refused as ActRefused
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import OFF_NOW, Power

Action = Callable[[Store, Settings, InstanceId], Awaitable[Written]]

force_option = click.option(
    "--force", is_flag=True, help="Write although a value has a problem, or the host has no session."
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
some_ids_argument = click.argument("words", type=WORD, metavar="[ID]...", nargs=-1)
all_option = click.option("--all", "everything", is_flag=True, help="All guests of this host; needs --local.")
local_option = click.option("--local", is_flag=True, help="On this host itself, without etcd; needs --all.")
now_option = click.option("--now", is_flag=True, help="At once, without asking the guest: like a power cut.")
ids_argument = click.argument("instances", type=INSTANCE, metavar="ID...", nargs=-1, required=True)


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("assignments", type=ASSIGNMENT, metavar="KEY=VALUE...", nargs=-1, required=True)
@force_option
@wait_options
@pass_tools
def create(
    tools: Tools,
    *,
    instance: InstanceId,
    assignments: Sequence[tuple[str, str]],
    force: bool,
    wait: bool,
    timeout_s: float,
) -> None:
    """Create an instance: write its keys, all of them or none.

    The command checks every value before it writes, and names unknown keys; docs/instances.md lists the known ones. No
    host runs the instance until its key `host` is set.

    `mac=auto` writes an address that no NIC has, and `user-data=@FILE` the text of a file. With --wait the command ends
    with the guest's addresses, where they are known, or the ports of `forward`.

    Example: kvmsupervisor create web1 host=alpha ram=2G rbd=rbd/web1 mac=auto user-data=@web1.yaml --wait
    """
    values = unique(assignments)

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.create(store, settings.layout, instance, values, force=force)

    # Looked at every few seconds, so that it ends before the time is up: a guest that runs is no failure.
    patience_s = max(0.0, min(reach.ADDRESS_WAIT_S, timeout_s / 2 - waiting.LOOK_AGAIN_S))
    goal_of = waiting.until_as_written(tools.heard_of, patience_s)
    act(tools, [instance], action, "created", goal_of, wait=wait, timeout_s=timeout_s)


@click.command("set")
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.argument("assignments", type=ASSIGNMENT, metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--unset", type=KEY_NAME, multiple=True, metavar="KEY", help="Delete this key; may be repeated.")
@force_option
@wait_options
@pass_tools
def set_command(
    tools: Tools,
    *,
    instance: InstanceId,
    assignments: Sequence[tuple[str, str]],
    unset: Sequence[str],
    force: bool,
    wait: bool,
    timeout_s: float,
) -> None:
    """Change keys of an instance, all of them or none.

    The command checks the result before it writes. What QEMU can change while the guest runs is changed at once: disks,
    NICs, bridges, links, limits, memory up to ram_max, cpus up to cpus_max. The rest is pending until the instance
    restarts.

    Example: kvmsupervisor set web1 ram=4G --unset mac
    """
    values = unique(assignments)
    if not values and not unset:
        raise click.UsageError("Nothing to change: give KEY=VALUE or --unset KEY.")
    both = sorted(values.keys() & set(unset))
    if both:
        raise click.UsageError(f"{', '.join(both)}: given as KEY=VALUE and in --unset.")

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.change(store, settings.layout, instance, values, unset=unset, force=force)

    goal_of = waiting.until_as_written(tools.heard_of)
    act(tools, [instance], action, "changed", goal_of, wait=wait, timeout_s=timeout_s)


@click.command()
@click.argument("words", type=WORD, metavar="ID...", nargs=-1, required=True)
@yes_option
@wait_options
@pass_tools
def delete(tools: Tools, words: Sequence[Word], yes: bool, wait: bool, timeout_s: float) -> None:
    """Remove instances: delete all their keys. Their hosts shut the guests down and then release the locks.

    Disks are not touched. The command asks first; without a terminal, --yes is needed. An ID may be a pattern in
    quotes, such as 'test*'. When an ID is not there, or a pattern means nothing, nothing is removed at all.
    """
    need_an_answer(yes=yes)
    instances, cluster = read_chosen(tools, words)
    if is_one(words):
        asked = f"Shut the guest of instance {instances[0]} down and remove the instance?"
    else:
        what = f"Shut the guests of these {len(instances)} instances down and remove the instances?"
        asked = question(instances, cluster, what)
    confirm(asked, yes=yes)

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.delete(store, settings.layout, instance)

    act(tools, instances, action, "removed", lambda _: waiting.until_gone, wait=wait, timeout_s=timeout_s)


@click.command()
@some_ids_argument
@all_option
@local_option
@wait_options
@pass_tools
def start(
    tools: Tools, *, words: tuple[Word, ...], everything: bool, local: bool, wait: bool, timeout_s: float
) -> None:
    """Start instances (power=on), also those that ended by themselves. An ID may be a pattern, such as 'web*'.

    With --all --local: let this host's guests start again after `stop --all --local`. This changes no key.
    """
    from kvmsupervisor.cli import local as here  # noqa: PLC0415 - only this form pays for it

    here.check(words, everything=everything, local=local)
    if everything:
        here.start_all(tools)
        return
    instances = read_chosen(tools, words)[0] if has_pattern(words) else without_patterns(words)

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.switch(store, settings.layout, instance, Power.ON)

    act(tools, instances, action, "to be started", waiting.until_running, wait=wait, timeout_s=timeout_s)


@click.command()
@some_ids_argument
@all_option
@now_option
@yes_option
@local_option
@wait_options
@pass_tools
def stop(
    tools: Tools,
    *,
    words: tuple[Word, ...],
    now: bool,
    yes: bool,
    everything: bool,
    local: bool,
    wait: bool,
    timeout_s: float,
) -> None:
    """Shut instances down gracefully and keep them off (power=off; with --now, power=off-now).

    An ID may be a pattern in quotes, such as 'web*': then the command shows what that means, and asks first.

    With --all --local: shut down all guests of this host, wait for them, and let none start until the host boots again.
    This changes no key and needs no etcd. It is for the host's own shutdown.
    """
    from kvmsupervisor.cli import local as here  # noqa: PLC0415 - only this form pays for it

    here.check(words, everything=everything, local=local)
    if everything and now:
        raise click.UsageError("--now needs an ID; with --all every guest gets its time to shut down.")
    if everything:
        here.stop_all(tools, timeout_s=timeout_s)
        return
    if has_pattern(words):
        need_an_answer(yes=yes)
        instances, cluster = read_chosen(tools, words)
        how = "At once, like by a power cut, stop" if now else "Shut down"
        confirm(question(instances, cluster, f"{how} the guests of these {len(instances)} instances?"), yes=yes)
    else:
        instances = without_patterns(words)

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.switch(store, settings.layout, instance, OFF_NOW if now else Power.OFF)

    act(tools, instances, action, "to be stopped", waiting.until_stopped, wait=wait, timeout_s=timeout_s)


@click.command()
@ids_argument
@now_option
@wait_options
@pass_tools
def restart(tools: Tools, *, instances: Sequence[InstanceId], now: bool, wait: bool, timeout_s: float) -> None:
    """Restart instances once: shut them down gracefully, then start them with all pending changes.

    With --now they are not shut down but ended, like by a power cut.
    """

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.restart(store, settings.layout, instance, actions.new_request(tools.now(), at_once=now))

    act(
        tools,
        instances,
        action,
        "to be restarted",
        waiting.until_restarted,
        wait=wait,
        timeout_s=timeout_s,
    )


@click.command()
@ids_argument
@wait_options
@pass_tools
def reset(tools: Tools, instances: Sequence[InstanceId], wait: bool, timeout_s: float) -> None:
    """Press the reset button of instances: QEMU goes on, and the guest boots again without being asked."""

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await actions.restart(store, settings.layout, instance, actions.new_request(tools.now(), reset=True))

    act(tools, instances, action, "to be reset", waiting.until_running, wait=wait, timeout_s=timeout_s)


def act(
    tools: Tools,
    instances: Sequence[InstanceId],
    action: Action,
    done: str,
    goal_of: Callable[[Written], Goal],
    *,
    wait: bool,
    timeout_s: float,
) -> None:
    """Do `action` to each instance, say what was done, and wait if `wait` is set.

    A refusal for one instance does not affect the others; the exit code is the worst one.
    """

    async def work(store: Store, settings: Settings) -> list[CommandError]:
        failures: list[CommandError] = []
        goals: list[tuple[Written, Goal]] = []
        for instance in dict.fromkeys(instances):
            try:
                written = await action(store, settings, instance)
            except ActRefused as refused:
                failures.append(Refused(str(refused)))
                continue
            for sentence in written.notes:
                note(f"{instance}: {sentence}")
            if not wait:
                click.echo(f"{instance} {done}")
            goals.append((written, goal_of(written)))
        return failures + (await _wait(store, settings, goals, timeout_s=timeout_s) if wait else [])

    failures = with_store(tools, work)
    for failure in failures[:-1]:
        failure.show()
    if failures:
        raise max(reversed(failures), key=lambda failure: failure.exit_code)


async def _wait(
    store: Store, settings: Settings, goals: Sequence[tuple[Written, Goal]], *, timeout_s: float
) -> list[CommandError]:
    """Wait for every goal, say which are reached, and return the errors of the others."""
    with progress() as report:
        outcomes = await waiting.wait_for_all(store, settings.layout, goals, timeout_s=timeout_s, report=report)
    failures: list[CommandError] = []
    for outcome in outcomes:
        if outcome.ok:
            click.echo(printable(f"{outcome.instance}: {outcome.text}"))
        else:
            failures.append((TimedOut if outcome.timed_out else Refused)(f"{outcome.instance}: {outcome.text}"))
    return failures


def unique(assignments: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The assignments as a mapping; a key must not be given twice."""
    values = dict(assignments)
    if len(values) < len(assignments):
        names = [name for name, _ in assignments]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise click.UsageError(f"Given twice: {', '.join(twice)}.")
    return values


def need_an_answer(*, yes: bool) -> None:
    """Refuse where a question could not be answered, before anything is read for it."""
    if not yes and not tools_of(click.get_current_context()).can_ask():
        raise click.UsageError("There is no terminal to ask on: give --yes.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask the person at the terminal, unless `--yes` was given. Outside of every event loop: people take their time."""
    need_an_answer(yes=yes)
    if not yes and not click.confirm(question):
        raise Refused("nothing was done")

"""`apply`: makes the keys of instances, and entries of the image library, as files say.

What differs is shown first. Then each instance is one transaction, as by `create`, `set` and `delete`. Cut off in
between, some are written and some are not; the same command again writes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import click

from kvmsupervisor.adapters.etcd.api import Compare, Put, Store, Target
from kvmsupervisor.cli import waiting
from kvmsupervisor.cli.common import Tools, pass_tools, wait_options, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.filters import LABEL, value_of
from kvmsupervisor.cli.output import echo_json, note, printable
from kvmsupervisor.cli.waiting import Goal
from kvmsupervisor.cli.wish_files.difference import Change, differences
from kvmsupervisor.cli.wish_files.reading import IMAGES, Faulty, Wanted, read_files
from kvmsupervisor.cli.wish_files.schema import schema
from kvmsupervisor.cli.write_commands import act, confirm, force_option, need_an_answer, yes_option
from kvmsupervisor.cluster.acts import instances as actions
from kvmsupervisor.cluster.acts import mac_auto
from kvmsupervisor.cluster.acts.instances import Written
from kvmsupervisor.cluster.acts.refused import Refused as ActRefused
from kvmsupervisor.cluster.overview import Cluster, Instance, read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import image_name, parse_image
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.media import shown_url
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.domain.values import Unfit


@frozen(kw_only=True)
class Plan:
    """What is to be done with one instance.

    Attributes:
        id: its id.
        present: its keys.
        changes: of keys; none for an instance that goes.
        wish: as it will be.
    """

    id: InstanceId
    present: Mapping[str, str]
    changes: tuple[Change, ...]
    wish: Wish

    @property
    def title(self) -> str:
        """A line for people."""
        if not self.changes:
            return f"{self.id}: removed; its guest is shut down"
        return f"{self.id}: {'changed' if self.present else 'new'}"


@frozen(kw_only=True)
class Entry:
    """What is to be written of one entry of the image library.

    Attributes:
        name: of the image.
        before: the present entry; None for a new one.
        after: the entry to be written.
        revision: `mod_revision` of the present one; 0 without one.
    """

    name: str
    before: str | None
    after: str
    revision: int


def _print_schema(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        echo_json(schema())
        ctx.exit()


@click.command()
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    required=True,
    type=click.Path(allow_dash=True),
    help="A YAML file, a folder with such files, or - for standard input; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Show what differs, and write nothing.")
@click.option("--prune", is_flag=True, help="Remove instances that have the labels of -l and are in no file.")
@click.option("-l", "--label", "labels", type=LABEL, multiple=True, help="With --prune, such as x-team=shop.")
@click.option(
    "--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
    help="Print the JSON schema of such files, for editors.",
)  # fmt: skip
@yes_option
@force_option
@wait_options
@pass_tools
def apply(
    tools: Tools,
    *,
    files: Sequence[str],
    dry_run: bool,
    prune: bool,
    labels: Sequence[tuple[str, str]],
    yes: bool,
    force: bool,
    wait: bool,
    timeout_s: float,
) -> None:
    """Make instances as files say: show what differs, ask, and write it.

    A file is a mapping of ids to their keys. An instance gets the keys that its file names, and loses the others, but
    for those that stay where no file names them: host, power, restart_request, spice_password and user-data. Instances
    in no file stay as they are, unless --prune is given.

    Example: kvmsupervisor apply -f machines/ --dry-run
    """
    if prune != bool(labels):
        raise click.UsageError("--prune and -l go together: only instances with that label are removed.")
    if not dry_run:
        need_an_answer(yes=yes)
    try:
        wanted = read_files(files)
    except Faulty as faulty:
        raise Refused(_nothing(str(faulty).splitlines())) from faulty

    async def read(store: Store, settings: Settings) -> tuple[Cluster, Layout]:
        return await read_cluster(store, settings.layout), settings.layout

    cluster, layout = with_store(tools, read)
    entries, plans = _entries(wanted, cluster, layout), _plans(wanted, cluster, labels)
    objections = list(_objections(wanted, cluster, entries, plans, labels, force=force))
    if objections:
        raise Refused(_nothing(objections))
    _show(entries, plans)
    same = len(wanted.instances) + len(wanted.images) - len(entries) - sum(bool(plan.changes) for plan in plans)
    note(f"{same} {'is' if same == 1 else 'are'} as the files say")
    if dry_run or not (entries or plans):
        return
    ending = sum(not plan.changes for plan in plans)
    removed = f", and remove {ending} whose guests are shut down" if ending else ""
    confirm(f"Write {len(entries) + len(plans) - ending}{removed}?", yes=yes)
    if entries:
        with_store(tools, partial(_write_entries, entries))
    by_id = {plan.id: plan for plan in plans}

    async def action(store: Store, settings: Settings, instance: InstanceId) -> Written:
        return await _write(store, settings.layout, by_id[instance], force=force)

    as_written = waiting.until_as_written(tools.heard_of)

    def goal_of(written: Written) -> Goal:
        return as_written(written) if by_id[written.instance].changes else waiting.until_gone

    act(tools, list(by_id), action, "is written", goal_of, wait=wait, timeout_s=timeout_s)


def _nothing(said: Sequence[str]) -> str:
    return "\n".join(["nothing was written:", *(f"  {line}" for line in said)])


# --- what differs ---------------------------------------------------------------------------------------------


def _plans(wanted: Wanted, cluster: Cluster, labels: Sequence[tuple[str, str]]) -> list[Plan]:
    plans = []
    for instance, keys in wanted.instances.items():
        found = cluster.instances.get(instance)
        present = {} if found is None else _text_of(found)
        if changes := tuple(differences(present, keys)):
            plans.append(Plan(id=instance, present=present, changes=changes, wish=_wish(instance, present, changes)))
    for instance, found in cluster.instances.items():
        if labels and found.keys and instance not in wanted.instances and _has(found, labels):
            plans.append(Plan(id=instance, present=_text_of(found), changes=(), wish=parse_wish(instance, {})))
    return plans


def _text_of(found: Instance) -> dict[str, str]:
    return {name.decode(errors="replace"): raw.value.decode(errors="replace") for name, raw in found.keys.items()}


def _has(found: Instance, labels: Sequence[tuple[str, str]]) -> bool:
    return all(value_of(found, key) == value for key, value in labels)


def _wish(instance: InstanceId, present: Mapping[str, str], changes: Sequence[Change]) -> Wish:
    """What its keys will say."""
    after = dict(present) | {one.key: one.after or "" for one in changes}
    for one in changes:
        if one.after is None:
            del after[one.key]
        elif mac_auto.asks(one.key, one.after):
            # Chosen when it is written.
            after[one.key] = mac_auto.unused(())
    return parse_wish(instance, {name.encode(): RawValue(value.encode(), 0) for name, value in after.items()})


def _entries(wanted: Wanted, cluster: Cluster, layout: Layout) -> list[Entry]:
    there = {kv.key.decode(errors="replace").removeprefix(layout.images_prefix): kv for kv in cluster.images}
    found = []
    for name, after in wanted.images.items():
        kv = there.get(name)
        before = None if kv is None else kv.value.decode(errors="replace").strip()
        if before != after.strip():
            revision = 0 if kv is None else kv.mod_revision
            found.append(Entry(name=name, before=before, after=after.strip(), revision=revision))
    return found


def _objections(
    wanted: Wanted,
    cluster: Cluster,
    entries: Sequence[Entry],
    plans: Sequence[Plan],
    labels: Sequence[tuple[str, str]],
    *,
    force: bool,
) -> Iterator[str]:
    """Why it must not be written, one line each; --force heeds problems of values, and absent hosts, no more."""
    for entry in entries:
        try:
            parse_image(image_name(entry.name), entry.after)
        except Unfit as unfit:
            yield f"{IMAGES}: {entry.name}: {unfit}"
    if labels and not wanted.instances:
        yield "the files have no instance: a template that came to nothing would remove all; `delete` removes instances"
    for instance, keys in wanted.instances.items():
        for key, value in labels:
            if keys.get(key, "").strip() != value:
                yield f"{wanted.places[instance]}: {instance} has not {key}={value}: a later --prune would not find it"
    for plan in () if force else plans:
        place = wanted.places.get(plan.id)
        if place is None:
            continue
        yield from (f"{place}: {plan.id}: {problem}" for problem in plan.wish.problems)
        if any(change.key == "host" for change in plan.changes):
            try:
                actions.refuse_absent_host(f"{place}: {plan.id}", plan.wish, cluster)
                if plan.present:
                    actions.refuse_to_leave_files(f"{place}: {plan.id}", plan.wish, cluster.instances[plan.id])
            except ActRefused as refused:
                yield str(refused)


def _show(entries: Sequence[Entry], plans: Sequence[Plan]) -> None:
    for entry in entries:
        click.echo(printable(f"image {entry.name}: {'new' if entry.before is None else 'changed'}"))
        for sign, text in (("-", entry.before), ("+", entry.after)):
            if text is not None:
                url, *words = text.split() or [""]
                click.echo(printable(f"  {sign} {' '.join([shown_url(url), *words])}"))
    for plan in plans:
        click.echo(printable(plan.title))
        for change in plan.changes:
            click.echo(printable(f"  {change}"))


# --- writing --------------------------------------------------------------------------------------------------


async def _write_entries(entries: Sequence[Entry], store: Store, settings: Settings) -> None:
    """Write the entries of the library: before the disks that are made of them.

    Raises:
        Refused: somebody has written one meanwhile.
    """
    for entry in entries:
        key = settings.layout.image_key(entry.name)
        compare = Compare(key, Target.MOD_REVISION, entry.revision)
        if not (await store.txn([compare], [Put(key, entry.after.encode())])).succeeded:
            raise Refused(f"image {entry.name} was not written: somebody else has just done that; run `apply` again")
        click.echo(printable(f"image {entry.name} is written"))


async def _write(store: Store, layout: Layout, plan: Plan, *, force: bool) -> Written:
    if not plan.changes:
        return await actions.delete(store, layout, plan.id)
    values = {one.key: one.after for one in plan.changes if one.after is not None}
    if not plan.present:
        return await actions.create(store, layout, plan.id, values, force=force)
    unset = [one.key for one in plan.changes if one.after is None]
    return await actions.change(store, layout, plan.id, values, unset=unset, force=force)

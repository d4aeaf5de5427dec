"""One instance: what is wished beside what is observed, why, and what happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.details import public
from kvmsupervisor.cluster.overview import Cluster, Instance, as_object, shown
from kvmsupervisor.domain.events import Event
from kvmsupervisor.domain.spec import Disk, Display
from kvmsupervisor.web.frame import State, page, time
from kvmsupervisor.web.html import NOTHING, Html, join, tag
from kvmsupervisor.web.people import Person, Role

LONG = 4000
"""Characters of a text on this page. Arbitrary: a user's keys are read here, a megabyte is not."""

KEYS = 200
"""Keys, or problems, on this page. Arbitrary; the JSON has all of them."""

HEADED = frozenset(
    {"id", "host", "phase", "reason", "since", "problems", "agent", "pending", "changing", "revision", "unplugged"}
)
"""Fields of a status that this page shows elsewhere than in the list of fields."""


def instance_page(instance: Instance, cluster: Cluster, events: Sequence[Event], state: State, person: Person) -> bytes:
    """The page."""
    view, found = shown(instance, cluster), as_object(instance, cluster)
    phase = f"{view.phase} ({visible(view.halted)})" if view.halted else view.phase
    main = join(
        (
            tag("h1", instance.id),
            tag(
                "p",
                tag("span", phase, class_=f"phase {'halted' if view.halted else view.phase}"),
                NOTHING if view.host is None else join((" on ", tag("bdi", visible(view.host)))),
                join((" · ", time(str(found["since"])))) if found["since"] else None,
                class_="lead",
            ),
            tag("p", tag("bdi", _long(view.reason)), class_="lead"),
            _consoles(instance) if person.may(Role.CONSOLE) else NOTHING,
            _acts(instance) if person.may(Role.OPERATOR) else NOTHING,
            _list("Problems", instance.problems, "problem"),
            _list("Being changed while it runs", found["changing"], "pending"),
            _list("At the next restart these keys take effect", _for_restart(found), "pending"),
            _list("Not plugged in", found["unplugged"], "problem"),
            tag(
                "div",
                _section("Wishes", _wishes(instance)),
                _section("Observed", _observed(instance, found)),
                _section("Disks", _disks(instance)),
                _section("Guest", _guest(instance)),
                _section("Lock", _lock(instance)),
                _section("Placement", _placement(instance)),
                class_="beside",
            ),
            _section("Events, the newest first", _events(events)),
            tag("p", tag("a", "As JSON", href=f"/api/v1/instances/{instance.id}")),
        )
    )
    title = f"{instance.id} – kvmsupervisor"
    return page(title=title, here="", state=state, person=person, main=main, script="refresh.js")


def _consoles(instance: Instance) -> Html:
    """The ways to its consoles; to a display only where there is one, as far as that is known."""
    spec = instance.wish.spec
    serial = tag("a", "Console", href=f"/instances/{instance.id}/console")
    if spec is not None and spec.screen is Display.NONE:
        return tag("p", serial)
    return tag("p", serial, " · ", tag("a", "Display", href=f"/instances/{instance.id}/display"))


ACTS = (
    ("start", "Start"),
    ("stop", "Shut down…"),
    ("restart", "Restart…"),
    ("move", "Move…"),
    ("set", "Change keys…"),
    ("reset", "Reset…"),
    ("stop now", "Power off now…"),
    ("restart now", "Restart now…"),
    ("delete", "Delete…"),
)
"""Acts, and their buttons: `static/acts.js` does them."""


def _acts(instance: Instance) -> Html:
    buttons = (tag("button", title, type="button", data_act=act, data_id=instance.id) for act, title in ACTS)
    return tag("div", *buttons, class_="acts", role="group", aria_label="Acts")


def _section(title: str, content: Html) -> Html:
    return tag("section", tag("h2", title), content)


def _list(title: str, texts: Sequence[str], kind: str) -> Html:
    if not texts:
        return NOTHING
    items = [tag("li", tag("bdi", _long(text)), class_=kind) for text in texts[:KEYS]]
    if len(texts) > KEYS:
        items.append(tag("li", f"and {len(texts) - KEYS} more, which the JSON has"))
    return _section(title, tag("ul", *items))


def _wishes(instance: Instance) -> Html:
    """Its keys: each with the revision that wrote it, and whether its host has acted on that."""
    if not instance.keys:
        return tag("p", "It has no keys.")
    status = instance.status
    pending = frozenset(() if status is None else status.pending)
    names = sorted(instance.keys)
    rows = [
        _line(
            name.decode("utf-8", "backslashreplace"),
            public(name, instance.keys[name].value).decode("utf-8", "backslashreplace"),
            instance.keys[name].mod_revision,
            seen=0 if status is None else status.revision,
            is_pending=name.decode("utf-8", "replace") in pending,
        )
        for name in names[:KEYS]
    ]
    more = tag("p", f"And {len(names) - KEYS} more, which the JSON has.") if len(names) > KEYS else NOTHING
    heads = ("Key", "Value", "Revision", "In effect")
    return join((_table(heads, rows), more))


def _for_restart(found: Mapping[str, Any]) -> list[str]:
    return [key for key in found["pending"] if key not in found["changing"]]


def _line(name: str, value: str, revision: int, *, seen: int, is_pending: bool) -> Html:
    if is_pending:
        effect = tag("span", "at the next restart", class_="pending")
    else:
        effect = Html("yes") if revision <= seen else tag("span", "not seen by its host yet", class_="pending")
    return tag(
        "tr",
        tag("th", tag("bdi", _long(name)), scope="row"),
        tag("td", tag("bdi", _long(value)), class_="value"),
        tag("td", str(revision), class_="number"),
        tag("td", effect),
    )


def _disks(instance: Instance) -> Html:
    spec = instance.wish.spec
    if spec is None:
        return tag("p", "Not known: its keys are not valid.")
    rows = [
        tag("tr", tag("th", str(disk.number), scope="row"), tag("td", tag("bdi", visible(_disk(disk))), class_="value"))
        for disk in spec.all_disks
    ]
    return _table(("Number", "Image or file"), rows) if rows else tag("p", "None.")


def _disk(disk: Disk) -> str:
    if disk.rbd is not None:
        return f"{disk.rbd.name} (Ceph)"
    return f"file:{disk.file.name}" if disk.file is not None else ""


def _guest(instance: Instance) -> Html:
    """What the guest's agent says: all of it may be a lie."""
    agent = None if instance.status is None else instance.status.agent
    if agent is None:
        return tag("p", "Its agent has never answered.")
    said = {"System": agent.os, "Host name": agent.hostname, "Agent": agent.version}
    addresses = {f"Address ({one.interface})": one.address for one in agent.addresses}
    return _fields({**said, **addresses})


def _observed(instance: Instance, found: Mapping[str, Any]) -> Html:
    if instance.status is None:
        return tag("p", "No host has said anything of it.")
    revisions = {"status written at revision": instance.status_revision, "wish acted on": found["revision"]}
    return _fields({**{name: value for name, value in found.items() if name not in HEADED}, **revisions})


def _lock(instance: Instance) -> Html:
    if instance.lock is None:
        return tag("p", "Free.")
    lock = instance.lock.lock
    if lock is None:
        return tag("p", "It cannot be read: ", tag("bdi", visible(instance.lock.kv.value.decode(errors="replace"))))
    said = {
        "host": lock.host,
        "state": lock.state.value,
        "epoch": lock.epoch,
        "incarnation": lock.incarnation,
        "clients": lock.clients,
        "to be shut out": lock.fence,
        "written at revision": instance.lock.kv.mod_revision,
    }
    return _fields(said)


def _placement(instance: Instance) -> Html:
    placed, stands = instance.wish.placed, instance.wish.placement is not None
    if not placed.revision:
        return tag("p", "None: `host` says where it runs.")
    if placed.placement is None:
        return tag("p", "There, but this release cannot read it.")
    one = placed.placement
    ended = {} if stands else {"ended": "`host` was written since"}
    return _fields({"host": one.host, "why": one.why, "since": one.since, "stands in for revision": one.of, **ended})


def _events(events: Sequence[Event]) -> Html:
    rows = [
        tag(
            "tr",
            tag("td", time(event.at)),
            tag("th", tag("bdi", visible(event.event.removeprefix("instance."))), scope="row"),
            tag("td", tag("bdi", visible(event.host))),
            tag("td", str(event.epoch), class_="number"),
            tag("td", tag("bdi", _long(event.reason)), f" ({event.times} times)" if event.times > 1 else None),
        )
        for event in reversed(events)
    ]
    return _table(("Time", "Event", "Host", "Epoch", "Why"), rows) if rows else tag("p", "None.")


def _fields(found: Mapping[str, object]) -> Html:
    """Names and values; what says nothing is left out."""
    rows = [
        tag(
            "tr",
            tag("th", visible(name.replace("_", " ")), scope="row"),
            tag("td", tag("bdi", "; ".join(_values(value))), class_="value"),
        )
        for name, value in found.items()
        if value not in (None, "", (), [], {})
    ]
    return tag("table", tag("tbody", *rows), class_="fields")


def _values(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (f"{visible(key)}: {visible(one)}" for key, one in list(value.items())[:KEYS])
    elif isinstance(value, list | tuple):
        yield from map(visible, value[:KEYS])
    elif isinstance(value, bool):
        yield "yes" if value else "no"
    else:
        yield _long(value)


def _table(heads: Sequence[str], rows: Sequence[Html]) -> Html:
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in heads)))
    return tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll")


def _long(text: object) -> str:
    return visible(text, LONG)

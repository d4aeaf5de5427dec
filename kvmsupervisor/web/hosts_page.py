"""The hosts: who has a session, what runs there, and how much memory is promised."""

from __future__ import annotations

from collections.abc import Sequence

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.acts.hosts import held_by
from kvmsupervisor.cluster.host_table import NO_SESSION, HostFact
from kvmsupervisor.cluster.overview import Cluster, Instance
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.web.choice import Choice
from kvmsupervisor.web.frame import State, page, time
from kvmsupervisor.web.html import NOTHING, Html, join, tag
from kvmsupervisor.web.order import is_host
from kvmsupervisor.web.people import Person, Role

COLUMNS = ("Host", "State", "Since", "Running", "Locks", "Memory promised", "CPUs", "Release", "Notice")


def hosts_page(facts: Sequence[HostFact], cluster: Cluster, state: State, person: Person) -> bytes:
    """The page."""
    acts = person.may(Role.OPERATOR)
    columns = (*COLUMNS, *(("Acts",) if acts else ()))
    rows = (_row(fact, _acts(fact, held_by(cluster, HostName(fact.host))) if acts else None) for fact in facts)
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", title, scope="col") for title in columns))),
        tag("tbody", *rows),
        class_="list",
    )
    empty = tag("p", "No host has a session, and none has left anything.")
    main = join((tag("h1", "Hosts"), table if facts else empty))
    title = "Hosts – kvmsupervisor"
    return page(title=title, here="/hosts", state=state, person=person, main=main, script="refresh.js")


def _acts(fact: HostFact, held: Sequence[Instance]) -> Html:
    """Buttons; `static/acts.js` does what they say."""
    name = fact.host
    if not is_host(name):
        return NOTHING
    drains = fact.wish.drain is not None
    buttons = [tag("button", "Drain…", type="button", data_act="drain", data_host=name)]
    if drains or (fact.progress is not None and fact.progress.moved):
        title = "Return to service…"
        buttons.append(tag("button", title, type="button", data_act="undrain", data_host=name))
    if held:
        names = " ".join(one.id for one in held)
        title = f"Confirm {len(held)} held…"
        buttons.append(tag("button", title, type="button", data_act="confirm-removal", data_host=name, data_held=names))
    return tag("div", *buttons, class_="acts")


def _row(fact: HostFact, acts: Html | None) -> Html:
    session = fact.session
    name = visible(fact.host)
    memory = "" if session is None or not session.memory_mib else f" of {session.memory_mib}"
    return tag(
        "tr",
        tag("th", tag("a", tag("bdi", name), href=Choice(host=name).address()), scope="row"),
        _cell("State", tag("span", fact.state, class_=f"phase {fact.state.replace(' ', '-')}")),
        _cell("Since", time(session.started or None) if session is not None else NOTHING),
        _cell("Running", "" if fact.state == NO_SESSION else str(len(fact.running)), class_="number"),
        _cell("Locks", str(len(fact.locks)), class_="number"),
        _cell("Memory promised", f"{fact.promised_mib}{memory} MiB", class_="number"),
        _cell("CPUs", "" if session is None or not session.cpus else str(session.cpus), class_="number"),
        _cell("Release", "" if session is None else visible(session.version)),
        _cell("Notice", tag("bdi", visible(fact.notice)), class_="why"),
        None if acts is None else _cell("Acts", acts),
    )


def _cell(label: str, *children: str | None, class_: str | None = None) -> Html:
    return tag("td", *children, class_=class_, data_label=label)

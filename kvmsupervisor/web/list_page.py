"""The list: all instances of the cluster, problems first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.overview import UNKNOWN, natural
from kvmsupervisor.domain.status import Phase
from kvmsupervisor.web.choice import Choice
from kvmsupervisor.web.frame import State, instance_link, page, time
from kvmsupervisor.web.html import NOTHING, Html, join, tag
from kvmsupervisor.web.people import Person, Role
from kvmsupervisor.web.rows import Rank, Row

COLUMNS = (
    ("id", "Instance"),
    ("phase", "Phase"),
    ("since", "Since"),
    ("", "Why"),
    ("host", "Host"),
    ("", "Addresses"),
    ("ram", "Memory"),
    ("restarts", "Restarts"),
)
"""What each column is sorted by, and its title. scripts of the list make the same cells, see static/list.js."""

PHASES = (*(phase.value for phase in Phase), UNKNOWN)


def row_html(row: Row) -> Html:
    """One row of the table, whole: it is the same for every reader."""
    phase = f"{row.phase} ({row.halted})" if row.halted else row.phase
    notes = (
        *(_note("problem", text) for text in row.problems),
        *(_note("pending", f"{key} takes effect at the next restart") for key in row.pending),
        None if row.notice is None else _note("notice", row.notice),
        None if row.last_exit is None else _note("last", f"last end: {row.last_exit}"),
    )
    found = [note for note in notes if note is not None]
    return tag(
        "tr",
        tag(
            "th",
            instance_link(row.id),
            tag("bdi", row.description, class_="description") if row.description else None,
            scope="row",
        ),
        _cell("Phase", tag("span", phase, class_=f"phase {'halted' if row.halted else row.phase}")),
        _cell("Since", time(row.since)),
        _cell("Why", tag("bdi", row.reason), tag("ul", *found) if found else None, class_="why"),
        _cell("Host", _host(row)),
        _cell("Addresses", ", ".join(row.addresses), class_="addresses"),
        _cell("Memory", _memory(row.ram_mib), class_="number"),
        _cell("Restarts", str(row.restarts), class_="number"),
        id=f"i-{row.id}",
        data_rank=str(row.rank),
        data_host=row.host or "",
        data_phase=row.phase,
        data_since=row.since or "",
        data_ram=str(row.ram_mib or 0),
        data_restarts=str(row.restarts),
    )


def list_page(
    rows: Sequence[Row],
    html: Iterable[Html],
    *,
    total: Sequence[Row],
    choice: Choice,
    state: State,
    person: Person,
    mark: str,
) -> bytes:
    """The page.

    Args:
        rows: that are chosen, in their order.
        html: of these.
        total: all rows.
        choice: what the address says.
        state: of etcd.
        person: who asks.
        mark: what the rows are as of.
    """
    problems = sum(row.rank == Rank.PROBLEM for row in total)
    main = join(
        (
            tag("h1", "Instances"),
            _counts(total, problems, choice),
            _form(total, choice),
            tag("p", _how_many(len(rows), len(total)), id="shown", role="status"),
            _bulk() if person.may(Role.OPERATOR) else NOTHING,
            _table(html, choice),
        )
    )
    title = f"{f'({problems}) ' if problems else ''}Instances – kvmsupervisor"
    return page(
        title=title,
        here="/",
        state=state,
        person=person,
        main=main,
        script="list.js",
        mark=mark if choice.is_all else None,
    )


def _how_many(shown: int, total: int) -> str:
    if not total:
        return "There are no instances; make one with `kvmsupervisor create`."
    return f"{total} instances" if shown == total else f"{shown} of {total} instances"


def _counts(total: Sequence[Row], problems: int, choice: Choice) -> Html:
    """How many there are of each phase: each a link that shows only those."""
    found = Counter(row.phase for row in total)
    items = [
        _count(
            f"{problems} need a look",
            choice.address(problems=True, phase=""),
            chosen=choice.problems,
            kind="looks" if problems else "stopped",
        ),
        *(
            _count(
                f"{found[phase]} {phase}",
                choice.address(problems=False, phase=phase),
                chosen=choice.phase == phase,
                kind=phase,
            )
            for phase in PHASES
            if found[phase]
        ),
    ]
    return tag("ul", *items, id="counts", class_="counts")


def _count(text: str, address: str, *, chosen: bool, kind: str) -> Html:
    return tag("li", tag("a", text, href=address, class_=f"phase {kind}", aria_current="true" if chosen else None))


def _form(total: Sequence[Row], choice: Choice) -> Html:
    hosts = sorted({row.host for row in total if row.host}, key=natural)
    return tag(
        "form",
        tag("label", "Filter ", tag("input", type="search", name="q", value=choice.words, autocomplete="off")),
        tag("label", "Host ", _select("host", hosts, choice.host)),
        tag("label", "Phase ", _select("phase", PHASES, choice.phase)),
        tag(
            "label",
            tag("input", type="checkbox", name="show", value="problems", checked=choice.problems),
            " only what needs a look",
        ),
        tag("input", type="hidden", name="sort", value=("-" if choice.down else "") + choice.sort),
        tag("button", "Show"),
        tag("a", "all", href="/", class_="all"),
        id="filter",
        action="/",
        method="get",
        role="search",
    )


MANY = (
    ("start", "Start"),
    ("stop", "Shut down…"),
    ("restart", "Restart…"),
    ("move", "Move…"),
    ("stop now", "Power off now…"),
    ("delete", "Delete…"),
    ("none", "None"),
)
"""Acts on many instances, and their buttons: scripts do them."""


def _bulk() -> Html:
    """The acts on what is chosen; shown where scripts run."""
    return tag(
        "div",
        tag("label", tag("input", type="checkbox"), " all that is shown"),
        tag("output", "0 chosen"),
        *(tag("button", title, type="button", data_many=act) for act, title in MANY),
        id="bulk",
        class_="acts",
    )


def _select(name: str, values: Sequence[str], chosen: str) -> Html:
    known = values if not chosen or chosen in values else (*values, visible(chosen))
    return tag(
        "select",
        tag("option", "any", value=""),
        *(tag("option", one, value=one, selected=one == chosen) for one in known),
        name=name,
    )


def _table(html: Iterable[Html], choice: Choice) -> Html:
    heads = (
        tag(
            "th",
            title if not by else tag("a", title, href=_sorted_by(choice, by)),
            scope="col",
            data_sort=by or None,
            aria_sort=None if by != choice.sort else "descending" if choice.down else "ascending",
        )
        for by, title in COLUMNS
    )
    return tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *html),
        id="instances",
        class_="list",
    )


def _sorted_by(choice: Choice, by: str) -> str:
    return choice.address(sort=by, down=choice.sort == by and not choice.down)


def _memory(mib: int | None) -> str:
    if mib is None:
        return ""
    return f"{mib / 1024:g} GiB" if mib % 512 == 0 else f"{mib} MiB"


def _host(row: Row) -> Html:
    if row.host is None:
        return tag("span", "nowhere", class_="dim")
    return join((tag("bdi", row.host), NOTHING if row.placed_for is None else tag("bdi", f" (for {row.placed_for})")))


def _cell(label: str, *children: str | None, class_: str | None = None) -> Html:
    """A cell; its label is shown where the table has no room for a head."""
    return tag("td", *children, class_=class_, data_label=label)


def _note(kind: str, text: str) -> Html:
    return tag("li", tag("bdi", text), class_=kind)

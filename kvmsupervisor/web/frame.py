"""What every page has: its head, its ways to the others, what is known of etcd, and times."""

from __future__ import annotations

from dataclasses import field

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.web.html import NOTHING, Html, join, tag
from kvmsupervisor.web.people import Person, Role

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""Files of ours, and nothing from elsewhere; nothing inline; no page may frame ours; scripts may not write HTML."""


@frozen(kw_only=True)
class State:
    """What is known of etcd.

    Attributes:
        in_step: whether everything that is shown is as etcd has it now.
        problem: why not, for people; empty while it is.
        as_of: the last time when it was so, RFC 3339; None while it is, and when it never was.
        revision: of etcd, of what is shown.
    """

    in_step: bool
    problem: str = ""
    as_of: str | None = None
    revision: int = field(default=0, compare=False)

    def to_object(self) -> dict[str, object]:
        """As a JSON object; the revision is in the stream's own marks."""
        return {"in_step": self.in_step, "problem": visible(self.problem), "as_of": self.as_of}


def page(
    *,
    title: str,
    here: str,
    state: State,
    person: Person,
    main: Html,
    script: str,
    mark: str | None = None,
    style: str | None = None,
) -> bytes:
    """A whole document.

    Args:
        title: for the tab.
        here: the path of the page among the ways to others.
        state: of etcd.
        person: who asks; scripts find their roles in `data-may`.
        main: what the page is about.
        script: name of its script.
        mark: what the list is as of, for the stream; None where the whole list has to be asked for.
        style: path of a further style sheet, before our own.
    """
    create = (("/create", "Create"),) if person.may(Role.OPERATOR) else ()
    ways = (("/", "Instances"), ("/hosts", "Hosts"), *create, ("/api", "API"))
    document = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("link", rel="icon", href="/static/icon.svg", type="image/svg+xml"),
            NOTHING if style is None else tag("link", rel="stylesheet", href=style),
            tag("link", rel="stylesheet", href="/static/style.css"),
            tag("script", src=f"/static/{script}", type="module"),
        ),
        tag(
            "body",
            tag("a", "Skip to the content", href="#main", class_="skip"),
            tag(
                "header",
                tag("span", "kvmsupervisor", class_="name"),
                tag(
                    "nav",
                    *(tag("a", text, href=path, aria_current="page" if path == here else None) for path, text in ways),
                    aria_label="Pages",
                ),
                _who(person),
            ),
            _state(state),
            tag("main", main, id="main", tabindex="-1"),
        ),
        lang="en",
        data_mark=mark,
        data_may=" ".join(role for role in Role if person.may(role)),
    )
    return f"<!DOCTYPE html>\n{document}\n".encode(errors="backslashreplace")


def _who(person: Person) -> Html:
    """By which name somebody is known, and the most that they may."""
    if not person.name:
        return NOTHING
    most = next(role for role in reversed(Role) if person.may(role))
    return tag("span", tag("bdi", visible(person.name, 60)), f" · {most}", class_="who")


def _state(state: State) -> Html:
    """The line about etcd: while all is well it says so quietly; scripts rewrite it."""
    as_of = NOTHING if state.as_of is None else join((" What you see is as of ", time(state.as_of), "."))
    if state.in_step:
        said = join(("In step with etcd, revision ", tag("span", str(state.revision), class_="revision"), "."))
    elif state.as_of is None:
        said = join(("Nothing has been read from etcd yet: ", tag("bdi", visible(state.problem))))
    else:
        said = join(("etcd does not answer: ", tag("bdi", visible(state.problem)), ".", as_of))
    return tag("p", said, id="state", role="status", class_="good" if state.in_step else "bad")


def time(at: str | None) -> Html:
    """A time: of the day in UTC; scripts make an age of it."""
    if at is None:
        return NOTHING
    shown = visible(at, 40)
    people = f"{shown[:-1].replace('T', ' ')} UTC" if shown.endswith("Z") else shown
    return tag("time", people, datetime=shown)


def instance_link(name: str) -> Html:
    """The way to an instance's own page. An id has no special characters of addresses."""
    return tag("a", name, href=f"/instances/{name}")


def not_found(what: str, state: State, person: Person) -> bytes:
    """A page that is not there."""
    main = join((tag("h1", "Not found"), tag("p", visible(what)), tag("p", tag("a", "All instances", href="/"))))
    title = "Not found – kvmsupervisor"
    return page(title=title, here="", state=state, person=person, main=main, script="refresh.js")

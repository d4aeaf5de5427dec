"""A new instance: a form in which every field is a key, and which shows the keys. Scripts send it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvmsupervisor.adapters.web.words import visible
from kvmsupervisor.cluster.host_table import NO_SESSION, UNREADABLE, HostFact
from kvmsupervisor.domain.keys import ID_RULE
from kvmsupervisor.web.frame import State, page
from kvmsupervisor.web.html import NOTHING, Html, join, tag
from kvmsupervisor.web.order import is_host
from kvmsupervisor.web.people import Person


def create_page(facts: Sequence[HostFact], images: Sequence[str], prefix: str, state: State, person: Person) -> bytes:
    """The page.

    Args:
        facts: all hosts.
        images: names in the image library.
        prefix: of the wishes in etcd.
        state: of etcd.
        person: who asks.
    """
    hosts = [fact.host for fact in facts if fact.state not in {NO_SESSION, UNREADABLE} and is_host(fact.host)]
    form = tag(
        "form",
        _group(
            "Instance",
            _field("Name", "", "id", required=True, hint=f"its id in etcd: {ID_RULE}"),
            _field("Description", "description", "description", hint="for people"),
            _choice("Host", "host", "host", hosts, "none yet: nothing runs it"),
            _field("Other hosts", "hosts", "hosts", hint="candidates for failover and drains, in order; * is any"),
        ),
        _group(
            "Machine",
            _field("Memory", "ram", "ram", value="2G", required=True, hint="with M or G"),
            _field("CPUs", "cpus", "cpus", value="2"),
            _field("Network bridge", "bridge", "bridge", hint="empty: the host's BRIDGE_IF; :user needs no bridge"),
            tag(
                "label",
                tag("input", type="checkbox", name="mac", value="auto", checked=True, data_key="mac"),
                " a network card, with an address that no other has ",
                tag("code", "mac"),
            ),
        ),
        _group(
            "Disk",
            _field("Where", "", "place", shown="disk/0", hint="rbd/web1 in Ceph, or file:web1.qcow2 on the host"),
            _field("Size", "", "size", shown="size=", value="20G", hint="made when missing, grown when smaller"),
            _choice("First content", "", "from", images, "empty", shown="from="),
        ),
        _group(
            "First boot",
            _area("User data", "user-data", "user-data", "cloud-config, a script, or Ignition JSON"),
            _area("Further keys", "", "more", "one key=value a line, such as spice_port=5901"),
        ),
        tag("p", "", id="refusal", class_="problem refusal", role="alert"),
        tag(
            "label",
            tag("input", type="checkbox", name="force"),
            " write it all the same (--force)",
            id="forced",
            hidden=True,
        ),
        tag("p", tag("button", "Create", class_="go"), class_="buttons"),
        id="create",
        method="post",
        data_prefix=prefix,
    )
    shown = tag(
        "section",
        tag("h2", "What is written"),
        tag("pre", "", id="keys"),
        tag("h2", "The same as a command"),
        tag("pre", "", id="command"),
        class_="preview",
    )
    noscript = tag("noscript", tag("p", "This form needs scripts; `kvmsupervisor create` does the same."))
    main = join((tag("h1", "Create an instance"), noscript, tag("div", form, shown, class_="making")))
    title = "Create – kvmsupervisor"
    return page(title=title, here="/create", state=state, person=person, main=main, script="create.js")


def _group(title: str, *fields: Html) -> Html:
    return tag("fieldset", tag("legend", title), *fields)


def _label(title: str, key: str) -> tuple[str, Html]:
    return f"{title} ", tag("code", key) if key else NOTHING


def _field(
    title: str, key: str, name: str, *, value: str = "", shown: str = "", required: bool = False, hint: str = ""
) -> Html:
    entry = tag("input", name=name, value=value, data_key=key or None, required=required, autocomplete="off")
    return tag("label", *_label(title, key or shown), entry, tag("small", hint) if hint else None, class_="field")


def _choice(title: str, key: str, name: str, values: Iterable[str], none: str, *, shown: str = "") -> Html:
    options = (tag("option", visible(one), value=one) for one in values)
    entry = tag("select", tag("option", none, value=""), *options, name=name, data_key=key or None)
    return tag("label", *_label(title, key or shown), entry, class_="field")


def _area(title: str, key: str, name: str, hint: str) -> Html:
    entry = tag("textarea", name=name, rows="4", data_key=key or None, spellcheck="false")
    return tag("label", *_label(title, key), entry, tag("small", hint), class_="field")

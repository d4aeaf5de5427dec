"""What a page, or a program, asks to be done, as JSON. Pure.

The words are those of the command line: `{"act": "stop", "instances": ["web1", "web2"], "now": true}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any, TypeVar

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.host_wish import Mode
from kvmsupervisor.domain.keys import ID_RULE, HostName, InstanceId, parse_id
from kvmsupervisor.domain.values import Unfit, host_name, nearest, plain, show, strange

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

INSTANCES_MOST = 1000
"""Instances of one order. Arbitrary: each is three requests to etcd, and the answer is waited for."""

KEY_MOST = 200
"""Characters of a key's name. Arbitrary: the known ones have at most a tenth."""


class Act(StrEnum):
    """What is to be done; the names are the commands'."""

    CREATE = "create"
    SET = "set"
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    RESET = "reset"
    MOVE = "move"
    DELETE = "delete"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    CONFIRM = "confirm-removal"


FIELDS: Mapping[Act, tuple[str, ...]] = {
    Act.CREATE: ("instances", "keys", "force"),
    Act.SET: ("instances", "keys", "unset", "force"),
    Act.START: ("instances",),
    Act.STOP: ("instances", "now"),
    Act.RESTART: ("instances", "now"),
    Act.RESET: ("instances",),
    Act.MOVE: ("instances", "host", "force", "dry_run"),
    Act.DELETE: ("instances",),
    Act.DRAIN: ("host", "mode", "force", "dry_run"),
    Act.UNDRAIN: ("host", "return"),
    Act.CONFIRM: ("host", "instances"),
}
"""What each act takes. An act for snapshots is a row here, a branch in `acts.py` and a button."""

NEEDED: Mapping[Act, tuple[str, ...]] = {
    act: tuple(name for name in names if name in {"instances", "host"}) for act, names in FIELDS.items()
}


@frozen(kw_only=True)
class Order:
    """One order.

    Attributes:
        act: what is to be done.
        instances: to which, each once, in the order in which they are named.
        host: the host that it is about, or to which they move; None where it takes none.
        keys: key name → value.
        unset: names of keys to delete.
        force: the command's `--force`.
        now: its `--now`.
        dry_run: only tell how it would go.
        mode: of a drain.
        back: of `undrain`: how to take back what stands elsewhere; None to leave it there.
    """

    act: Act
    instances: tuple[InstanceId, ...] = ()
    host: HostName | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    force: bool = False
    now: bool = False
    dry_run: bool = False
    mode: Mode = Mode.LIVE
    back: Mode | None = None


def parse_order(body: bytes) -> Order:
    """Read an order.

    Raises:
        Unfit: it cannot be understood; the message says what was found, and what would be right.
    """
    try:
        found = json.loads(body, object_pairs_hook=_each_once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise Unfit("the body is no JSON") from None
    if not isinstance(found, dict):
        raise Unfit('the body is a JSON object, such as {"act": "start", "instances": ["web1"]}')
    act = _one_of(found.get("act"), "act", Act)
    names = ("act", *FIELDS[act])
    for name in found:
        if name not in names:
            near = nearest(name, {plain(one): one for one in names})
            meant = f"did you mean {near}?" if near is not None else f"there are {', '.join(names)}"
            raise Unfit(f"{act} takes no {show(name)}; {meant}")
    for name in NEEDED[act]:
        if name not in found:
            raise Unfit(f"{act} needs {name}")
    order = Order(
        act=act,
        instances=_list(found.get("instances", []), "instances", _instance),
        host=_host(found["host"]) if "host" in found else None,
        keys=_keys(found.get("keys", {})),
        unset=_list(found.get("unset", []), "unset", _key),
        force=_switch(found, "force"),
        now=_switch(found, "now"),
        dry_run=_switch(found, "dry_run"),
        mode=_one_of(found.get("mode", Mode.LIVE), "mode", Mode),
        back=_back(found.get("return")),
    )
    _check(order)
    return order


def _check(order: Order) -> None:
    if "instances" in FIELDS[order.act] and not order.instances:
        raise Unfit("instances is empty: there is nothing to do")
    if len(order.instances) > INSTANCES_MOST:
        raise Unfit(f"instances names {len(order.instances)}; one order has at most {INSTANCES_MOST}")
    if order.act is Act.CREATE and len(order.instances) > 1:
        raise Unfit("create makes one instance; instances names several")
    if order.act is Act.CREATE and not order.keys:
        raise Unfit("create needs keys")
    if order.act is Act.SET and not order.keys and not order.unset:
        raise Unfit("set needs keys, or unset")
    if both := sorted(order.keys.keys() & set(order.unset)):
        raise Unfit(f"{', '.join(both)}: both in keys and in unset")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Unfit(f"{show(next(name for name in names if names.count(name) > 1))} stands there twice")
    return found


def _one_of(found: object, what: str, kind: type[E]) -> E:
    values = ", ".join(kind)
    if isinstance(found, str):
        try:
            return kind(found)
        except ValueError:
            raise Unfit(f"{what} is {show(found)}; right would be one of {values}") from None
    raise Unfit(f"{what} is one of {values}")


def _list(found: object, what: str, parse: Callable[[object], T]) -> tuple[T, ...]:
    if not isinstance(found, list):
        raise Unfit(f"{what} is a list")
    return tuple(dict.fromkeys(map(parse, found)))


def _instance(found: object) -> InstanceId:
    if isinstance(found, str) and (instance := parse_id(found)) is not None:
        return instance
    held = strange(found) if isinstance(found, str) else None
    said = "" if held is None else f", which holds {held},"
    raise Unfit(f"{show(str(found))}{said} is no id: {ID_RULE}")


def _host(found: object) -> HostName:
    if not isinstance(found, str):
        raise Unfit("host is the name of a host")
    try:
        return HostName(host_name(found))
    except Unfit as unfit:
        raise Unfit(f"{show(found)} is no host: {unfit}") from None


def is_host(name: str) -> bool:
    """Whether an order can name this host: etcd may have names that nobody could write in a key."""
    try:
        _host(name)
    except Unfit:
        return False
    return True


def _key(found: object) -> str:
    if isinstance(found, str) and len(found) <= KEY_MOST and found.isprintable() and not _has_gaps(found):
        return found
    raise Unfit(f"{show(str(found))} cannot be the name of a key; names are like ram, disk/1 or nic/1/mac")


def _has_gaps(name: str) -> bool:
    return " " in name or not all(name.split("/"))


def _keys(found: object) -> dict[str, str]:
    if not isinstance(found, dict):
        raise Unfit('keys is an object of texts, such as {"ram": "2G"}')
    for name, value in found.items():
        if not isinstance(value, str):
            raise Unfit(f"keys: {_key(name)} is {show(json.dumps(value))}; every value is a text in quotes")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unfit(f"keys: {_key(name)} is no text: it has half a character (a lone surrogate)") from None
    return {_key(name): value for name, value in found.items()}


def _switch(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise Unfit(f"{name} is true or false")
    return value


def _back(found: object) -> Mode | None:
    if found is None:
        return None
    mode = _one_of(found, "return", Mode)
    if mode is Mode.STOP:
        raise Unfit("return is live or cold")
    return mode

"""`mac=auto`: whoever writes it puts an address there that no NIC of the cluster has."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cluster.overview import list_all
from kvmsupervisor.domain.keys import InstanceId, Layout
from kvmsupervisor.domain.values import Unfit, mac_address

AUTO = "auto"

_MAC_KEY = re.compile(r"mac|nic/[0-9]+/mac")


def asks(name: str, value: str) -> bool:
    """Whether this assignment asks for an address."""
    return _MAC_KEY.fullmatch(name) is not None and value.strip().lower() == AUTO


async def fill_in(
    store: Store, layout: Layout, instance: InstanceId, values: Mapping[str, str]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Replace `auto` by an address. A NIC whose present address nobody else has keeps that.

    Returns:
        The values to write, and a note for each address.
    """
    wanted = [name for name, value in values.items() if asks(name, value)]
    if not wanted:
        return values, ()
    prefix = layout.wishes_prefix
    present: dict[tuple[str, str], str] = {}
    for kv in (await list_all(store, prefix)).kvs:
        its_id, _, name = kv.key.decode("utf-8", "replace").removeprefix(prefix).partition("/")
        if _MAC_KEY.fullmatch(name):
            present[its_id, name] = _address(kv.value.decode("utf-8", "replace").strip())
    filled, notes = dict(values), []
    for name in wanted:
        others = {mac for nic, mac in present.items() if nic != (instance, name)}
        others |= {_address(value.strip()) for key, value in filled.items() if _MAC_KEY.fullmatch(key) and key != name}
        mine = present.get((instance, name))
        if mine is not None and mine not in others and _is_address(mine):
            filled[name] = mine
            notes.append(f"`{name}` stays {mine}, which no other NIC has")
        else:
            filled[name] = unused(others)
            notes.append(f"`{name}` is {filled[name]}")
    return filled, tuple(notes)


def unused(others: Iterable[str]) -> str:
    """A random address that is none of `others`.

    It is locally administered, in the quadrant for such use (second digit 2; IEEE 802c): 48 bits, of which 44 are
    drawn, so that other programs on the same network do not draw it, either. `52:54:00:…`, which many use, has 24.
    """
    taken = set(others)
    while True:
        digits = f"{secrets.randbits(4):x}2{secrets.randbits(40):010x}"
        address = ":".join(re.findall("..", digits))
        if address not in taken:
            return address


def _is_address(text: str) -> bool:
    try:
        return mac_address(text) == text
    except Unfit:
        return False


def _address(text: str) -> str:
    """An address in its usual spelling; other text as it is."""
    try:
        return mac_address(text)
    except Unfit:
        return text

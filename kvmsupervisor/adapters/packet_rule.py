"""A rule of the kernel's packet filter that keeps the users of QEMUs from TCP ports of the hosts' own services.

One table of nftables, which nobody else has: no other table is read or changed, and whoever manages the host's own
rules keeps them. It goes by the user who has made a socket (`meta skuid`, nft(8)), so it holds for a QEMU whatever its
guest has made of it, and for a guest's user-mode network, which QEMU connects for it. It stays when the supervisor
ends, as guests do.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Iterable, Sequence

from kvmsupervisor.aio import end_tool

ANSWER_S = 10.0
"""How long nft may take. Arbitrary; it takes 20 ms."""

PLACES = ("/usr/sbin", "/sbin")
"""Where nft is, besides PATH: that of a service may lack them."""


class NoRule(Exception):
    """The rule cannot be had, or not be looked at. The message says why."""


def table_of(first: int, last: int) -> str:
    """The name of the table for these users. Another supervisor of the host has other ones."""
    return f"kvmsupervisor_{first}_{last}"


def ruleset(first: int, last: int, ports: Iterable[int]) -> str:
    """What nft reads: the table with its one rule, made or replaced in one step."""
    table, those = table_of(first, last), ", ".join(map(str, sorted(ports)))
    return (
        # Made first, so that it is there to be deleted (nft(8), "add" and "delete").
        f"table inet {table}\n"
        f"delete table inet {table}\n"
        f"table inet {table} {{\n"
        "  chain output {\n"
        "    type filter hook output priority 0; policy accept;\n"
        f"    meta skuid {first}-{last} tcp dport {{ {those} }} reject with tcp reset\n"
        "  }\n"
        "}\n"
    )


def ports_in(listed: str, first: int, last: int) -> frozenset[int]:
    """The ports of the rule for these users, in what `nft list table` prints; none where it is not there as made."""
    found = re.search(rf"meta skuid {first}-{last} tcp dport ([^\n]*) reject with tcp reset\n", listed)
    if found is None or not re.search(r"type filter hook output priority [^;\n]*; policy accept;", listed):
        return frozenset()
    return frozenset(map(int, re.findall(r"\d+", found[1])))


class PacketRule:
    """The rule for the users of one range.

    Several may keep it: a supervisor, and containers in single mode. So ports that others have put in stay in it.

    Args:
        first: the first of them.
        last: the last.
        ports: that they are kept from; some.
        places: where nft may be, besides PATH.
    """

    def __init__(self, first: int, last: int, ports: Iterable[int], places: Sequence[str] = PLACES) -> None:
        self._places = places
        self._first, self._last = first, last
        self._ports = frozenset(ports)

    async def keep(self) -> bool:
        """Make the rule, unless it is there; whether it had to be made.

        Raises:
            NoRule: it cannot be had.
        """
        there = await self._listed()
        if self._ports <= there:
            return False
        await self._nft("-f", "-", told=ruleset(self._first, self._last, self._ports | there).encode())
        return True

    async def _listed(self) -> frozenset[int]:
        try:
            listed = await self._nft("list", "table", "inet", table_of(self._first, self._last))
        except NoRule:
            return frozenset()
        return ports_in(listed.decode(errors="replace"), self._first, self._last)

    async def _nft(self, *words: str, told: bytes = b"") -> bytes:
        tool = shutil.which("nft", path=os.pathsep.join((os.environ.get("PATH", ""), *self._places)))
        if tool is None:
            raise NoRule("nft is not installed (package nftables)")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(tool, *words, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            async with asyncio.timeout(ANSWER_S):
                out, said = await process.communicate(told)
        except TimeoutError:
            raise NoRule(f"nft has not ended after {ANSWER_S:g} s") from None
        finally:
            await end_tool(process)
        if process.returncode != 0:
            words_of_it = said.decode(errors="replace").strip().splitlines()
            raise NoRule(f"nft refuses: {words_of_it[0] if words_of_it else 'without a word'}")
        return out

"""The rule by which QEMUs' users do not reach etcd, in the real packet filter of a network namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.adapters.packet_rule import NoRule, PacketRule

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has a packet filter and other users")

FIRST, LAST, PORT, OTHER = 70_000, 79_999, 2379, 6789
OURS = "kvmsupervisor_70000_79999"
FOREIGN = "table inet theirs {\n\tchain output {\n\t\ttype filter hook output priority filter; policy accept;\n\t}\n}\n"


def inside(play: str) -> Any:
    """What a function of this module returns in a network namespace of its own."""
    words = ("unshare", "--net", sys.executable, "-c", f"from {__name__} import *; print(json.dumps({play}()))")
    path = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    told = {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nft(*words: str, told: str = "") -> str:
    return subprocess.run(("nft", *words), input=told, check=True, capture_output=True, text=True).stdout


def may(uid: int, port: int, host: str = "127.0.0.1") -> bool:
    """Whether a process of that user can connect."""
    "".encode("idna")  # loaded while its file can be read
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).setuid(uid)
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def served() -> contextlib.ExitStack:
    subprocess.run(("ip", "link", "set", "lo", "up"), check=True)
    stack = contextlib.ExitStack()
    for port in (PORT, OTHER):
        stack.enter_context(socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True))
    return stack


def rule(*ports: int) -> PacketRule:
    return PacketRule(FIRST, LAST, ports or (PORT,))


def kept_from() -> list[bool]:
    with served():
        asyncio.run(rule().keep())
        users = (FIRST, 70_001, LAST, LAST + 1, FIRST - 1, 65_534, 0)
        return [
            *(may(uid, PORT, host) for uid in users for host in ("127.0.0.1", "::1")),
            *(may(uid, OTHER) for uid in users),
        ]


def test_its_users_reach_those_ports_no_more() -> None:
    """Law: by IPv4 and IPv6; other users, and other ports such as Ceph's, are as before."""
    closed, open_ = [False] * 6, [True] * 8
    assert inside("kept_from") == [*closed, *open_, *[True] * 7]


def beside_others() -> list[Any]:
    nft("-f", "-", told=FOREIGN)
    ours, found = rule(), list[Any]()

    async def play() -> None:
        found.append([await ours.keep(), await ours.keep()])
        # Another supervisor of this host, with users of its own; and this one with other ports.
        theirs = PacketRule(90_000, 90_100, [PORT])
        await theirs.keep()
        found.append(await ours.keep())
        nft("delete", "table", "inet", "kvmsupervisor_90000_90100")
        # A container in single mode, which has the same users and another etcd.
        found.append([await rule(OTHER).keep(), await ours.keep(), await rule(OTHER).keep()])
        found.append(nft("list", "table", "inet", OURS))
        # Somebody opens it.
        nft("-f", "-", told=f"flush chain inet {OURS} output\n")
        found.append(await ours.keep())
        # Somebody loads the rules of the host anew.
        nft("flush", "ruleset")
        nft("-f", "-", told=FOREIGN)
        found.append(await ours.keep())
        nft("delete", "table", "inet", OURS)

    asyncio.run(play())
    return [*found, nft("list", "ruleset")]


def test_it_is_one_table_of_its_own() -> None:
    """Law: made once, and again where it is gone; who keeps it beside us adds its ports; no other table is touched."""
    once, beside, shared, listed, *again, left = inside("beside_others")
    assert (once, beside, shared, again) == ([True, False], False, [True, False, False], [True, True])
    assert f"{{ {PORT}, {OTHER} }}" in listed
    assert left == FOREIGN


def refused() -> str:
    try:
        # The rights over this namespace are given up.
        ctypes.CDLL(None).setuid(70_001)
        asyncio.run(rule().keep())
    except NoRule as error:
        return str(error)
    return ""


def test_without_the_rights_it_is_told() -> None:
    """Law: where the rule cannot be had there is a reason, with nft's own words."""
    assert inside("refused").startswith("nft refuses: ")


async def test_without_nft_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: and where there is no nft."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoRule, match="package nftables"):
        await PacketRule(FIRST, LAST, [PORT], places=()).keep()

"""Consoles that a supervisor hands out: real QEMUs, real users."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsupervisor.domain.names import CONSOLES_FOLDER, CONSOLES_SOCKET
from kvmsupervisor.domain.status import Phase
from tests.e2e.test_live_move import pair
from tests.support.cluster import DEADLINE_S, Host, Hosts, Keys

NOBODY = 65534


def door_of(host: Host) -> Path:
    return host.run_dir / CONSOLES_FOLDER / CONSOLES_SOCKET


@contextlib.contextmanager
def asked(host: Host, **request: object) -> Iterator[tuple[dict[str, Any], socket.socket | None]]:
    """What a request is answered with, and the connection that came with it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(DEADLINE_S)
        end.connect(str(door_of(host)))
        end.send(json.dumps(request).encode())
        data, fds, _, _ = socket.recv_fds(end, 4096, 1)
        got = None
        if fds:
            got = socket.socket(fileno=fds[0])
            got.settimeout(DEADLINE_S)
        with got or contextlib.nullcontext():
            yield json.loads(data), got


@pytest.mark.parametrize("display", ["std", "virtio", "qxl"])
def test_a_display_goes_on_without_its_supervisor(keys: Keys, hosts: Hosts, tiny: str, display: str) -> None:
    """Law: QEMU itself serves the viewer, confined as it is; a supervisor's end, and its successor, cut nothing."""
    host = hosts().start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, display=display)
    qemu = host.wait_running("one")["one"]
    with asked(host, console="display", instance="one", who="alice") as (answer, viewer):
        assert answer == {"is": "display"}
        assert viewer is not None
        assert viewer.recv(12) == b"RFB 003.008\n"
        host.kill9()
        viewer.sendall(b"RFB 003.008\n")
        assert viewer.recv(2) == b"\x01\x01"
        host.start()
        assert host.wait_running("one")["one"] == qemu
        viewer.sendall(b"\x01")
        assert viewer.recv(4) == bytes(4)
        viewer.sendall(b"\x01")
        assert viewer.recv(4, socket.MSG_WAITALL)[:2] > b"\x00\x00"
        # A second one, of the successor, beside the first.
        with asked(host, console="display", instance="one") as (_, second):
            assert second is not None
            assert second.recv(12) == b"RFB 003.008\n"


def test_what_has_no_display(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: refused in words; a display that is wanted is pending until the machine starts again, and is there then."""
    host = hosts().start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, shutdown_timeout=0)
    before = host.wait_running("one")["one"]
    with asked(host, console="display", instance="one") as (answer, _):
        assert "set the key display" in answer["refused"]
    keys.put("one", display="std")
    host.wait_for("one", lambda s: s.pending == ("display",))
    with asked(host, console="display", instance="one") as (answer, _):
        assert "set the key display" in answer["refused"]
    keys.put("one", restart_request="now")
    host.wait_for("one", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    with asked(host, console="display", instance="one") as (_, viewer):
        assert viewer is not None
        assert viewer.recv(12) == b"RFB 003.008\n"


def test_a_live_move(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: it moves with its display; a viewer of the source is let go of, and the target has the display at once."""
    alpha, beta = pair(hosts)
    keys.machines("alpha", "one", ram=64, extra_flags=tiny, display="virtio")
    alpha.wait_running("one")
    with (
        asked(alpha, console="display", instance="one") as (_, viewer),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as serial,
    ):
        assert viewer is not None
        assert viewer.recv(12) == b"RFB 003.008\n"
        serial.settimeout(DEADLINE_S)
        serial.connect(str(door_of(alpha)))
        serial.send(json.dumps({"console": "serial", "instance": "one"}).encode())
        keys.put("one", host="beta")
        beta.wait_running("one")
        assert len(alpha.events("move.given")) == 1
        assert viewer.recv(12) == b""
        last = b""
        while data := serial.recv(4096):
            last = data
        assert json.loads(last) == {"is": "gone"}
    with asked(beta, console="display", instance="one") as (_, viewer):
        assert viewer is not None
        assert viewer.recv(12) == b"RFB 003.008\n"
    with asked(alpha, console="display", instance="one") as (answer, _):
        assert answer == {"refused": "one is not on this host"}


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
@pytest.mark.parametrize("let_in", [True, False])
def test_who_may_ask(keys: Keys, hosts: Hosts, tiny: str, let_in: bool) -> None:
    """Law: another user gets to the door with the group alone, and in no case to QMP, the log or the keyboard."""
    host = hosts(KVM_CONSOLE_GROUP=str(NOBODY) if let_in else "").start()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, display="std")
    host.wait_running("one")
    folder = host.run_dir / "one"
    tries = {
        "door": (door_of(host), "SOCK_SEQPACKET"),
        "qmp": (folder / "qmp.sock", "SOCK_STREAM"),
        "spare": (folder / "qmp-spare.sock", "SOCK_STREAM"),
        "console": (folder / "console.sock", "SOCK_STREAM"),
    }
    program = "\n".join(
        [
            "import os, socket, sys",
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})",
            "def tell(name, found): print(name, 'yes' if found else 'no')",
            *(
                f"tell({name!r}, socket.socket(socket.AF_UNIX, socket.{kind}).connect_ex({str(path)!r}) == 0)"
                for name, (path, kind) in tries.items()
            ),
            f"tell('log', os.access({str(folder / 'console.log')!r}, os.R_OK))",
        ]
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    expected = {**dict.fromkeys(tries, "no"), "log": "no"} | ({"door": "yes"} if let_in else {})
    assert dict(line.split() for line in done.stdout.splitlines()) == expected

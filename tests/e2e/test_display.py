"""A guest's display: who gets in, who has the port, and where the password is not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Host, Hosts, Keys
from tests.support.etcd import free_port
from tests.support.spice import LinkResult, link

PASSWORD = "Corr3ct,horse=battery"  # noqa: S105 - nobody's
LOCALHOST = "127.0.0.1"


@pytest.fixture
def host(hosts: Hosts) -> Host:
    """A supervisor that runs."""
    return hosts().start()


# --- who gets in ----------------------------------------------------------------------------------------------


def test_a_display_without_a_password(keys: Keys, host: Host, tiny: str) -> None:
    """Law: `spice_port` is enough for a viewer, which needs no password; it is for the host itself alone (DESIGN 5)."""
    port = free_port()
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, spice_port=port)
    host.wait_running("one")
    assert link(LOCALHOST, port) is LinkResult.OK
    # Nobody listens on any other address.
    with socket.socket() as beside:
        beside.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        beside.bind(("127.0.0.2", port))
        beside.listen()


def test_a_display_with_a_password(keys: Keys, host: Host, tiny: str) -> None:
    """Law: the right password opens it, a wrong one and none do not; a changed one is asked for after a restart."""
    port = free_port()
    keys.machines(
        host.name, "one", ram=16, extra_flags=tiny, spice_port=port, spice_password=PASSWORD, shutdown_timeout=0
    )
    before = host.wait_running("one")["one"]
    assert link(LOCALHOST, port, password=PASSWORD) is LinkResult.OK
    assert link(LOCALHOST, port, password=f"{PASSWORD}x") is LinkResult.PERMISSION_DENIED
    assert link(LOCALHOST, port) is LinkResult.PERMISSION_DENIED

    keys.put("one", spice_password="another")
    status = host.wait_for("one", lambda s: "spice_password" in s.pending)
    assert status.pid == before.pid
    assert link(LOCALHOST, port, password=PASSWORD) is LinkResult.OK
    keys.put("one", restart_request="now")
    host.wait_for("one", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})
    assert link(LOCALHOST, port, password="another") is LinkResult.OK
    assert link(LOCALHOST, port, password=PASSWORD) is LinkResult.PERMISSION_DENIED


def test_an_address_of_its_own(keys: Keys, host: Host, tiny: str) -> None:
    """Law: the server listens on `spice_addr`, so two of one port are no conflict while their addresses differ."""
    port = free_port()
    for one, address in (("one", "127.0.0.2"), ("two", "127.0.0.3")):
        keys.machines(host.name, one, ram=16, extra_flags=tiny, spice_port=port, spice_addr=address)
    host.wait_running("one", "two")
    assert link("127.0.0.2", port) is link("127.0.0.3", port) is LinkResult.OK
    with pytest.raises(ConnectionRefusedError):
        link(LOCALHOST, port)


# --- who has the port -----------------------------------------------------------------------------------------


def test_two_of_one_port(keys: Keys, host: Host, tiny: str) -> None:
    """Law: the second one waits and names the first, a new supervisor does so, too; its turn comes."""
    port = free_port()
    wishes = {"ram": 16, "extra_flags": tiny, "spice_port": port, "shutdown_timeout": 0}
    keys.machines(host.name, "first", **wishes)
    first = host.wait_running("first")["first"]
    keys.machines(host.name, "second", **wishes)
    expected = f"port {port} on {LOCALHOST} belongs to instance first"
    status = host.wait_for("second", lambda s: s.phase is Phase.WAITING and "spice_port" in s.reason)
    assert expected in status.reason
    keys.wait_status("second", lambda s: expected in s.reason)

    host.kill9()
    host.start()
    host.wait_for("second", lambda s: s.phase is Phase.WAITING and expected in s.reason)
    assert host.wait_running("first")["first"] == first

    keys.put("first", power="off")
    host.wait_running("second")
    assert link(LOCALHOST, port) is LinkResult.OK
    keys.put("first", power="on")
    host.wait_for("first", lambda s: s.phase is Phase.WAITING and "belongs to instance second" in s.reason)


def test_every_address_is_each_of_them(keys: Keys, host: Host, tiny: str) -> None:
    """Law: who listens on all addresses has the port on each of them."""
    port = free_port()
    keys.machines(host.name, "all", ram=16, extra_flags=tiny, spice_port=port, spice_addr="0.0.0.0")
    host.wait_running("all")
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, spice_port=port)
    host.wait_for(
        "one", lambda s: s.phase is Phase.WAITING and f"{port} on 127.0.0.1 belongs to instance all" in s.reason
    )


def test_a_port_of_another_program(keys: Keys, host: Host, tiny: str) -> None:
    """Law: told before QEMU is started, with what would help; once the program is gone it starts by itself."""
    with socket.socket() as program:
        program.bind((LOCALHOST, 0))
        program.listen()
        port = program.getsockname()[1]
        keys.machines(host.name, "one", ram=16, extra_flags=tiny, spice_port=port)
        status = host.wait_for("one", lambda s: s.phase is Phase.WAITING and "spice_port" in s.reason)
        assert "another program listens there" in status.reason
        assert "give the instance another port" in status.reason
        assert host.events("instance.spawned") == []
    host.wait_running("one")
    assert link(LOCALHOST, port) is LinkResult.OK


def test_an_address_that_the_host_does_not_have(keys: Keys, host: Host, tiny: str) -> None:
    """Law: it waits, and says what the system says of that address."""
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, spice_port=free_port(), spice_addr="192.0.2.77")
    status = host.wait_for("one", lambda s: s.phase is Phase.WAITING and "192.0.2.77" in s.reason)
    assert "Cannot assign requested address" in status.reason


# --- where the password is not --------------------------------------------------------------------------------


def everything_said(keys: Keys, host: Host, instance: str, pids: tuple[int, ...]) -> dict[str, str]:
    """All that people and programs who are not to know the password may see, by where."""
    said = {"log": host.log, "metrics": host.metrics()}
    said |= {path: host._fetch(path)[1] for path in ("/api/v1/instances", f"/api/v1/instances/{instance}")}
    for pid in pids:
        for name in ("cmdline", "environ", "status"):
            said[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    for key in keys.names(keys.layout.prefix):
        if not key.endswith("/spice_password"):
            said[key] = (keys.get(key) or b"").decode(errors="replace")
    for path in host.folder.rglob("*"):
        if path.is_file() and path.name != "spice-password":
            said[str(path)] = path.read_bytes().decode(errors="replace")
    commands = [
        *(["show", instance], ["show", instance, "-o", "json"], ["list", "-o", "wide"], ["list", "-o", "json"]),
        *(["check", instance], ["check", "-o", "json"], ["argv", instance], ["argv", instance, "--shell"]),
    ]
    for command in commands:
        done = host.cli(*command)
        said[" ".join(command)] = done.stdout + done.stderr
    return said


def where(secret: str, said: dict[str, str]) -> list[str]:
    """Who tells the secret, in whatever spelling of JSON or shell."""
    spellings = {secret, json.dumps(secret)[1:-1], secret.replace(",", ",,")}
    return [place for place, text in said.items() if any(spelling in text for spelling in spellings)]


def test_the_password_is_nowhere(keys: Keys, host: Host, tiny: str) -> None:
    """Law: not in a command line, record, status, HTTP, log, nor in what commands print; nor in a file."""
    keys.machines(host.name, "one", ram=16, extra_flags=tiny, spice_port=free_port(), spice_password=PASSWORD)
    qemu = host.wait_running("one")["one"]
    keys.wait_status("one", lambda s: s.phase is Phase.RUNNING)
    said = everything_said(keys, host, "one", (qemu.pid, host.pid))
    assert len(said) > 20
    assert where("spice_port", said) != []
    assert where(PASSWORD, said) == []
    assert list(host.folder.rglob("spice-password")) == []

    # Commands that write it do not say it either, and a changed one is as silent as the first.
    other = "Anoth3r,horse=battery"
    done = host.cli("set", "one", f"spice_password={other}")
    assert done.returncode == 0, done.stderr
    assert where(PASSWORD, {"set": done.stdout + done.stderr}) == where(other, {"set": done.stdout + done.stderr}) == []
    host.wait_for("one", lambda s: "spice_password" in s.pending)
    said = everything_said(keys, host, "one", (qemu.pid, host.pid))
    assert where(PASSWORD, said) == where(other, said) == []


def test_a_password_that_is_refused_is_not_repeated(keys: Keys, host: Host, tiny: str) -> None:
    """Law: a problem says what is wrong with a password, and does not show it."""
    refused_ones = {"long": "L0ng" * 16, "bell": "B3ll\a" * 3}
    for one, refused in refused_ones.items():
        keys.machines(host.name, one, ram=16, extra_flags=tiny, spice_port=free_port(), spice_password=refused)
        status = host.wait_for(one, Phase.INVALID)
        assert any(problem.startswith("spice_password: ") for problem in status.problems)
        assert "at most 60 bytes" in str(status.problems)
        done = host.cli("set", one, f"spice_password={refused}")
        assert done.returncode != 0
        assert where(refused[:4], {"set": done.stdout + done.stderr}) == []
    said = everything_said(keys, host, "long", ())
    for refused in refused_ones.values():
        assert where(refused[:4], said) == []

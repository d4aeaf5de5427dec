"""The command line against a real etcd: the same words come out as with the fake."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from kvmsupervisor.adapters.etcd.client import Etcd
from kvmsupervisor.adapters.etcd.config import EtcdConfig
from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.main import cli
from kvmsupervisor.domain.status import Phase, Status
from tests.cli.conftest import NOW, SINCE
from tests.support.etcd import EtcdServer

Run = Callable[..., Result]


@pytest.fixture
def run(etcd_server: EtcdServer, etcd_prefix: str) -> Run:
    """Run the command line below a prefix of its own."""
    environ = {"KVM_HOSTNAME": "alpha", "ETCD_ENDPOINTS": etcd_server.endpoint, "KVM_PREFIX": etcd_prefix}

    def invoke(*args: str) -> Result:
        tools = Tools(environ=environ, now=lambda: NOW, settle_s=0)
        return CliRunner().invoke(cli, args, obj=tools, catch_exceptions=False)

    return invoke


def test_an_instance_comes_changes_and_goes(run: Run, etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """Create, refuse to create again, set, list, check and delete do what they say, in real transactions."""
    etcd_server.ctl("put", f"{etcd_prefix}/1/lock", "garbage")
    etcd_server.ctl("put", f"{etcd_prefix}supervisor/hosts/alpha", "{}")
    assert run("create", "1", "host=alpha", "ram=1G").exit_code == 0
    assert run("create", "1", "host=alpha", "ram=1G").exit_code == 1
    assert run("set", "1", "ram=2G", "cpus=2", "--unset", "mac").exit_code == 0
    assert run("stop", "1").exit_code == 0
    (found,) = json.loads(run("list", "-o", "json").stdout)
    assert (found["id"], found["phase"]) == ("1", "waiting")
    assert run("check").exit_code == 1
    assert etcd_server.ctl("get", f"{etcd_prefix}/1/ram", "--print-value-only") == "2G\n"
    assert run("delete", "1", "--yes").exit_code == 0
    keys = etcd_server.ctl("get", "--prefix", f"{etcd_prefix}/", "--keys-only").split()
    assert keys == [f"{etcd_prefix}/1/lock"]


async def litter(server: EtcdServer, prefix: str, count: int) -> None:
    """Write keys that mean nothing."""
    client = Etcd(EtcdConfig(endpoints=(server.endpoint,)))
    try:
        for number in range(count):
            await client.put(f"{prefix}junk{number}", b"x")
    finally:
        await client.close()


def test_an_instance_with_more_keys_than_a_transaction_takes(
    run: Run, etcd_server: EtcdServer, etcd_prefix: str
) -> None:
    """A transaction of etcd has at most 128 operations; set and delete stay below."""
    etcd_server.ctl("put", f"{etcd_prefix}supervisor/hosts/alpha", "{}")
    assert run("create", "1", "host=alpha", "ram=1G").exit_code == 0
    asyncio.run(litter(etcd_server, f"{etcd_prefix}/1/", 150))
    assert run("set", "1", "ram=2G").exit_code == 0
    assert run("delete", "1", "--yes").exit_code == 0
    assert etcd_server.ctl("get", "--prefix", f"{etcd_prefix}/", "--keys-only").split() == []


def test_wait_sees_what_a_supervisor_writes(run: Run, etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """The wait ends with the status that a host writes after it saw the command's write."""

    def supervisor() -> None:
        while not etcd_server.ctl("get", f"{etcd_prefix}/1/power"):
            pass
        status = Status(id="1", host="alpha", phase=Phase.RUNNING, reason="up", since=SINCE, revision=2**40, pid=77)
        etcd_server.ctl("put", f"{etcd_prefix}supervisor/instances/1", status.to_json().decode())

    etcd_server.ctl("put", f"{etcd_prefix}supervisor/hosts/alpha", "{}")
    run("create", "1", "host=alpha", "ram=1G")
    acting = threading.Thread(target=supervisor)
    acting.start()
    result = run("start", "1", "--wait", "--timeout", "30")
    acting.join()
    assert (result.exit_code, result.stdout) == (0, "1: running on alpha, pid 77\n")


def test_a_value_that_etcd_does_not_take(run: Run, etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """More than its 1.5 MiB at once, by --force: refused, told briefly, and the instance is as it was."""
    assert run("create", "1", "ram=1G").exit_code == 0
    result = run("set", "1", "ram=2G", f"x-big={'b' * 1_600_000}", "--force")
    assert result.exit_code == 1
    assert len(result.stderr) < 1000
    assert etcd_server.ctl("get", "--print-value-only", f"{etcd_prefix}/1/ram").strip() == "1G"
    # What fits is taken, and is in nobody's way.
    assert run("set", "1", f"x-big={'b' * 1_400_000}", "--force").exit_code == 0
    for args in (("list",), ("show", "1"), ("check",)):
        assert len(run(*args).stdout) < 2000
    assert run("delete", "1", "--yes").exit_code == 0


def test_somebody_who_writes_in_a_loop(run: Run, etcd_server: EtcdServer, etcd_prefix: str) -> None:
    """A change is made whole or refused as changed by others, soon; what it was asked for is not lost in between."""
    assert run("create", "1", "ram=1G", "x-note=0").exit_code == 0
    ended = threading.Event()

    async def write() -> None:
        client = Etcd(EtcdConfig(endpoints=(etcd_server.endpoint,)))
        number = 0
        while not ended.is_set():
            number += 1
            await client.put(f"{etcd_prefix}/1/x-note", str(number).encode())
        await client.close()

    writer = threading.Thread(target=lambda: asyncio.run(write()))
    writer.start()
    try:
        for ram in ("2G", "3G", "4G"):
            before = etcd_server.ctl("get", "--print-value-only", f"{etcd_prefix}/1/ram").strip()
            result = run("set", "1", f"ram={ram}")
            after = etcd_server.ctl("get", "--print-value-only", f"{etcd_prefix}/1/ram").strip()
            if result.exit_code == 0:
                assert after == ram
            else:
                assert "others changed it" in result.stderr
                assert after == before
        assert run("stop", "1").exit_code in {0, 1}
        assert run("delete", "1", "--yes").exit_code == 0
    finally:
        ended.set()
        writer.join()

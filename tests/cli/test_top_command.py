"""`top`: rates between two answers of each host; who is silent is named, and nothing that is said harms anybody."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from kvmsupervisor.cli import agent_contact, common
from kvmsupervisor.cli.top_command import counted, size
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName
from tests.cli.conftest import World


def metrics(host: str, cpu: float, read: int, instance: str = "web1") -> str:
    labels = f'host="{host}",instance="{instance}"'
    return "\n".join(
        [
            "# HELP kvmsupervisor_instance_cpu_seconds_total x",
            f"kvmsupervisor_instance_cpu_seconds_total{{{labels}}} {cpu}",
            f"kvmsupervisor_instance_memory_bytes{{{labels}}} 1.048576e+06",
            f'kvmsupervisor_instance_disk_read_bytes_total{{disk="0",{labels}}} {read}',
            f'kvmsupervisor_instance_disk_read_bytes_total{{disk="1",{labels}}} {read}',
        ]
    )


@pytest.fixture
def answers(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str | None]]:
    """What each host answers, one time after the other; two seconds pass between."""
    told: dict[str, list[str | None]] = {}
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    original = common.Tools.__init__

    def init(self: common.Tools, **fields: object) -> None:
        def asked(url: str) -> str | None:
            return told[url.split("/")[2].split(":", maxsplit=1)[0]].pop(0)

        original(self, **fields | {"metrics_of": asked})  # type: ignore[arg-type]

    monkeypatch.setattr(common.Tools, "__init__", init)
    return told


def test_rates_of_all_hosts(world: World, answers: dict[str, list[str | None]]) -> None:
    """Disks are summed up; what is counted anew, or for the first time, has no rate; the greediest is first."""
    world.host("alpha", "beta")
    answers["alpha"] = [metrics("alpha", 10, 0), metrics("alpha", 10.5, 10240)]
    answers["beta"] = [metrics("beta", 9, 0, "db"), metrics("beta", 11, 0, "db") + "\n" + metrics("beta", 1, 1, "new")]
    found = world.run("top")
    assert found.exit_code == 0, found.stderr
    assert [line.split() for line in found.stdout.splitlines()] == [
        ["INSTANCE", "HOST", "CPU", "MEMORY", "READ/S", "WRITTEN/S", "RECEIVED/S", "SENT/S"],
        ["db", "beta", "100%", "1M", "0", "-", "-", "-"],
        ["web1", "alpha", "25%", "1M", "10K", "-", "-", "-"],
        ["new", "beta", "-", "1M", "-", "-", "-", "-"],
    ]


def test_sorted_as_asked_and_for_programs(world: World, answers: dict[str, list[str | None]]) -> None:
    """JSON has numbers; a counter that went back has begun anew."""
    world.host("alpha", "beta")
    answers["alpha"] = [metrics("alpha", 10, 0), metrics("alpha", 3, 4096)]
    answers["beta"] = [metrics("beta", 0, 0, "db"), metrics("beta", 2, 0, "db")]
    found = world.json("top", "--sort", "disk")
    assert [one["instance"] for one in found] == ["web1", "db"]
    assert (found[0]["cpu_cores"], found[0]["read_bytes_per_second"], found[0]["memory_bytes"]) == (None, 4096, 2**20)


def test_a_silent_host_is_named(world: World, answers: dict[str, list[str | None]]) -> None:
    """And one that has no session."""
    world.host("alpha", "beta")
    answers["alpha"] = [None, None]
    answers["beta"] = [metrics("beta", 1, 1), metrics("beta", 2, 2)]
    assert "no answer from alpha\n" in world.run("top").stderr
    assert "no answer from gamma\n" in world.run("top", "--host", "gamma").stderr


def test_what_a_host_says_is_no_trusted_word() -> None:
    """Anybody may have written where it answers."""
    text = 'kvmsupervisor_instance_cpu_seconds_total{instance="\x1b[2J",host="a"} 1\n'
    text += 'kvmsupervisor_instance_cpu_seconds_total{instance="a"} 1-2\nkvmsupervisor_x{} 1\n{}\n' + "x" * 10**6
    assert counted(text) == {"\x1b[2J": {"cpu": 1.0}}


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0, "0"), (999, "999"), (1000, "1K"), (10**9, "954M"), (1e15, "909T")]
)
def test_bytes_have_few_digits(value: float | None, shown: str) -> None:
    """Three, and a unit."""
    assert size(value) == shown


@pytest.mark.parametrize("ask", [agent_contact.metrics_of, lambda url: agent_contact.metrics_of(url, timeout_s=0.2)])
def test_an_address_that_is_none(ask: Callable[[str], str | None]) -> None:
    """No file is read, and a host that accepts and is silent is not waited for."""
    assert ask("file:///etc/passwd") is None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert ask(f"http://127.0.0.1:{silent.getsockname()[1]}") is None


def test_the_metrics_of_another_release_are_read_too(world: World, answers: dict[str, list[str | None]]) -> None:
    """A session without an address has no metrics."""
    session = HostSession(host="old", version="0", url="", boot_id="b")
    world.etcd.write(world.layout.session_key(HostName("old")), session.to_json())
    found = world.run("top")
    assert found.exit_code == 0
    assert len(found.stdout.splitlines()) == 1

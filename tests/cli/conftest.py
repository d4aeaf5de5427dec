"""A cluster made of hand-written keys, and the command line run against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmsupervisor.cli.common import Tools
from kvmsupervisor.cli.main import cli
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.lock import Lock, LockState
from kvmsupervisor.domain.status import Phase, Status
from tests.fakes.etcd import FakeEtcd

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SINCE = "2026-03-01T11:57:00Z"


@dataclass
class World:
    """etcd as people and supervisors left it, and the command line that looks at it."""

    etcd: FakeEtcd
    layout: Layout = field(default_factory=Layout)
    environ: dict[str, str] = field(default_factory=lambda: {"KVM_HOSTNAME": "alpha"})
    agents_seen: dict[tuple[str, str], str] = field(default_factory=dict)
    heard: dict[str, tuple[str, str]] = field(default_factory=dict)

    def keys(self, instance: str, **values: str) -> int:
        """Write wishes (`cloud_config` for a name with a hyphen); return the revision."""
        for name, value in values.items():
            self.etcd.write(self.layout.wish_key(InstanceId(instance), name), value)
        return self.etcd.revision

    def host(self, *names: str) -> None:
        """Give hosts a session."""
        for name in names:
            session = HostSession(host=name, version="1", url=f"http://{name}:9746", boot_id="b")
            self.etcd.write(self.layout.session_key(HostName(name)), session.to_json())

    def status(self, instance: str, host: str, phase: Phase, reason: str = "so it is", **fields: Any) -> None:
        """Write a status, by default one that has acted on everything so far."""
        values: dict[str, Any] = {"since": SINCE, "revision": self.etcd.revision} | fields
        status = Status(id=instance, host=host, phase=phase, reason=reason, **values)
        self.etcd.write(self.layout.status_key(InstanceId(instance)), status.to_json())

    def lock(self, instance: str, host: str, epoch: int = 1) -> None:
        """Write a lock."""
        lock = Lock(host=HostName(host), boot_id="b", epoch=epoch, state=LockState.RUNNING, incarnation=f"i{epoch}")
        self.etcd.write(self.layout.lock_key(InstanceId(instance)), lock.to_json())

    def running(self, instance: str, host: str = "alpha", **values: str) -> None:
        """A machine that runs as its keys say."""
        self.keys(instance, **({"host": host, "ram": "1G"} | values))
        self.lock(instance, host)
        self.status(instance, host, Phase.RUNNING, pid=4321, epoch=1, incarnation="i1")

    def value(self, instance: str, name: str) -> str | None:
        """A wish, as it stands now."""
        found = self.etcd.data.get(self.layout.wish_key(InstanceId(instance), name))
        return None if found is None else found.decode()

    def run(self, *args: str, input_text: str | None = None, asked: bool = False) -> Result:
        """Run the command line, its output in a pipe.

        Args:
            args: of the command line.
            input_text: what comes from its standard input.
            asked: whether a person writes that.
        """
        tools = Tools(
            environ=self.environ,
            connect=lambda settings: self.etcd.peer(),
            now=lambda: NOW,
            settle_s=0,
            can_ask=lambda: asked,
            agent_seen=lambda url, instance: self.agents_seen.get((url, instance)),
            heard_of=lambda macs: {address: by for address, (mac, by) in self.heard.items() if mac in macs},
        )
        return CliRunner().invoke(cli, args, obj=tools, input=input_text)

    def json(self, *args: str) -> Any:
        """Run a command with `-o json` and read what it printed."""
        return json.loads(self.run(*args, "-o", "json").stdout)

    def rows(self, *args: str) -> dict[str, Sequence[str]]:
        """Run a command that prints a table; return its rows by their first cell."""
        _, *lines = self.run(*args).stdout.splitlines()
        cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
        return {row[0]: row[1:] for row in cells}


@pytest.fixture
def world() -> World:
    """An empty cluster."""
    return World(FakeEtcd())


@pytest.fixture
def acting(world: World) -> Callable[[Callable[[str], None]], None]:
    """Make `world.run` see a supervisor that acts: called with (method) before each of the command's calls."""

    def install(act: Callable[[str], None]) -> None:
        original = world.etcd.peer

        def peer() -> FakeEtcd:
            client = original()

            async def hook(call: str) -> None:
                act(call)

            client.hook = hook
            return client

        world.etcd.peer = peer  # type: ignore[method-assign]

    return install

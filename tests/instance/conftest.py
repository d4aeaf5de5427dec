"""A host whose instance is looked at, and what it shares with other hosts: in virtual time, on fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd
from tests.fakes.qemu import FakeQemus
from tests.support.host import Host


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def etcd(clock: FakeClock) -> FakeEtcd:
    return FakeEtcd(clock.now)


@pytest.fixture
def qemus(clock: FakeClock) -> FakeQemus:
    return FakeQemus(clock)


@pytest.fixture
async def host(etcd: FakeEtcd, clock: FakeClock, qemus: FakeQemus) -> AsyncIterator[Host]:
    """Host `a`, its supervisor not begun. At the end no guest may ever have run off the record (law 3)."""
    made = Host(etcd, clock, qemus)
    qemus.on_record = made.is_on_record
    yield made
    await made.close()
    assert qemus.ran_off_the_record == [], "law 3"


@pytest.fixture
async def other(host: Host) -> AsyncIterator[Host]:
    """Host `b` beside it."""
    made = Host(host.etcd, host.clock, host.qemus, name="b")
    made.side = host.side
    host.sessions = made.sessions = {"a", "b"}
    yield made
    await made.close()

"""Two hosts of one cluster with one storage, for modules that have no other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.storage import FakeStorage
from tests.supervisor.test_supervisor import Bench


@pytest.fixture
def storage() -> FakeStorage:
    return FakeStorage()


@pytest.fixture
async def bench(storage: FakeStorage) -> AsyncIterator[Bench]:
    """The host `a`."""
    made = Bench()
    made.storage = storage
    yield made
    await made.close()


@pytest.fixture
async def other(bench: Bench) -> AsyncIterator[Bench]:
    """The host `b` of the same cluster."""
    made = Bench()
    made.clock, made.etcd, made.qemus, made.more = bench.clock, bench.etcd, bench.qemus, {"KVM_HOSTNAME": "b"}
    made.storage = bench.storage
    yield made
    await made.close()

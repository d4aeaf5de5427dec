"""The bench of single mode."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.single.bench import Bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A host, before any container of it."""
    made = Bench()
    yield made
    await made.close()

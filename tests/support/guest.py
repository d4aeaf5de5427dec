"""The guest that tests boot, as a fixture.

Guests always run under TCG here: on some development machines `/dev/kvm` opens, but they hang in the BIOS.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmsupervisor.cli.demo_guest import Guest, build_guest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def guest() -> Guest:
    """The guest, built once for this and all later runs below `.cache/guest` of the checkout."""
    return build_guest(ROOT / ".cache" / "guest")

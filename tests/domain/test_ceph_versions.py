"""Which Ceph is too old for keys to be walls."""

from __future__ import annotations

import json

import pytest

from kvmsupervisor.domain.ceph_versions import parse_versions, too_old
from kvmsupervisor.domain.records import Unfit


def versions(*found: str) -> bytes:
    return json.dumps({"mon": {}, "overall": {f"ceph version {one} (abc) squid (stable)": 3 for one in found}}).encode()


@pytest.mark.parametrize("found", ["19.2.6", "20.2.4", "20.3.0", "21.2.0", "22.0.1", "19.10.0"])
def test_new_enough(found: str) -> None:
    """Law: from the first mended version of each release on, and in each later release, nothing is said."""
    assert too_old(parse_versions(versions(found))) is None


@pytest.mark.parametrize("found", ["16.2.15", "18.2.8", "19.2.5", "20.2.3", "21.1.9", "14.2.22"])
def test_too_old(found: str) -> None:
    """Law: one daemon is enough, and it is named with what would be right."""
    said = too_old(parse_versions(versions("20.2.4", found)))
    assert said is not None
    assert f"version {found}:" in said
    assert "CVE-2025-30156" in said
    assert "19.2.6, 20.2.4, 21.2.0" in said


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"7", b'{"overall": 7}', b"\xff"])
def test_nonsense(data: bytes) -> None:
    """Law: what is no answer says nothing of versions."""
    with pytest.raises(Unfit):
        parse_versions(data)

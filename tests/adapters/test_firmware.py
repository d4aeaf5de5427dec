"""UEFI firmware: where it is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmsupervisor.adapters import firmware
from kvmsupervisor.domain.hardware import Ovmf


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ...]:
    """Two places for two files each, with nothing there."""
    places = tuple(tmp_path / name for name in ("code1", "vars1", "code2", "vars2"))
    pairs = tuple(map(str, places))
    monkeypatch.setattr(firmware, "KNOWN", (pairs[:2], pairs[2:]))
    return places


def test_nowhere(known: tuple[Path, ...]) -> None:
    """Law: without any firmware there is none."""
    assert firmware.find(None, None) is None


def test_the_first_place_that_has_both(known: tuple[Path, ...]) -> None:
    """Law: code and variables of different places do not belong together; the first complete pair is taken."""
    code1, variables1, code2, variables2 = known
    code1.touch()
    variables2.touch()
    assert firmware.find(None, None) is None
    code2.touch()
    assert firmware.find(None, None) == Ovmf(code=str(code2), variables=str(variables2))
    variables1.touch()
    assert firmware.find(None, None) == Ovmf(code=str(code1), variables=str(variables1))


def test_the_settings_come_first(known: tuple[Path, ...]) -> None:
    """Law: what an operator names is taken."""
    for place in known:
        place.touch()
    assert firmware.find(Path("/c"), Path("/v")) == Ovmf(code="/c", variables="/v")


def test_what_this_machine_has() -> None:
    """Law: Debian's package ovmf is found, and each half has the size that the other is made for."""
    found = firmware.find(None, None)
    assert found is not None
    code, variables = Path(found.code).stat().st_size, Path(found.variables).stat().st_size
    # Together they are the flash memory of the machine.
    assert (code + variables) in {2 << 20, 4 << 20}

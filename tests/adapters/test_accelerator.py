"""Which accelerator is chosen, and what is said when the wanted one cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from kvmsupervisor.adapters.accelerator import choose, why_no_kvm

HERE = Path("/dev/null")
"""Stands for a device that opens."""


def test_a_device_that_opens_is_used() -> None:
    """Law: `auto` and `kvm` take KVM where it can be opened for reading and writing."""
    assert why_no_kvm(HERE) is None
    assert choose("auto", HERE) == choose("kvm", HERE) == "kvm"


def test_tcg_is_tcg() -> None:
    """Law: who wants TCG gets it, whatever there is."""
    assert choose("tcg", HERE) == "tcg"


@pytest.mark.parametrize(("device", "why"), [("missing", "No such file"), (".", "Is a directory")])
def test_without_kvm(tmp_path: Path, device: str, why: str) -> None:
    """Law: `auto` falls back to TCG; `kvm` is refused, with the device, the cause and what would help."""
    path = tmp_path / device
    assert choose("auto", path) == "tcg"
    with pytest.raises(ValueError, match=rf"KVM_ACCEL is kvm, but {path} cannot be opened: {why}.*KVM_ACCEL=auto"):
        choose("kvm", path)


@pytest.mark.parametrize("wanted", ["auto", "tcg"])
def test_the_real_device_hurts_nobody(wanted: Literal["auto", "tcg"]) -> None:
    """Law: looking is safe on any machine."""
    assert choose(wanted) in {"kvm", "tcg"}

"""Which accelerator is chosen, and what is said when the wanted one cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from kvmsupervisor.adapters.accelerator import Choice, choose, why_no_kvm

HERE = Path("/dev/null")
"""Stands for a device that opens."""


def test_a_device_that_opens_is_used() -> None:
    """Law: `auto` and `kvm` take KVM where it can be opened for reading and writing."""
    assert why_no_kvm(HERE) is None
    assert choose("auto", HERE) == choose("kvm", HERE) == Choice(name="kvm")
    # Not when it is known to be another device, or closed to QEMU's user, though it opens for us.
    assert choose("auto", HERE, trouble="another device") == Choice(name="tcg", fallback="another device")


def test_tcg_is_tcg() -> None:
    """Law: who wants TCG gets it, whatever there is, and nothing is said about KVM."""
    assert choose("tcg", HERE) == Choice(name="tcg")


@pytest.mark.parametrize(("device", "why"), [("missing", "No such file"), (".", "Is a directory")])
def test_without_kvm(tmp_path: Path, device: str, why: str) -> None:
    """Law: `auto` falls back to TCG and says why; `kvm` is refused, with the device, the cause and what would help."""
    path = tmp_path / device
    choice = choose("auto", path)
    assert choice.name == "tcg"
    assert choice.fallback is not None
    assert choice.fallback.startswith(f"{path} cannot be opened: {why}")
    with pytest.raises(ValueError, match=rf"KVM_ACCEL is kvm, but {path} cannot be opened: {why}.*KVM_ACCEL=auto"):
        choose("kvm", path)


def test_why_the_device_could_not_be_made_is_told(tmp_path: Path) -> None:
    """Law: the first cause is said, not that the device is missing in the end."""
    trouble = "/proc/misc lists no kvm"
    assert choose("auto", tmp_path / "kvm", trouble=trouble) == Choice(name="tcg", fallback=trouble)
    with pytest.raises(ValueError, match="KVM_ACCEL is kvm, but /proc/misc lists no kvm; "):
        choose("kvm", tmp_path / "kvm", trouble=trouble)


@pytest.mark.parametrize("wanted", ["auto", "tcg"])
def test_the_real_device_hurts_nobody(wanted: Literal["auto", "tcg"]) -> None:
    """Law: looking is safe on any machine."""
    assert choose(wanted).name in {"kvm", "tcg"}

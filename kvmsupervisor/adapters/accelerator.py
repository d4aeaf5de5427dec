"""Which accelerator this host has for QEMU: KVM through `/dev/kvm`, or QEMU's own translation (TCG)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

KVM_DEVICE = Path("/dev/kvm")


def why_no_kvm(device: Path = KVM_DEVICE) -> str | None:
    """Why KVM cannot be used, for people; None when it can."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


def choose(wanted: Literal["auto", "kvm", "tcg"], device: Path = KVM_DEVICE) -> Literal["kvm", "tcg"]:
    """The accelerator to use.

    Raises:
        ValueError: KVM is wanted and cannot be used; the message says why.
    """
    if wanted == "tcg":
        return "tcg"
    trouble = why_no_kvm(device)
    if trouble is None:
        return "kvm"
    if wanted == "kvm":
        raise ValueError(f"KVM_ACCEL is kvm, but {trouble}; load the kvm module, or set KVM_ACCEL=auto or tcg")
    return "tcg"

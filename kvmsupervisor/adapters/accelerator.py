"""The accelerator for QEMU on this host: KVM through `/dev/kvm`, or QEMU's own translation (TCG)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from kvmsupervisor.domain.frozen import frozen

KVM_DEVICE = Path("/dev/kvm")


@frozen(kw_only=True)
class Choice:
    """The accelerator of all guests of this host.

    Attributes:
        name: the accelerator's name in QEMU.
        fallback: why `auto` did not choose KVM, for people; None otherwise. Guests are many times slower without KVM:
            log, metric and status say so.
    """

    name: Literal["kvm", "tcg"]
    fallback: str | None = None


def why_no_kvm(device: Path = KVM_DEVICE) -> str | None:
    """Why KVM cannot be used, for people; None when it can."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


def choose(wanted: Literal["auto", "kvm", "tcg"], device: Path = KVM_DEVICE, *, trouble: str | None = None) -> Choice:
    """Choose the accelerator.

    Args:
        wanted: `KVM_ACCEL`.
        device: the device node of KVM.
        trouble: why the node could not be made, or opened to QEMU's user; None when it could.

    Raises:
        ValueError: KVM is required and cannot be used; the message says why.
    """
    if wanted == "tcg":
        return Choice(name="tcg")
    # A node that we can open may still belong to another device, or be closed to QEMU's user.
    why = trouble or why_no_kvm(device)
    if why is None:
        return Choice(name="kvm")
    if wanted == "kvm":
        raise ValueError(f"KVM_ACCEL is kvm, but {why}; load the kvm module, or set KVM_ACCEL=auto or tcg")
    return Choice(name="tcg", fallback=why)

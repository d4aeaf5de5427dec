"""Which accelerator this host has for QEMU: KVM through `/dev/kvm`, or QEMU's own translation (TCG)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from kvmsupervisor.domain.frozen import frozen

KVM_DEVICE = Path("/dev/kvm")


@frozen(kw_only=True)
class Choice:
    """What all guests of this host run with.

    Attributes:
        name: the accelerator, as QEMU calls it.
        fallback: why it is not KVM, for people, where KVM would have been taken (`auto`); None otherwise. Guests are
            many times slower then: say so in log, metric and status.
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
    """The accelerator to use.

    Args:
        wanted: `KVM_ACCEL`.
        device: KVM's.
        trouble: why the device could not be made, or given to QEMU's user, where that was tried.

    Raises:
        ValueError: KVM is wanted and cannot be used; the message says why.
    """
    if wanted == "tcg":
        return Choice(name="tcg")
    # A node that opens may still be another device's, or closed to QEMU's own user.
    why = trouble or why_no_kvm(device)
    if why is None:
        return Choice(name="kvm")
    if wanted == "kvm":
        raise ValueError(f"KVM_ACCEL is kvm, but {why}; load the kvm module, or set KVM_ACCEL=auto or tcg")
    return Choice(name="tcg", fallback=why)

"""Enters network namespaces. Python has `os.setns` since 3.12 only."""

from __future__ import annotations

import ctypes

CLONE_NEWNET = 0x40000000


def set_network(namespace: int) -> None:
    """Let this thread go on in a network namespace, of which this is a descriptor."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")

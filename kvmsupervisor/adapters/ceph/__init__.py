"""Ceph through its own tools: `client.py` asks and fences, `images.py` makes images and takes them away."""

from kvmsupervisor.adapters.ceph.client import (
    FENCE_MIN_S,
    FENCE_S,
    Ceph,
    CephAccess,
    CephAway,
    CephError,
    CephFailed,
    CephRefused,
    NoSuchImage,
    _NoAnswerInTime,
)
from kvmsupervisor.adapters.ceph.images import CephImages, SnapshotInUse

__all__ = [
    "FENCE_MIN_S",
    "FENCE_S",
    "Ceph",
    "CephAccess",
    "CephAway",
    "CephError",
    "CephFailed",
    "CephImages",
    "CephRefused",
    "NoSuchImage",
    "SnapshotInUse",
    "_NoAnswerInTime",
]

"""Ceph through its own tools: `client.py` asks and fences, `images.py` makes images, `snapshots.py` their snapshots."""

from kvmsupervisor.adapters.ceph.access import CephAccess
from kvmsupervisor.adapters.ceph.client import FENCE_MIN_S, FENCE_S, Ceph
from kvmsupervisor.adapters.ceph.errors import (
    CephAway,
    CephError,
    CephFailed,
    CephRefused,
    NoSuchImage,
    _NoAnswerInTime,
)
from kvmsupervisor.adapters.ceph.images import CephImages, SnapshotInUse, image_of
from kvmsupervisor.adapters.ceph.snapshots import CephSnapshots

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
    "CephSnapshots",
    "NoSuchImage",
    "SnapshotInUse",
    "_NoAnswerInTime",
    "image_of",
]

"""What the end-to-end tests share; see `tests.support.cluster` and `tests.support.single`."""

from tests.support.cluster import hosts, keys, tiny
from tests.support.farm import brisk_ceph, farm
from tests.support.single import containers

__all__ = ["brisk_ceph", "containers", "farm", "hosts", "keys", "tiny"]

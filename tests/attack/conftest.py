"""What attacks share; see `tests.support.cluster` and `tests.support.farm`."""

from tests.support.cluster import hosts, keys, tiny
from tests.support.farm import brisk_ceph, farm

__all__ = ["brisk_ceph", "farm", "hosts", "keys", "tiny"]

"""What the end-to-end tests share; see `tests.support.cluster`."""

from tests.support.etcd import etcd_alone, etcd_cluster, etcd_prefix, etcd_server
from tests.support.guest import guest
from tests.support.cluster import hosts, keys, tiny

__all__ = ["etcd_alone", "etcd_cluster", "etcd_prefix", "etcd_server", "guest", "hosts", "keys", "tiny"]

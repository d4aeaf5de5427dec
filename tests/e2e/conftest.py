"""What the end-to-end tests share; see `tests.support.host`."""

from tests.support.etcd import etcd_alone, etcd_cluster, etcd_prefix, etcd_server
from tests.support.guest import guest
from tests.support.host import hosts, keys, tiny

__all__ = ["etcd_alone", "etcd_cluster", "etcd_prefix", "etcd_server", "guest", "hosts", "keys", "tiny"]

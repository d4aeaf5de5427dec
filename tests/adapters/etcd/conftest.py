"""Fixtures of these tests: real etcd servers."""

from tests.support.etcd import etcd_alone, etcd_cluster, etcd_prefix, etcd_server

__all__ = ["etcd_alone", "etcd_cluster", "etcd_prefix", "etcd_server"]

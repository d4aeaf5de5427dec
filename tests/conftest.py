"""What all tests share: real etcd servers and Ceph, guests, networks, and signals as a person's shell has them."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support.ceph import ceph, ceph_image
from tests.support.dealing import deal
from tests.support.etcd import etcd_alone, etcd_cluster, etcd_prefix, etcd_server
from tests.support.firmware import puppet
from tests.support.guest import agent_options, guest, heart, writer
from tests.support.net import lan, netns

__all__ = [
    "agent_options",
    "ceph",
    "ceph_image",
    "etcd_alone",
    "etcd_cluster",
    "etcd_prefix",
    "etcd_server",
    "guest",
    "heart",
    "lan",
    "netns",
    "puppet",
    "writer",
]

# A shell starts what it puts into the background with SIGINT ignored, and programs started from there inherit that:
# no Ctrl-C would reach them. With a handler of its own here they begin with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is. It is no property of the code (see bench/).
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each worker makes the same order of them, of which each gets its part."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        deal(items, workers)

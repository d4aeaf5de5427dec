"""What the tests of the container share."""

from tests.support.cluster import keys
from tests.support.docker import docker

__all__ = ["docker", "keys"]

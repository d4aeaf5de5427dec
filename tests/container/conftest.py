"""What the tests of the container share."""

from tests.support.boxed import boxes
from tests.support.cluster import keys
from tests.support.docker import docker
from tests.support.imagehost import booted, image_host

__all__ = ["booted", "boxes", "docker", "image_host", "keys"]

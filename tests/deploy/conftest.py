"""What the tests of deployment share."""

from tests.support.cluster import tiny

__all__ = ["tiny"]

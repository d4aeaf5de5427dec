"""What the end-to-end tests share; see `tests.support.cluster`."""

from tests.support.cluster import hosts, keys, tiny

__all__ = ["hosts", "keys", "tiny"]

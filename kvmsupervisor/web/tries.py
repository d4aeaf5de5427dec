"""How often somebody may try a wrong password: buckets of tries, filled again as time goes by."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

BUCKETS = 4096
"""The most that are remembered; who was longest not heard of is forgotten first. Arbitrary: 1 MB."""


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Tries:
    """Buckets of one size, by any key.

    Args:
        most: tries that a full one holds.
        each_s: seconds after which there is one more.
        now: seconds of any clock.
    """

    def __init__(self, most: int, each_s: float, now: Callable[[], float]) -> None:
        self._most = most
        self._each_s = each_s
        self._now = now
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def wait_s(self, key: Hashable) -> int:
        """Seconds until there is a try; 0 while there is one."""
        bucket = self._buckets.get(key)
        if bucket is None:
            # Not remembered: who asks with ever new keys makes nobody else's forgotten.
            return 0
        left = self._filled(bucket)
        return 0 if left >= 1 else math.ceil((1 - left) * self._each_s)

    def take(self, key: Hashable) -> None:
        """One try less."""
        self._of(key).left -= 1

    def give_back(self, key: Hashable) -> None:
        """It was right."""
        bucket = self._of(key)
        bucket.left = min(self._most, bucket.left + 1)

    def _of(self, key: Hashable) -> _Bucket:
        now = self._now()
        bucket = self._buckets.pop(key, None) or _Bucket(self._most, now)
        bucket.left, bucket.at = self._filled(bucket), now
        self._buckets[key] = bucket
        if len(self._buckets) > BUCKETS:
            self._buckets.popitem(last=False)
        return bucket

    def _filled(self, bucket: _Bucket) -> float:
        return min(self._most, bucket.left + (self._now() - bucket.at) / self._each_s)


def neighbourhood(address: str) -> str:
    """What counts as one address: of IPv6 the network of 64 bits, of which one customer has all."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(IPv6Address(int(found) >> 64 << 64))
    return str(found)

"""Which status keys one transaction writes or deletes, within etcd's limits, and how often there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvmsupervisor.domain.events import MOST_BYTES
from kvmsupervisor.domain.keys import InstanceId

OPS_PER_TXN = 64
"""Instances in a transaction, each with a status and its events: as many writes as etcd allows by default
(--max-txn-ops=128, https://etcd.io/docs/v3.5/op-guide/configuration/; it counts compares and writes each by itself)."""

BYTES_PER_TXN = 512 * 1024
"""A third of what etcd allows by default (--max-request-bytes=1.5 MiB, same page)."""

GATHER_S = 0.05
"""How long a host's statuses wait for each other, to be written together. A machine that starts changes its status five
times in a tenth of a second, and these writes would delay those of its lock. Arbitrary: a person sees no difference."""

SPREAD_S = 0.25
"""The pause between two writes while there are many: a host that starts a hundred machines makes four writes a second
for all of them together. Arbitrary, as above."""

BURST = 3
"""How many writes need no pause after a quiet time: as many as the start of one machine needs."""


def next_batch(
    dirty: Iterable[InstanceId], wanted: Mapping[InstanceId, bytes | None], most: int
) -> tuple[dict[InstanceId, bytes], list[InstanceId]]:
    """Take from the front of the dirty keys either values to put or keys to delete.

    Args:
        dirty: the instances whose keys differ, in the order in which they became so.
        wanted: the values; None: to be deleted.
        most: how many at most.
    """
    puts: dict[InstanceId, bytes] = {}
    deletes: list[InstanceId] = []
    size = 0
    for instance in dirty:
        value = wanted[instance]
        size += 0 if value is None else len(value) + MOST_BYTES
        if len(puts) + len(deletes) == most or (size > BYTES_PER_TXN and puts):
            break
        if value is None:
            if puts:
                break
            deletes.append(instance)
        else:
            if deletes:
                break
            puts[instance] = value
    return puts, deletes

"""Whether etcd has the keys that were observed: the reads of a proof (law 11)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmsupervisor.adapters.etcd.api import Ahead, Compacted, Store
from kvmsupervisor.domain.history import Verdict, Witness, judge_now


async def judge_by(store: Store, witnesses: Sequence[Witness]) -> Verdict:
    """The verdict by the newest; where its revision is compacted away, an older one may still contradict.

    Args:
        store: etcd.
        witnesses: the newest first; there is one at least.

    Raises:
        EtcdError: etcd does not answer, so nothing is proven.
    """
    newest, *older = witnesses
    verdict = await _read(store, newest)
    if verdict is not Verdict.UNPROVEN:
        return verdict
    for witness in older:
        if await _read(store, witness) is Verdict.OTHER:
            return Verdict.OTHER
    return Verdict.UNPROVEN


async def _read(store: Store, witness: Witness) -> Verdict:
    """Read one key at the revision at which it was observed."""
    try:
        found = await store.get_at(witness.key, witness.revision)
        if witness.digest:
            same = found is not None and found.mod_revision == witness.revision and witness.is_value(found.value)
        else:
            # Deleted then: so it was there just before.
            same = found is None and await store.get_at(witness.key, witness.revision - 1) is not None
    except Ahead:
        return Verdict.OTHER
    except Compacted:
        now = await store.get(witness.key)
        return judge_now(witness, now and now.mod_revision, now and now.value)
    return Verdict.SAME if same else Verdict.OTHER

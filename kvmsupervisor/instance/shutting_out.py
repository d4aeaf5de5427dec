"""Whom a start shuts out in storage before its QEMU may run, and on whose word (law 4).

A lock names the clients of earlier incarnations. Where people may write locks that is no word to act on by itself: an
entry in the blocklist hits whoever has that address, for a year (docs/security.md, "Forged facts").
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace

from kvmsupervisor.aio import both
from kvmsupervisor.cluster.fencing import InUse, NotFenced
from kvmsupervisor.cluster.lock import InstanceLock
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import ANOTHER_HISTORY, Change, Lock
from kvmsupervisor.domain.spec import RbdDisk, Wish
from kvmsupervisor.domain.storage import images_of, names_of
from kvmsupervisor.failpoints import point
from kvmsupervisor.instance.context import InstanceContext
from kvmsupervisor.machine.images import DiskTrouble

SETTLE_S, SETTLE_POLL_S = 2.0, 0.3
"""How long the source of a live move may take to close its disks, once they are the target's; it takes 40 ms."""


async def shut_out(
    lock: Lock, wish: Wish, *, instance: InstanceId, context: InstanceContext, own: InstanceLock, seen: Collection[str]
) -> tuple[str, ...]:
    """Shut out the storage clients of earlier incarnations, and whoever else has the disks open after a takeover.

    Args:
        lock: the instance's, which this host has taken.
        wish: what is to run.
        instance: whose it is.
        context: of all instances.
        own: the same lock in etcd.
        seen: the clients that storage has named as users of the disks while the takeover waited.

    Returns:
        All that are shut out now.

    Raises:
        NotFenced: one of them could not be, or must not be without a person's word.
        EtcdError: it is not known whose they are.
    """
    doubtful = await own.unvouched(lock.fence)
    asks = wish.spec is not None and (lock.taken_from is not None or doubtful)
    images = images_of(wish.spec) if wish.spec is not None and asks else ()
    if lock.taken_from == ANOTHER_HISTORY and (living := await context.fencing.watchers(images)):
        raise InUse(
            f"its disks are in use ({', '.join(living)}), and its lock was taken when etcd had another history, so "
            "nobody is fenced who may be running it: waits until that client is gone (if nothing of it runs any "
            f"more: `ceph osd blocklist add {living[0]}`)",
            living,
        )
    recorded = [address for address in lock.fence if address not in doubtful]
    kept = await others_have(recorded, instance, context, everywhere=lock.taken_from is not None)
    if kept and (left := set(kept) - set(await context.fencing.shut_out(kept))):
        address = min(left)
        raise NotFenced(
            f"{address} is on record as its QEMU and as that of instance {kept[address]}, whose lock says that it "
            f"lives: nobody is shut out until {kept[address]} has let go of it. If nothing of it runs any more: "
            f"`ceph osd blocklist add {address}`"
        )
    # What is on record is shut out whatever storage says of the images, and meanwhile.
    _, used = await both(context.fencing.fence(recorded), context.fencing.users(images))
    named = {*used, *seen}
    forged = [address for address in doubtful if address not in named]
    # Who may shut clients out in Ceph has done so: it is done here for long.
    said = await context.fencing.shut_out(forged) if forged else ()
    others = [address for address in doubtful if address in named or address in said]
    if lock.taken_from is not None:
        others += [address for address in used if address not in lock.fence]
    if others:
        await _admit(others, wish, instance, context)
    if found := [address for address in others if address not in lock.fence]:
        # On record first, while the lock is still ours: then all of them are of before it. Frozen since storage was
        # asked, this host would shut out the QEMU of whoever has the lock by now.
        own.vouch(found)
        await own.write(Change.ENLIST, replace(lock, fence=(*lock.fence, *found)), None)
    await context.fencing.fence(others)
    if forged := [address for address in forged if address not in said]:
        raise NotFenced(
            f"its lock wants {' and '.join(forged)} shut out, and neither does Ceph name that as a user of its "
            f"disks, nor has a supervisor recorded it ({context.layout.clients_key(instance)}): whoever may write "
            f"the lock could name anybody. If it was this machine's QEMU: `ceph osd blocklist add {forged[0]}`"
        )
    await point("shut out")
    everyone = tuple(dict.fromkeys((*lock.fence, *others)))
    own.vouch(everyone)
    return everyone


async def may_be_shut_out(
    addresses: Collection[str], *, instance: InstanceId, context: InstanceContext, own: InstanceLock
) -> tuple[str, ...]:
    """Those of a lock's addresses that may be shut out on what is on record alone: its own, and no other's.

    Raises:
        SwapFailed, EtcdError: it is not known whose they are.
    """
    doubtful = await own.unvouched(addresses)
    recorded = [address for address in addresses if address not in doubtful]
    kept = await others_have(recorded, instance, context, everywhere=False)
    return tuple(address for address in recorded if address not in kept)


async def others_have(
    addresses: Collection[str], instance: InstanceId, context: InstanceContext, *, everywhere: bool
) -> Mapping[str, InstanceId]:
    """Those of an instance's addresses by record that another one has by lock and record, whose QEMU lives.

    Args:
        addresses: on this instance's record.
        instance: whose they are.
        context: of all instances.
        everywhere: whether etcd is asked for locks that this host does not follow. Not for what this host has
            recorded itself: that would be all locks for each QEMU that crashes.

    Raises:
        EtcdError: it is not known whose they are.
    """
    return await context.recorded_for(addresses, besides=instance, proven=True, everywhere=everywhere)


async def admit(instance: InstanceId, context: InstanceContext, addresses: Collection[str]) -> None:
    """Make sure that whom storage alone names as users of an instance's images are no other's.

    Raises:
        NotFenced: one is another instance's.
        EtcdError: it is not known whose they are.
    """
    for address, other in (await context.recorded_for(addresses, besides=instance)).items():
        raise NotFenced(
            f"{address} has one of its disks open and is the QEMU of instance {other}: no two instances can "
            "have one image; change the keys of one of them"
        )


async def _admit(addresses: Collection[str], wish: Wish, instance: InstanceId, context: InstanceContext) -> None:
    """Make sure that whom storage names as users of its images may be shut out for it.

    Raises:
        NotFenced: one is another instance's, or its guest may not open these images.
    """
    await admit(instance, context, addresses)
    if wish.spec is None:
        return
    if rivals := list(context.namesakes(instance, names_of(wish.spec))):
        # One that is just being started is not on record yet (simulation, seed 1080). Who is gone and has only left its
        # lock is none (seed 5162).
        living = {*await context.fencing.watchers(images_of(wish.spec))}
        for address in sorted(living.intersection(addresses)):
            raise NotFenced(
                f"{address} has one of its disks open and is on no record, and the keys of instance {rivals[0]} name "
                "the same image, so it may be the QEMU of that one: change the keys of one of them"
            )
    try:
        # The keys may name other images since it was made ready.
        await context.disks.admit(instance, wish.spec)
    except DiskTrouble as error:
        raise NotFenced(str(error)) from error


async def see_off(
    lock: Lock, images: Collection[RbdDisk], instance: InstanceId, context: InstanceContext
) -> Collection[str]:
    """Wait until nobody whom a lock names has the disks open any more; who has for `SETTLE_S` is shut out.

    Args:
        lock: of the guest that has come, in whose `fence` is the source's QEMU.
        images: of the guest.
        instance: whose they are.
        context: of all instances.

    Returns:
        Who was shut out; nobody, either, where storage does not say, or not do, it: they stay on record.
    """
    deadline = context.clock.now() + SETTLE_S
    with contextlib.suppress(NotFenced):
        while images and (left := sorted({*await context.fencing.watchers(images)} & {*lock.fence})):
            if context.clock.now() >= deadline:
                await admit(instance, context, left)
                await context.fencing.fence(left)
                return left
            await context.clock.sleep(SETTLE_POLL_S)
    return ()

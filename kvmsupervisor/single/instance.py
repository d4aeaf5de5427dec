"""`exec` with `INSTANCE`: one instance from its keys, its container's life its own.

See docs/decisions/0013-single-mode.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack

import structlog

from kvmsupervisor import __version__
from kvmsupervisor.adapters import resources
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.config.etcd import etcd_config
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.config.values import SOCKET_PATH_LIMIT
from kvmsupervisor.domain.admission import Admission
from kvmsupervisor.domain.argv import host_problems
from kvmsupervisor.domain.grouping import Flat
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.names import QMP_SPARE_SOCKET
from kvmsupervisor.domain.placement import Placed
from kvmsupervisor.domain.removal import Hold, ends_it, order_of, why_held
from kvmsupervisor.domain.single import refusal, single_wish
from kvmsupervisor.domain.spec import RawValue, Wish
from kvmsupervisor.instance.assembly import Outside
from kvmsupervisor.instance.bridges import withdraw
from kvmsupervisor.machine.host import HostFacts
from kvmsupervisor.machine.spawn import BEHIND
from kvmsupervisor.single.container import Container, Manner
from kvmsupervisor.single.identity import ContainerIdentity
from kvmsupervisor.single.life import ContainersLife, NotHere

log = structlog.get_logger(__name__)


class Keys:
    """What the keys of one instance say. Implements `container.Desire`.

    Args:
        identity: the container that runs it.
        host: this host's name, which the key `host` must be.
        overrides: values that win over its keys.
    """

    def __init__(self, identity: ContainerIdentity, *, host: HostName, overrides: Mapping[str, str]) -> None:
        layout = identity.holder.layout
        self._identity = identity
        self._host = host
        self._overrides = overrides
        self._prefix = layout.instance_prefix(identity.name)
        self._placement_key = layout.placement_key(identity.name)
        self._keys, self._placements = Flat(), Flat()
        self._hold: Hold | None = None

    @property
    def tables(self) -> Mapping[str, Flat]:
        """Its keys, and its placement."""
        return {self._prefix: self._keys, self._placement_key: self._placements}

    def wish(self) -> Wish:
        """What they say now."""
        placement = self._placements.get(self._placement_key.encode())
        return self._wish_of(
            {key.decode(errors="replace"): (one.value, one.mod_revision) for key, one in self._keys.entries.items()},
            Placed.of(placement),
        )

    async def read(self, store: Store) -> Wish:
        """The same, asked of etcd once.

        Raises:
            EtcdError: etcd did not say.
        """
        found = await store.list(self._prefix)
        placement = await store.get(self._placement_key)
        return self._wish_of(
            {kv.key.decode(errors="replace"): (kv.value, kv.mod_revision) for kv in found.kvs},
            Placed.of(placement),
        )

    def hold(self, wish: Wish, *, former: Wish | None, runs: bool, anew: bool) -> Hold | None:
        """What would end it is held when it came with another history of etcd, until somebody writes it again."""
        me = self._identity.holder.name
        ends = runs and ends_it(wish, me)
        if anew and ends and (self._hold is not None or former is None or not ends_it(former, me)):
            why = why_held(wish, "what is written since then is heeded, and so is the end of its container")
            self._hold = Hold(order=order_of(wish), why=why, stood={})
            log.error("removal.held", instance=self._identity.name, reason=why)
        elif not ends or (self._hold is not None and order_of(wish) != self._hold.order):
            self._hold = None
        return self._hold

    def _wish_of(self, found: Mapping[str, tuple[bytes, int]], placed: Placed) -> Wish:
        """The wish, of keys by their full names, and of the placement."""
        keys = {
            key.removeprefix(self._prefix).encode(errors="replace"): RawValue(value, revision)
            for key, (value, revision) in found.items()
            # Beside a lock of its own the usual one is no wish either.
            if key not in {self._identity.lock_key, f"{self._prefix}lock"}
        }
        return single_wish(
            self._identity.name,
            keys,
            overrides=self._overrides,
            host=self._host,
            holder=self._identity.holder.name,
            placed=placed,
        )


class Single:
    """One instance.

    Args:
        settings: of this host.
        instance: which.
        outside: the world.
        lock_key: its lock, with nothing left to be filled in.
        overrides: values that win over its keys.

    Made inside an event loop.
    """

    def __init__(
        self,
        settings: Settings,
        instance: InstanceId,
        outside: Outside,
        *,
        lock_key: str,
        overrides: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._outside = outside
        self._overrides = dict(overrides)
        self._identity = ContainerIdentity.of(settings, lock_key, outside, instance=instance)
        # Not the holder: in a PID namespace the next container has another one, and takes away what this one left.
        self._bridge_owner = f"{lock_key}@{settings.hostname}"
        self._keys = Keys(self._identity, host=settings.hostname, overrides=self._overrides)
        self._life = ContainersLife(instance)

    def signalled(self, number: signal.Signals) -> None:
        """Shut the guest down; a second signal ends QEMU without its guest's consent, a third kills it."""
        self._life.signalled(number)

    async def run(self) -> int:
        """Run it to its end; return what to exit with: QEMU's status, or 128 and the signal that came before QEMU.

        Raises:
            NotHere: its keys do not allow it, or QEMU cannot be started at all.
            EtcdError: etcd did not say what its keys are.
            AlreadyRunning, HostnameTaken: another container of this host runs it (the latter in an exception group).
            ValueError: KVM is demanded and cannot be used, QEMU cannot run as the user that was named, root lacks
                capabilities for that, or a path would be too long.
            Hidden: an earlier container's QEMU may live, and that cannot be seen.
        """
        settings, outside = self._settings, self._outside
        directory = self._identity.run_dir.instance(self._identity.name)
        too_long = len(os.fsencode(directory.path / QMP_SPARE_SOCKET)) - SOCKET_PATH_LIMIT
        if too_long > 0:
            raise ValueError(f"KVM_RUN_DIR: {settings.run_dir} is {too_long} bytes too long for the sockets below it")
        host_facts = outside.gather_host_facts(settings)
        if host_facts.users.uids is not None:
            resources.bound_guests()
        async with AsyncExitStack() as stack:
            store = outside.connect(etcd_config(settings))
            stack.push_async_callback(store.close)
            await self._check(store, host_facts)
            self._identity.run_dir.acquire()
            stack.callback(self._identity.run_dir.release)
            container = Container(
                self._identity,
                self._life,
                settings=settings,
                outside=outside,
                store=store,
                manner=Manner(
                    desire=self._keys,
                    host_facts=host_facts,
                    directory=directory,
                    admission=Admission(1, host_facts.memory_mib),
                    launch=BEHIND,
                    bridge_owner=self._bridge_owner,
                    start_timeout_s=settings.start_timeout_s,
                    takeover_wait_s=settings.takeover_wait_s,
                ),
            )
            log.info(
                "single.started",
                version=__version__,
                instance=self._identity.name,
                holder=self._identity.holder.name,
                lock=self._identity.lock_key,
                overrides=sorted(self._overrides),
                run_dir=str(directory.path),
                qemu_user=host_facts.users.title,
            )
            await container.run()
            await withdraw(outside.system.network, self._bridge_owner)
        status = self._life.outcome()
        if status is None:
            raise NotHere(f"{self._identity.name}: {container.instance.report.status.reason}")
        return status

    async def _check(self, store: Store, host_facts: HostFacts) -> None:
        """Look at the keys once, before anything is done.

        Raises:
            NotHere: they do not allow it.
            EtcdError: etcd did not say what they are.
        """
        wish = await self._keys.read(store)
        problems = wish.problems
        if wish.spec is not None:
            problems = (*problems, *host_problems(wish.spec, host_facts.host_side))
        why = refusal(
            wish,
            holder=self._identity.holder.name,
            host=self._settings.hostname,
            problems=problems,
            prefix=self._settings.prefix,
        )
        if why is not None:
            raise NotHere(why)

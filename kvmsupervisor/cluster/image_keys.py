"""The image library as its keys tell it, and who imports an image into Ceph: asked of etcd when it is needed.

Nothing of it is kept or watched: a host needs an entry only where a disk is to be made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.etcd import EtcdError, Store
from kvmsupervisor.adapters.etcd.api import Compare, Get, Put, Target
from kvmsupervisor.domain.images import Image, parse_image
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.parse_keys import VALUE_LIMIT
from kvmsupervisor.domain.values import SHOWN_LENGTH, Unfit

CLAIM_S = 30
"""How long a host counts as importing that has said nothing more. Arbitrary: longer than etcd elects a leader."""


class ImageKeys:
    """The entries of the library.

    Args:
        store: etcd.
        layout: where the keys lie.
    """

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store = store
        self._layout = layout

    async def get(self, name: str) -> Image | None:
        """One entry; None when there is none.

        Raises:
            Unfit: it cannot be used; the message names its key.
            EtcdError: it is not known.
        """
        key = self._layout.image_key(name)
        found = await self._store.get(key)
        if found is None:
            return None
        try:
            return _parse(name, found.value)
        except Unfit as unfit:
            raise Unfit(f"{key}: {unfit}") from unfit

    async def sums(self) -> frozenset[str]:
        """The SHA-256 of every image that a key names.

        Raises:
            EtcdError: it is not known.
        """
        sums = set()
        for kv in (await self._store.list(self._layout.images_prefix)).kvs:
            try:
                sums.add(_parse("", kv.value).sha256)
            except Unfit:
                continue
        return frozenset(sums)


def _parse(name: str, value: bytes) -> Image:
    try:
        return parse_image(name, value[: VALUE_LIMIT + 1].decode().strip())
    except UnicodeDecodeError:
        raise Unfit("a value is UTF-8 text") from None


class Imports:
    """Which host imports an image into a pool: one of all that want it at the same instant.

    It saves work and is no lock: an import is only ever seen whole, whoever made it (`machine/contents.py`). The key
    has a lease of its own, renewed while the work goes on, so nobody waits for a host that is gone or is frozen.

    Args:
        store: etcd.
        layout: where the keys lie.
        me: this host.
        clock: the machine's.
    """

    def __init__(self, store: Store, layout: Layout, me: HostName, clock: Clock) -> None:
        self._store = store
        self._layout = layout
        self._me = me
        self._clock = clock

    @asynccontextmanager
    async def claim(self, what: str) -> AsyncIterator[str | None]:
        """Be the one who imports `what` meanwhile; who is it instead, None when that is this host.

        Raises:
            EtcdError: it is not known.
        """
        key = self._layout.imports_prefix + what
        lease = await self._store.grant(CLAIM_S)
        renewing = asyncio.get_running_loop().create_task(self._renew(lease))
        try:
            put = Put(key, json.dumps({"host": self._me}).encode(), lease)
            done = await self._store.txn([Compare(key, Target.CREATE_REVISION, 0)], [put], [Get(key)])
            yield None if done.succeeded else _host_of(done.reads[0][0].value if done.reads[0] else b"")
        finally:
            renewing.cancel()
            # Where etcd is away the lease ends by itself.
            with contextlib.suppress(EtcdError):
                await self._store.revoke(lease)

    async def _renew(self, lease: int) -> None:
        while True:
            await self._clock.sleep(CLAIM_S / 3)
            # Without it others import the same once more, and one of the two is thrown away.
            with contextlib.suppress(EtcdError):
                await self._store.keep_alive(lease)


def _host_of(value: bytes) -> str:
    try:
        return str(json.loads(value)["host"])[:SHOWN_LENGTH]
    except (ValueError, KeyError, TypeError):
        return "another host"

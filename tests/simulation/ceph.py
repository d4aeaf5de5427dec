"""Ceph in virtual time: images, who watches them, who is shut out. Below the production `Ceph.fence` and `CephFencing`.

As Ceph does: a client that closes its image is gone at once, one that dies is named for another 30 s
(`osd_client_watch_timeout`), one that is shut out is dropped at once and never writes again. A frozen client's watch
ends after the same 30 s; thawed, it watches again unless it was shut out. The exclusive lock stays with who wrote last.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random

from kvmsupervisor.adapters.ceph import Ceph, CephAccess, _NoAnswerInTime
from kvmsupervisor.domain.ceph import EXCLUSIVE_LOCK, PRIMARIES, Client
from kvmsupervisor.domain.spec import RbdDisk
from tests.simulation.clock import EPOCH

WATCH_S = 30.0


@dataclass(slots=True)
class Image:
    """One image.

    Attributes:
        watchers: client → until when it is named; None while its connection lives.
        owner: who holds the exclusive lock.
    """

    watchers: dict[Client, float | None] = field(default_factory=dict)
    owner: Client | None = None


class CephCluster:
    """What all hosts share.

    Attributes:
        images: by name, made when first asked for.
        shut_out: client → until when.
        away: why nothing answers; None when it does.
        slow_s: the longest time a call takes.
        late_s: the longest time until an OSD hears of a client that is shut out. So long that client's writes land,
            unless the OSD hears of it by another client, whose requests name the map of OSDs that it has. So a
            write that comes late is one that came before the next client's first.
    """

    def __init__(self, time: Callable[[], float], chance: Random) -> None:
        self.images: dict[str, Image] = {}
        self.shut_out: dict[Client, datetime] = {}
        self.away: str | None = None
        self.slow_s = 0.3
        self.late_s = 0.0
        # Clients that are shut out → until when an OSD does not know.
        self._unheard: dict[Client, float] = {}
        self.time = time
        self.chance = chance
        # Told of each client that is shut out.
        self.on_shut_out: Callable[[Client], None] = lambda client: None
        # Told of each image that nobody watches any more.
        self.on_unwatched: Callable[[str], None] = lambda name: None

    @property
    def now(self) -> datetime:
        """The monitors' clock."""
        return EPOCH + timedelta(seconds=self.time())

    def image(self, name: str) -> Image:
        found = self.images.get(name)
        if found is None:
            found = self.images[name] = Image()
        return found

    def is_shut_out(self, client: Client) -> bool:
        return client in self.shut_out and self.shut_out[client] > self.now

    def may_write(self, client: Client) -> bool:
        """Whether its writes land."""
        return not self.is_shut_out(client) or self.time() < self._unheard.get(client, 0.0)

    @staticmethod
    def has_exclusive_lock(name: str | None) -> bool:
        """Whether an image has the feature `exclusive-lock`."""
        return name is None or not name.startswith("rbd/n")

    def bar(self, client: Client, until: datetime) -> None:
        """Put a client on the blocklist."""
        is_new = not self.is_shut_out(client)
        # A later entry replaces the one that is there.
        self.shut_out[client] = until
        if not is_new:
            return
        if self.late_s:
            self._unheard[client] = self.time() + self.chance.random() * self.late_s
        self.on_shut_out(client)

    # What clients do.

    def open(self, name: str, client: Client) -> None:
        if not self.is_shut_out(client):
            self._unheard.clear()
            self.image(name).watchers[client] = None

    def write(self, name: str, client: Client) -> None:
        if not self.is_shut_out(client):
            self._unheard.clear()
            self.image(name).owner = client

    def close(self, client: Client) -> None:
        for name, image in self.images.items():
            if image.watchers.pop(client, 0.0) != 0.0 and not image.watchers:
                self.on_unwatched(name)
            if image.owner == client:
                image.owner = None

    def vanish(self, client: Client) -> None:
        """Its connection is gone, without a word."""
        for image in self.images.values():
            if image.watchers.get(client, 0.0) is None:
                image.watchers[client] = self.time() + WATCH_S

    def watching(self, name: str) -> frozenset[Client]:
        watchers, now = self.image(name).watchers, self.time()
        gone = [one for one, until in watchers.items() if (until is not None and until <= now) or self.is_shut_out(one)]
        for client in gone:
            del watchers[client]
        return frozenset(watchers)


class SimCeph(Ceph):
    """One host's way to it: the production class, whose tools are answered from memory.

    Args:
        cluster: the cluster.
        reach: whether this host reaches it.
        tell: told each change.
    """

    def __init__(self, cluster: CephCluster, *, reach: Callable[[], bool], tell: Callable[[str], None]) -> None:
        super().__init__(CephAccess())
        self._cluster = cluster
        self._reach = reach
        self._tell = tell

    async def key(self) -> str:
        await asyncio.sleep(0)
        return "AQBe"

    async def read_policy(self, image: RbdDisk) -> str:
        # No question of its own: it is asked beside `image_info`, which is answered as the cluster is.
        await asyncio.sleep(0)
        return PRIMARIES

    async def _execute(
        self, program: str, *args: str, limit_s: float, hear: Callable[[bytes], None] | None = None
    ) -> tuple[bytes, bytes]:
        """What a tool prints; see ceph(8), rbd(8)."""
        cluster = self._cluster
        await asyncio.sleep(0.01 + cluster.chance.random() * cluster.slow_s)
        if not self._reach() or cluster.away is not None:
            await asyncio.sleep(limit_s)
            raise _NoAnswerInTime(f"Ceph does not answer: {cluster.away or 'no way there'}")
        words, options = [word for word in args if not word.startswith("--")], _options(args)
        match program, *words:
            case "rbd", "info", *_:
                exclusive = [EXCLUSIVE_LOCK] if cluster.has_exclusive_lock(f"rbd/{options['image']}") else []
                return _said({"size": 1 << 30, "features": ["layering", *exclusive]})
            case "rbd", "status", *_:
                named = cluster.watching(f"{options['pool']}/{options['image']}")
                return _said({"watchers": [{"address": client} for client in sorted(named)]})
            case "rbd", "lock", "ls", *_:
                owner = cluster.image(f"{options['pool']}/{options['image']}").owner
                return _said([] if owner is None else [{"id": "auto 1", "locker": "client.1", "address": owner}])
            case "ceph", "osd", "blocklist", "add", client, seconds:
                return await self._shut_out(Client(client), float(seconds), limit_s)
            case "ceph", "osd", "blocklist", "ls", *_:
                entries = sorted(cluster.shut_out.items())
                return _said([{"addr": who, "until": _written(until)} for who, until in entries if until > cluster.now])
            case "ceph", "osd", "blocklist", "rm", client:
                cluster.shut_out.pop(Client(client), None)
                self._tell(f"lets in {client}")
                return b"", b""
            case "ceph", "osd", "stat", *_:
                return b"", b""
        raise AssertionError((program, *args))

    async def _shut_out(self, client: Client, seconds: float, limit_s: float) -> tuple[bytes, bytes]:
        cluster = self._cluster
        until = cluster.now + timedelta(seconds=seconds)
        cluster.bar(client, until)
        self._tell(f"shuts out {client}")
        if cluster.chance.random() < LOST_ANSWER:
            await asyncio.sleep(limit_s)
            raise _NoAnswerInTime("the answer was lost")
        await asyncio.sleep(cluster.chance.random() * cluster.slow_s)
        return b"", f"blocklisting {client} until {_written(until)} ({seconds:.0f} sec)".encode()


def _options(args: Iterable[str]) -> dict[str, str]:
    split = (word[2:].partition("=") for word in args if word.startswith("--"))
    return {name: value for name, _, value in split}


def _said(value: object) -> tuple[bytes, bytes]:
    return json.dumps(value).encode(), b""


def _written(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%f+0000")


LOST_ANSWER = 0.02
"""How likely a client is shut out, and who asked is not told."""

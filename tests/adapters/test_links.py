"""Network interfaces as the kernel tells of them: real ones, in a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
from collections.abc import Awaitable, Callable

import pytest

from kvmsupervisor.adapters import links as module
from kvmsupervisor.adapters.links import Links, index_of
from kvmsupervisor.domain.nics import BRIDGE, TUN, Link
from tests.support.net import AS_ROOT, Namespace

LIMIT_S = 15.0

pytestmark = pytest.mark.skipif(not AS_ROOT, reason="a thread enters a network namespace as root only")


class Watch:
    """Follows the interfaces of the namespace that it is made in."""

    def __init__(self) -> None:
        self.told: list[set[int]] = []
        self.links = Links(self._on_change)
        self._changed = asyncio.Event()

    def _on_change(self, changed: object) -> None:
        assert isinstance(changed, set)
        self.told.append(changed)
        self._changed.set()

    def named(self, name: str) -> Link | None:
        return next((link for link in (self.links.all or {}).values() if link.name == name), None)

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not true():
                self._changed.clear()
                await self._changed.wait()


def watched(netns: Namespace, main: Callable[[Watch], Awaitable[None]]) -> None:
    """Run `main` in the namespace, with a watch that runs."""

    async def run() -> None:
        watch = Watch()
        task = asyncio.create_task(watch.links.run())
        await watch.until(lambda: watch.links.all is not None)
        try:
            await main(watch)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    netns.inside(lambda: asyncio.run(run()))


async def ip(netns: Namespace, *words: str) -> None:
    await asyncio.to_thread(netns.run, "ip", *words)


def test_what_is_there_and_what_changes(netns: Namespace) -> None:
    """Listed once; then a bridge, a tap, its port, both set up, taken out, and gone, each told as it happens."""
    netns.run("ip", "link", "add", "br0", "type", "bridge")

    async def main(watch: Watch) -> None:
        before = watch.named("br0")
        assert before is not None
        assert (before.kind, before.master, before.up) == (BRIDGE, 0, False)
        assert watch.named("lo") == Link(index=1, name="lo", kind="", master=0, up=True)
        await ip(netns, "tuntap", "add", "tap0", "mode", "tap")
        await watch.until(lambda: watch.named("tap0"))
        tap = watch.named("tap0")
        assert tap is not None
        assert (tap.kind, tap.master, tap.up, index_of("tap0")) == (TUN, 0, False, tap.index)
        await ip(netns, "link", "set", "tap0", "master", "br0", "up")
        await watch.until(
            lambda: watch.named("tap0") == Link(index=tap.index, name="tap0", kind=TUN, master=before.index)
        )
        await ip(netns, "link", "set", "br0", "up")
        await watch.until(lambda: (found := watch.named("br0")) and found.up)
        await ip(netns, "link", "set", "tap0", "nomaster")
        await watch.until(lambda: (found := watch.named("tap0")) and found.master == 0)
        await ip(netns, "link", "set", "tap0", "master", "br0")
        await ip(netns, "link", "del", "br0")
        await watch.until(lambda: watch.named("br0") is None)
        await watch.until(lambda: (found := watch.named("tap0")) and found.master == 0)
        await ip(netns, "link", "del", "tap0")
        await watch.until(lambda: watch.named("tap0") is None)
        assert {tap.index} in watch.told

    watched(netns, main)


def test_nothing_is_told_of_what_does_not_matter(netns: Namespace) -> None:
    """Addresses, MTU, a bridge's view of its ports: such news are frequent, and wake nobody."""
    netns.run("ip", "link", "add", "br0", "type", "bridge")

    async def main(watch: Watch) -> None:
        before = len(watch.told)
        await ip(netns, "link", "set", "br0", "mtu", "1400")
        await ip(netns, "address", "add", "192.0.2.1/24", "dev", "br0")
        await ip(netns, "link", "add", "last", "type", "bridge")
        await watch.until(lambda: watch.named("last"))
        last = watch.named("last")
        assert last is not None
        assert watch.told[before:] == [{last.index}]

    watched(netns, main)


def test_plugging_in_takes_nothing_away(netns: Namespace) -> None:
    """What has no master becomes a port; what somebody has put elsewhere stays there; what is missing is an error."""
    for bridge in ("br0", "br1"):
        netns.run("ip", "link", "add", bridge, "type", "bridge")
    netns.run("ip", "tuntap", "add", "tap0", "mode", "tap")

    async def main(watch: Watch) -> None:
        tap, br0, br1 = watch.named("tap0"), watch.named("br0"), watch.named("br1")
        assert tap
        assert br0
        assert br1
        await watch.links.plug(tap.index, "br0")
        await watch.until(lambda: (found := watch.named("tap0")) and found.master == br0.index)
        await watch.links.plug(tap.index, "br1")
        await ip(netns, "link", "set", "tap0", "alias", "looked-at")
        assert (watch.links.all or {})[tap.index].master == br0.index
        with pytest.raises(OSError, match="No such device"):
            await watch.links.plug(tap.index, "br9")
        with pytest.raises(OSError) as caught:
            await watch.links.plug(9999, "br0")
        assert caught.value.errno in {errno.EINVAL, errno.ENODEV}

    watched(netns, main)


def test_what_was_lost_is_listed_again(netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """More changed than the socket holds: all is listed anew, and only what differs is told."""
    monkeypatch.setattr(module, "AGAIN_S", 0.01)

    async def main(watch: Watch) -> None:
        # One read of the kernel's news fails as the kernel says it: the next change is lost.
        apply, failed = module._apply, False

        def overrun(links: dict[int, Link], kind: int, payload: bytes) -> set[int]:
            nonlocal failed
            if not failed:
                failed = True
                raise OSError(errno.ENOBUFS, "No buffer space available")
            return apply(links, kind, payload)

        monkeypatch.setattr(module, "_apply", overrun)
        await ip(netns, "link", "add", "br0", "type", "bridge")
        await watch.until(lambda: watch.named("br0"))
        found = watch.named("br0")
        assert found is not None
        assert failed
        assert watch.told[-1] == {found.index}

    watched(netns, main)


def test_what_the_kernel_cannot_have_sent_is_passed_over() -> None:
    """A short or senseless message changes nothing, and ends."""
    assert list(module._messages(b"\x01\x00\x00\x00" + bytes(12))) == []
    assert module._apply({}, module.NEW_LINK, b"short") == set()
    assert list(module._attributes(struct.pack("=HH", 2, 3) + b"x")) == []
    with pytest.raises(OSError, match="rtnetlink refuses: EPERM"):
        list(module._messages(module._HEADER.pack(20, module.ERROR, 0, 0, 0) + struct.pack("=i", -errno.EPERM)))

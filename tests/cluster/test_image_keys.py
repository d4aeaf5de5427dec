"""The library's keys as a host reads them, and who imports an image: one at a time, and never for ever."""

from __future__ import annotations

import asyncio

import pytest

from kvmsupervisor.cluster.image_keys import ImageKeys, Imports
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.values import Unfit
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import FakeEtcd

LAYOUT = Layout()
SUM = "0123456789abcdef" * 4
WHAT = "rbd/kvm-image-x"


def imports(etcd: FakeEtcd, host: str) -> Imports:
    return Imports(etcd.peer(), LAYOUT, HostName(host), FakeClock())


async def test_entries() -> None:
    """Law: an entry is read when it is asked for; a bad one names its key, and keeps no other from being known."""
    etcd = FakeEtcd()
    keys = ImageKeys(etcd, LAYOUT)
    assert await keys.get("debian") is None
    etcd.write(LAYOUT.image_key("debian"), f" https://h/a.raw sha256={SUM}\n")
    etcd.write(LAYOUT.image_key("bad"), "https://h/a.raw")
    etcd.write(LAYOUT.image_key("worse"), b"\xff")
    found = await keys.get("debian")
    assert found is not None
    assert found.sha256 == SUM
    for name in ("bad", "worse"):
        with pytest.raises(Unfit, match=f"^/kvm/.images/{name}: "):
            await keys.get(name)
    assert await keys.sums() == {SUM}


async def test_one_imports_at_a_time() -> None:
    """Law: who asks second is told who does; afterwards anybody can, and nothing is left in etcd."""
    etcd = FakeEtcd()
    async with imports(etcd, "alpha").claim(WHAT) as other:
        assert other is None
        async with imports(etcd, "beta").claim(WHAT) as who:
            assert who == "alpha"
        async with imports(etcd, "beta").claim(f"{WHAT}2") as who:
            assert who is None
    assert not any(key.startswith(LAYOUT.imports_prefix) for key in etcd.data)
    async with imports(etcd, "beta").claim(WHAT) as who:
        assert who is None


async def test_who_is_cut_off_lets_go() -> None:
    """Law: an import that fails, or is cancelled, keeps nobody from the next."""
    etcd, inside = FakeEtcd(), asyncio.Event()

    async def stays() -> None:
        async with imports(etcd, "alpha").claim(WHAT):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(stays())
    await inside.wait()
    task.cancel()
    await asyncio.wait({task})
    async with imports(etcd, "beta").claim(WHAT) as who:
        assert who is None


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"hos":1}', b"\xff"])
async def test_what_others_wrote(value: bytes) -> None:
    """Law: a key that nobody of ours wrote is another host's."""
    etcd = FakeEtcd()
    etcd.write(LAYOUT.imports_prefix + WHAT, value)
    async with imports(etcd, "beta").claim(WHAT) as who:
        assert who == "another host"

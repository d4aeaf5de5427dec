"""What the session says of its host: in step, whatever etcd does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from structlog.testing import capture_logs

from kvmsupervisor.adapters.etcd.api import Unavailable
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.aio import Part
from kvmsupervisor.cluster.session import Session
from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import Layout
from kvmsupervisor.domain.timing import RETRY_CAP_S
from kvmsupervisor.machine.etcd_wall import LOOK_EVERY_S, EtcdWall
from kvmsupervisor.supervisor.drain import DrainMark
from kvmsupervisor.supervisor.telling import Telling
from tests.fakes.clock import FakeClock, settle
from tests.fakes.etcd import FakeEtcd
from tests.machine.test_etcd_wall import FakeRule

ME = HostSession(host="a", version="1", url="", boot_id="b")
LOST = Unavailable("no leader")


@dataclass
class Bench:
    """A host with a session, whose etcd may be away."""

    folder: Path
    clock: FakeClock = field(default_factory=FakeClock)
    tasks: list[asyncio.Task[object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.etcd = FakeEtcd(self.clock.now)
        self.run_dir = RunDir(self.folder)
        self.mark = DrainMark(self.run_dir, boot_id="b")
        self.session = Session(
            store=self.etcd,
            clock=self.clock,
            layout=Layout(),
            value=ME,
            run_dir=self.folder,
            ttl_s=15,
            rand=lambda: 0.5,
        )

    async def begin(self, *answers: bool | str, gaps: tuple[str, ...] = ()) -> None:
        wall = EtcdWall(FakeRule(*answers), frozenset(), self.clock)
        telling = Telling(self.session, self.clock, self.mark, wall, gaps)
        self.session.value = telling.said(self.session.value)
        for part in (self.session.run, telling.run, *wall.parts):
            self.start(part)
        await settle()

    def start(self, part: Part) -> None:
        self.tasks.append(asyncio.create_task(part()))

    @property
    def said(self) -> HostSession:
        found = HostSession.from_json(self.etcd.data[self.session.key])
        assert found is not None
        return found

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_a_wall_goes_and_comes(tmp_path: Path) -> None:
    """Law: the session names what keeps guests apart no more, and what never could, until that is mended."""
    bench = Bench(tmp_path)
    await bench.begin(True, "no nft", True, gaps=("landlock: none",))
    found = [bench.said.gaps]
    for _ in range(2):
        await bench.clock.advance(LOOK_EVERY_S)
        found.append(bench.said.gaps)
    assert found == [("landlock: none",), ("landlock: none", "etcd: no nft"), ("landlock: none",)]
    await bench.end()


async def test_a_word_that_etcd_did_not_take(tmp_path: Path) -> None:
    """Law: it is told that other hosts do not know yet, and written again."""
    bench = Bench(tmp_path)
    await bench.begin(True, False, False)
    bench.run_dir.mark_draining("b")
    bench.etcd.fail_next(LOST, "txn")
    with capture_logs() as logs:
        bench.mark.heed()
        await settle()
    assert not bench.said.draining
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["session.untold"]
    await bench.clock.advance(RETRY_CAP_S)
    assert bench.said.draining
    await bench.end()


async def test_what_changed_before_it_began(tmp_path: Path) -> None:
    """Law: nothing is missed between the first value and the first turn."""
    bench = Bench(tmp_path)
    bench.session.value = ME
    bench.run_dir.mark_draining("b")
    bench.mark.heed()
    wall = EtcdWall(None, frozenset(), bench.clock)
    bench.start(bench.session.run)
    await settle()
    assert not bench.said.draining
    bench.start(Telling(bench.session, bench.clock, bench.mark, wall, ()).run)
    await settle()
    assert bench.said.draining
    await bench.end()

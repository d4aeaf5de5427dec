"""The scenes: what happens, what is said of it, and what each promises. A promise that is broken ends the demo.

Nothing here touches the world: that is a `Stage`, `cluster.Cluster` in the demo and a made-up one in tests.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from tests.cluster_demo.board import Board, Result
from tests.cluster_demo.picture import GuestFacts, Picture, Said
from tests.cluster_demo.pings import GRACE, Pings, Tally
from tests.cluster_demo.terms import DB, GUESTS, HOSTS, TTL_S, USUAL_TTL_S, USUAL_WATCH_S, WATCH_S, WEB

T = TypeVar("T")

DEADLINE_S = 120.0
"""For one wait. What goes well takes some seconds; a machine that does other things too may need many more."""

LOOK_S = 0.05
"""Between two looks at the cluster, which is in memory."""

FILE = "guests.yaml"
BOTH = tuple(plan.name for plan in GUESTS)


class Broken(Exception):
    """What a scene promises did not come true; the message says what was expected, and what was found."""


class Stage(Protocol):
    """The cluster, as scenes use it; see `cluster.Cluster`."""

    @property
    def pings(self) -> Pings: ...
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def look(self) -> Picture: ...
    def says(self, guest: str, host: str) -> Said | None: ...
    def trouble(self) -> str | None: ...
    def blocklist(self) -> set[str]: ...
    def prepare_guest(self) -> None: ...
    def start_etcd(self) -> None: ...
    def start_ceph(self) -> None: ...
    def start_host(self, name: str) -> None: ...
    def write_guests(self, file: str) -> None: ...
    def begin_pings(self) -> None: ...
    def pull_plug(self, host: str) -> None: ...
    def power_on(self, host: str) -> None: ...
    def command(self, words: Sequence[str], on_line: Callable[[str], None]) -> int: ...


class Play:
    """The demo from its first scene to its last.

    Args:
        stage: where it is played.
        board: where it is told.
        pause: called between two scenes, with what comes next; returns when that is to come.
    """

    def __init__(self, stage: Stage, board: Board, pause: Callable[[str], None]) -> None:
        self._stage = stage
        self._board = board
        self._pause = pause

    def run(self) -> None:
        """Play all scenes.

        Raises:
            Broken: one did not come to what it promises.
        """
        scenes: tuple[tuple[str, Callable[[], str]], ...] = (
            ("A cluster comes up", self._come_up),
            ("web moves while it runs", self._move),
            ("beta is drained, and takes its guests back", self._drain),
            ("beta's plug is pulled", self._pull_plug),
            ("beta comes back", self._come_back),
        )
        for number, (title, scene) in enumerate(scenes, 1):
            if number > 1:
                self._pause(title)
            self._board.scene(number, title)
            since, begun = self._stage.pings.newest, self._stage.now()
            seen = scene()
            seconds = self._stage.now() - begun
            tally = self._settle(since)
            if number > 1:
                seen += f" {tally.lost} of {tally.sent} pings lost, longest gap {tally.gap_s:.1f} s."
            self._board.ends(Result(title=title, seconds=seconds, tally=tally, seen=seen))

    # --- the scenes -------------------------------------------------------------------------------------------

    def _come_up(self) -> str:
        stage, board = self._stage, self._board
        board.say(
            "Three members of etcd, Ceph, and three hosts, each in a network of its own: nothing of this machine's "
            "network is changed, and all of it ends with the demo.",
            look="the hosts, at the left: each gets a session, and has room for guests.",
        )
        with board.step("the guest is there", "Debian's kernel and busybox, kept in .cache/guest"):
            stage.prepare_guest()
        with board.step("etcd has a leader", "three members"):
            stage.start_etcd()
        with board.step("Ceph serves", "a monitor, and an OSD in memory"):
            stage.start_ceph()
        with board.step("three hosts have a session"):
            for name in HOSTS:
                stage.start_host(name)
            self._until("three hosts with a session", lambda: self._sessions() >= {*HOSTS})
        board.say(
            "Two guests, each a few keys in etcd, with a disk in Ceph. Kernel, busybox, and a counter on the disk.",
            look="web's ping, at the right: one mark for each answer.",
        )
        stage.write_guests(FILE)
        self._command("apply", "-f", FILE, "--yes")
        with board.step("both run"):
            for plan in GUESTS:
                self._until(f"{plan.name} to run on {plan.host}", partial(self._runs, plan.name, plan.host))
        with board.step("web answers", "it boots on an emulated processor"):
            stage.begin_pings()
            self._until("an answer of web to a ping", lambda: stage.pings.answers)
        self._say({plan.name: plan.host for plan in GUESTS})
        return f"{len(HOSTS)} hosts, {len(GUESTS)} guests; web answers from {WEB.host}."

    def _move(self) -> str:
        before = self._say({WEB.name: WEB.host})
        self._board.say(
            f"web goes from {WEB.host} to {DB.host} while it runs: its memory is sent, then it stands still for a "
            "moment, and its lock is handed over.",
            look="the marks: it goes on answering. It does not boot: the seconds that it is up go on.",
        )
        self._command("move", WEB.name, DB.host, "--wait")
        web = self._until("web to run on beta", lambda: self._runs(WEB.name, DB.host))
        self._came_live(web, WEB.host)
        self._same_boots(before, {WEB.name: DB.host})
        return f"web runs on {DB.host}, the same boot. It stood still for {web.stopped_ms} ms, says its status."

    def _drain(self) -> str:
        beta = DB.host
        here = dict.fromkeys(BOTH, beta)
        before = self._say(here)
        self._board.say(
            f"{beta} is to be rebooted, and runs two guests. It empties itself: one at a time, each to the first "
            "host of its key `hosts` that can take it.",
            look=f"{beta}, at the left: it drains, and its guests leave.",
        )
        self._command("drain", beta, "--wait")
        there: dict[str, str] = {}
        for name in BOTH:
            guest = self._until(f"{name} to run elsewhere", partial(self._runs_elsewhere, name, beta))
            self._came_live(guest, beta)
            there[name] = self._host_of(guest)
        if left := self._stage.look().hosts[beta].guests:
            raise Broken(f"{beta} is said to be drained, and has {', '.join(one.name for one in left)}")
        between = self._same_boots(before, there)
        self._board.say(
            f"{beta} is empty; it could be rebooted now. Back in service, it takes home what stood elsewhere for it.",
            look="the guests come back, while they run.",
        )
        self._command("undrain", beta, "--return")
        self._come_home(there)
        self._same_boots(between, here)
        return "Both went and came back while they ran, the same boots."

    def _pull_plug(self) -> str:
        stage, board, beta = self._stage, self._board, DB.host
        before = self._say(dict.fromkeys(BOTH, beta))
        dead = {address for one in stage.look().guests.values() if one.lock is not None for address in one.lock.clients}
        if not dead:
            raise Broken(f"the locks of {', '.join(BOTH)} name no client of Ceph")
        board.say(
            f"{beta} loses its power: all its processes at one instant, and its link. No command: nobody is told.",
            look="what is waited for, and why; each wait counts.",
        )
        stage.pull_plug(beta)
        with board.step(
            f"{beta}'s session ends", f"{TTL_S} s after its last renewal (KVM_SESSION_TTL; {USUAL_TTL_S} by default)"
        ):
            self._until(f"the end of {beta}'s session", lambda: beta not in self._sessions())
        with board.step(
            "Ceph lets go of web's disk",
            f"{beta} may only have lost etcd: nobody takes a disk that is open. Ceph forgets the dead within "
            f"{WATCH_S} s ({USUAL_WATCH_S} by default)",
        ):
            self._until("another host with web's lock", lambda: self._guest(WEB.name).taken_from(beta))
        with board.step(
            "the old client is shut out, QEMU starts", "Ceph's blocklist, read back: not one write of it comes"
        ):
            web = self._until("web to run elsewhere", lambda: self._runs_elsewhere(WEB.name, beta))
        last = stage.pings.newest
        with board.step("web boots and answers", "a crash for the guest; its disk is as it left it"):
            self._until("an answer of web", lambda: stage.pings.answered_since(last))
        there = {WEB.name: self._host_of(web)}
        other = self._until("db to run elsewhere", lambda: self._runs_elsewhere(DB.name, beta))
        there[DB.name] = self._host_of(other)
        if missing := dead - stage.blocklist():
            raise Broken(f"{', '.join(sorted(missing))} of {beta} can still write: not in Ceph's blocklist")
        for name in BOTH:
            then, after = before[name], self._says_more(name, there[name], before[name])
            if after.boot != then.boot + 1:
                raise Broken(f"{name}'s disk does not go on: {then} before, {after} now")
        return (
            f"web runs on {there[WEB.name]}, db on {there[DB.name]}, with all that was on their disks; {beta}'s "
            "clients are in Ceph's blocklist."
        )

    def _come_back(self) -> str:
        stage, board, beta = self._stage, self._board, DB.host
        there = {name: self._host_of(self._guest(name)) for name in BOTH}
        before = self._say(there)
        board.say(
            f"{beta} has power again. It finds that its guests run elsewhere, and starts none.",
            look=f"{beta}, at the left: a session, and no guest.",
        )
        stage.power_on(beta)
        with board.step(f"{beta} has a session"):
            self._until(f"a session of {beta}", lambda: beta in self._sessions())
        board.say(
            "What a failover has placed elsewhere stays there until somebody says otherwise.",
            look="both come home, while they run.",
        )
        self._command("undrain", beta, "--return")
        self._come_home(there)
        self._same_boots(before, dict.fromkeys(BOTH, beta))
        return "Both are at home, and were not stopped for it."

    # --- what they share --------------------------------------------------------------------------------------

    def _until(self, what: str, look: Callable[[], T | None]) -> T:
        """Look until that counts as true; return it."""
        deadline = self._stage.now() + DEADLINE_S
        while True:
            found = look()
            if found:
                return found
            if trouble := self._stage.trouble():
                raise Broken(f"{trouble} (waiting for {what})")
            if self._stage.now() > deadline:
                guests = self._stage.look().guests.values()
                said = "; ".join(f"{one.name}: {one.status.reason}" for one in guests if one.status is not None)
                raise Broken(f"no {what} within {DEADLINE_S:g} s. {said}")
            self._stage.sleep(LOOK_S)

    def _command(self, *words: str) -> None:
        self._board.runs(shlex.join(("kvmsupervisor", *words)))
        status = self._stage.command(words, self._board.hears)
        if status:
            raise Broken(f"`{self._board.command}` ended with {status}: {' '.join(self._board.said)}")

    def _sessions(self) -> set[str]:
        return {name for name, host in self._stage.look().hosts.items() if host.session is not None}

    def _guest(self, name: str) -> GuestFacts:
        return self._stage.look().guests[name]

    def _runs(self, name: str, host: str) -> GuestFacts | None:
        guest = self._guest(name)
        return guest if guest.runs_on(host) else None

    def _runs_elsewhere(self, name: str, host: str) -> GuestFacts | None:
        guest = self._guest(name)
        return guest if any(guest.runs_on(other) for other in HOSTS if other != host) else None

    def _is_not_placed(self, name: str) -> bool:
        return self._guest(name).placement is None

    @staticmethod
    def _host_of(guest: GuestFacts) -> str:
        assert guest.lock is not None
        return guest.lock.host

    def _came_live(self, guest: GuestFacts, source: str) -> None:
        if guest.came_live_from != source:
            raise Broken(f"{guest.name} did not come from {source} while it ran: {guest.came_live_from or 'it booted'}")

    def _come_home(self, there: dict[str, str]) -> None:
        beta = DB.host
        with self._board.step("both are at home", "one at a time"):
            for name in BOTH:
                guest = self._until(f"{name} to run on {beta}", partial(self._runs, name, beta))
                self._until(f"the end of {name}'s placement", partial(self._is_not_placed, name))
                self._came_live(guest, there[name])

    def _say(self, where: dict[str, str]) -> dict[str, Said]:
        """What guests say of themselves on these hosts, once they do."""
        said = dict[str, Said]()
        for name, host in where.items():
            said[name] = self._until(f"word of {name} on {host}", partial(self._stage.says, name, host))
        return said

    def _says_more(self, name: str, host: str, before: Said) -> Said:
        """What a guest says there once it has written more: its disk goes on, and what it said earlier is no answer."""

        def look() -> Said | None:
            said = self._stage.says(name, host)
            return said if said is not None and said.written > before.written else None

        return self._until(f"word of {name} on {host} behind write {before.written}", look)

    def _same_boots(self, before: dict[str, Said], where: dict[str, str]) -> dict[str, Said]:
        """Each guest goes on writing on these hosts, and says that it has not booted since."""
        after = {name: self._says_more(name, host, before[name]) for name, host in where.items()}
        for name, said in after.items():
            if said.boot != before[name].boot:
                raise Broken(f"{name} was restarted: {before[name]} before, {said} now")
        return after

    def _settle(self, since: int) -> Tally:
        """The pings behind that one, once those whose answers are under way have settled."""
        pings = self._stage.pings
        last = pings.newest + GRACE
        self._until("further pings", lambda: pings.newest > last)
        return pings.tally(self._stage.now(), since=since)

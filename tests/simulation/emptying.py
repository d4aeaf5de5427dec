"""Once all is healed: a host that drains becomes empty within its bound, or says of each machine why it stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsupervisor.domain.host_wish import HostProgress
from tests.simulation.settling import TERMS

if TYPE_CHECKING:
    from tests.simulation.world import World


class Emptying:
    """The drains of some hosts, from the healing on.

    Args:
        world: was healed just now.
        hosts: those that drain.
    """

    def __init__(self, world: World, hosts: list[str]) -> None:
        self._world = world
        self._hosts = hosts
        self._since = world.loop.time()
        living = sum(len(world.judge.living(name)) for name in world.wishes)
        pause_s = max(world.pauses_s.values(), default=0.0)
        # One after the other, each to one target after the other.
        others = len(world.hosts) - 1
        self._bound_s = TERMS.host_s + TERMS.takeover_s + (1 + living) * others * TERMS.placed_s + 2 * pause_s

    @property
    def is_over(self) -> bool:
        """Whether nothing has its time any more."""
        return self._world.loop.time() - self._since > self._bound_s

    def look(self) -> bool:
        """Whether each is empty, or says what keeps it from that."""
        return not any(self._lacking(host) for host in self._hosts)

    def end(self) -> None:
        """All of them have had the time for that."""
        for host in self._hosts:
            if (what := self._lacking(host)) is not None:
                said = self._world.progress(host)
                told = "nothing" if said is None else said.to_json().decode()
                self._world.judge.wrong("a drain", f"{host}: {what} within {self._bound_s:g} s; it says {told}")

    def _lacking(self, host: str) -> str | None:
        world = self._world
        said, wish = world.progress(host), world.etcd._server.keys.get(world.layout.drain_key(host).encode())
        if said is None or wish is None or said.mode is None or said.of != wish.mod_revision:
            return "it has not said how far its drain is"
        lives = {qemu.instance for qemu in world.host(host).kernel.living}
        if said.drained is not None:
            return f"it says that it is empty, and {sorted(lives)} live there" if lives else None
        if silent := lives - said.refused.keys():
            return f"{sorted(silent)} live there, and nothing is said of why"
        return None if lives else "it is empty, and does not say so"


class Returning:
    """What is to come back to some hosts, from the end of the drains on."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._hosts = sorted(host for host, wish in world.host_wishes.items() if "return" in wish)
        self._since = world.loop.time()
        living = sum(len(world.judge.living(name)) for name in world.wishes)
        pause_s = max(world.pauses_s.values(), default=0.0)
        self._bound_s = TERMS.host_s + TERMS.takeover_s + (1 + living) * TERMS.placed_s + 2 * pause_s

    @property
    def is_over(self) -> bool:
        """Whether nothing has its time any more."""
        return not self._hosts or self._world.loop.time() - self._since > self._bound_s

    def look(self) -> bool:
        """Whether nothing is on its way any more, and what does not come says why."""
        return all(self._lacking(said) is None for said in map(self._world.progress, self._hosts))

    def end(self) -> None:
        """All have had the time for that."""
        for host in self._hosts:
            said = self._world.progress(host)
            if (what := self._lacking(said)) is not None:
                assert said is not None
                told = said.to_json().decode()
                self._world.judge.wrong("a return", f"{host}: {what} within {self._bound_s:g} s; it says {told}")

    @staticmethod
    def _lacking(said: HostProgress | None) -> str | None:
        if said is None or said.mode is not None:
            return None
        silent = {*said.left} - said.refused.keys()
        return f"{sorted(silent)} did not come back, and nothing is said of why" if silent else None

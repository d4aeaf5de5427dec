"""From keys to QEMUs, and what becomes of them when they, or their supervisor, end."""

from __future__ import annotations

import json
import shlex

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Hosts, Keys, eventually

TWENTY = [str(number) for number in range(1, 21)]


def test_twenty_machines(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """The life of twenty machines, and of their supervisor, as an operator lives it."""
    host = hosts().start()
    for one in TWENTY:
        flags = f"-msg timestamp=on -rtc base=utc,driftfix=slew -name 'the guest no. {one}' {tiny}"
        keys.put(one, host=host.name, ram=16, extra_flags=flags, shutdown_timeout=1)

    qemus = host.wait_running(*TWENTY)
    assert len(host.qemus()) == 20
    for one, qemu in qemus.items():
        words = shlex.split(f"-msg timestamp=on -rtc base=utc,driftfix=slew -name 'the guest no. {one}' {tiny}")
        assert list(qemu.argv[-len(words) :]) == words
        lock = keys.lock(one)
        assert lock is not None
        assert (lock.host, lock.pid, lock.starttime) == (host.name, qemu.pid, qemu.starttime)

    # A killed QEMU comes back, and says what happened.
    qemus["7"].kill()
    status = host.wait_for("7", lambda s: s.phase is Phase.RUNNING and s.pid not in {None, qemus["7"].pid})
    assert status.last_exit == "crashed (signal 9)"
    assert status.restarts == 1
    assert host.metric("instance_exits_total", instance="7", reason="crashed") == 1
    qemus = host.wait_running(*TWENTY)
    locks = {one: keys.lock(one) for one in TWENTY}

    # A killed supervisor, and one that was stopped, leave all of them as they are.
    for end in (host.kill9, host.stop):
        end()
        assert host.qemus() == sorted(qemus.values(), key=lambda qemu: qemu.pid)
        host.start()
        eventually("all to be adopted", lambda: host.metric("adopted_total") == 20)
        assert host.wait_running(*TWENTY) == qemus
        assert {one: keys.lock(one) for one in TWENTY} == locks
    assert host.metric("instance_starts_total", instance="1") == 0

    # Deleting the keys of one, its lock among them, shuts it down and leaves nothing of it.
    keys.delete("3")
    host.wait_forgotten("3")
    assert not qemus.pop("3").alive
    eventually("lock and status of 3 to go", lambda: keys.lock("3") is None and keys.status("3") is None)
    assert keys.names(keys.layout.instance_prefix(InstanceId("3"))) == []
    assert not (host.run_dir / "3").exists()

    # Garbage is told in every view, and harms nobody.
    keys.put("4", ram="garbage")
    status = keys.wait_status("4", lambda status: bool(status.problems))
    assert status.phase is Phase.RUNNING
    assert "garbage" in status.problems[0]
    assert status.problems[0].startswith("ram: ")
    assert host.metric("instance_invalid", instance="4") == 1
    checked = host.cli("check", "4", "-o", "json")
    assert checked.returncode == 1
    (finding,) = json.loads(checked.stdout)
    assert finding["key"] == "ram"
    assert "garbage" in finding["found"]
    assert host.wait_running(*qemus) == qemus
    assert [one for one, status in host.instances().items() if status.problems] == ["4"]

"""Whatever stands under the prefix: the supervisor, its HTTP server and the other machines go on."""

from __future__ import annotations

import json

from kvmsupervisor.domain.keys import InstanceId, parse_id
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import Hosts, Keys, eventually

INVALID = b"\xff\xfe\x80".decode(errors="surrogateescape")
"""Reaches etcdctl as bytes that are no UTF-8."""


def test_hostile_keys(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Invalid UTF-8, huge values, ids that are no ids, nested keys and 10,000 unknown ones hurt nobody and are told."""
    host = hosts(KVM_SHUTDOWN_TIMEOUT="1").start()
    keys.machines(host.name, "good", ram=16, extra_flags=tiny)
    good = host.wait_running("good")
    prefix = keys.layout.prefix

    for key in ("..", "../..", "", "a/b", " ", "-x", "x" * 64, "a%2fb", "a\nb", "é", INVALID):
        keys.write(f"{prefix}/{key}/host", host.name)
    for key in (f"{prefix}/", f"{prefix}//", f"{prefix}/plain", f"{prefix}/bad/{INVALID}", f"{prefix}/bad/a/b/c"):
        keys.write(key, "x")
    keys.together({f"{prefix}/bad/huge": b"x" * (1 << 20)})
    keys.together({f"{prefix}/bad/ram": b"y" * (1 << 20)})
    keys.together({f"{prefix}/bad/extra_flags": b"'\x00\xff", f"{prefix}/bad/lock": b"\xff" * 1000})
    keys.together({f"{prefix}/many/unknown-{number}": b"?" for number in range(10_000)})
    keys.put("many", ram=16, host=host.name)
    keys.put("bad", host=host.name)
    # One whose every known key holds rubbish.
    for name in ("ram", "mac", "bridge", "rbd", "spice_port", "cpus", "cpu", "machine", "firmware", "power", "restart"):
        keys.write(f"{prefix}/rubbish/{name}", INVALID)
    keys.put("rubbish", host=host.name)

    for one in ("bad", "many", "rubbish"):
        status = host.wait_for(one, lambda s: bool(s.problems))
        assert status.phase is Phase.INVALID
        keys.wait_status(one, lambda s: bool(s.problems))
        assert host.metric("instance_invalid", instance=one) == 1
    assert set(host.instances()) == {"good", "bad", "many", "rubbish"}

    # Still acting on wishes, and the good one is none the worse.
    keys.machines(host.name, "another", ram=16, extra_flags=tiny)
    host.wait_running("another")
    assert host.wait_running("good") == good

    checked = host.cli("check", "-o", "json")
    assert checked.returncode == 1, checked.stderr
    findings = json.loads(checked.stdout)
    named = {finding["key"] for finding in findings}
    concerned = {one for finding in findings for one in finding["instances"]}
    assert {"bad", "many", "rubbish"} <= concerned
    assert "good" not in concerned
    assert any(key.startswith(f"{prefix}/a/b/") for key in named) or "a" in concerned
    assert any(key.startswith(f"{prefix}/../") for key in named)
    assert any(key.startswith(f"{prefix}//") for key in named)
    assert host.cli("list").returncode == 0

    # Mended, each runs; and nobody's files were touched.
    assert sorted(path.name for path in host.folder.iterdir()) == ["log", "run", "state"]
    assert [path.name for path in (host.folder / "state").iterdir()] == ["_events"]
    assert all(parse_id(path.name.partition(".jsonl")[0]) for path in (host.folder / "state" / "_events").iterdir())
    keys.etcd.ctl("del", "--prefix", keys.layout.instance_prefix(InstanceId("rubbish")))
    host.wait_forgotten("rubbish")
    keys.machines(host.name, "rubbish", ram=16, extra_flags=tiny)
    host.wait_running("rubbish")
    host.kill9()
    host.start()
    eventually("the adoption", lambda: host.metric("adopted_total") == 3)
    assert host.wait_running("good") == good
    assert not host.events("instance.error")

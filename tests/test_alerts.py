"""The alerts of deploy/monitoring, by `promtool test rules`: each fires where it is meant to, and is silent elsewhere.

Every case gives series, one value a minute, and says which alerts of one name fire at the end of them. Series are as
Prometheus keeps them with `honor_labels`: `instance` of a host's own series is the address that was scraped.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FILE = Path(__file__).parents[1] / "deploy" / "monitoring" / "alerts.yml"
ALPHA = 'instance="alpha:9746",job="kvmsupervisor"'
ON_ALPHA = 'instance="web1",host="alpha",job="kvmsupervisor"'
ON_BETA = 'instance="web1",host="beta",job="kvmsupervisor"'
HOST = {"instance": "alpha:9746", "job": "kvmsupervisor"}
WEB1 = {"instance": "web1", "host": "alpha", "job": "kvmsupervisor"}
SUMMED = {"instance": "web1", "host": "alpha"}


@dataclass(frozen=True)
class Case:
    """What is seen, after how many minutes, and the labels of the alerts that fire then."""

    what: str
    alert: str
    series: Mapping[str, str]
    minutes: int
    fires: list[dict[str, str]] = field(default_factory=list)


def phases(where: str, **values: str) -> dict[str, str]:
    return {f'kvmsupervisor_instance_phase{{{where},phase="{phase}"}}': value for phase, value in values.items()}


def gauge(name: str, labels: str, values: str) -> dict[str, str]:
    return {f"kvmsupervisor_{name}{{{labels}}}": values}


def of_a_host(alert: str, name: str, bad: str, good: str, minutes: int) -> list[Case]:
    return [
        Case("bad", alert, gauge(name, ALPHA, bad), minutes, [HOST]),
        Case("good", alert, gauge(name, ALPHA, good), minutes),
    ]


def of_an_instance(alert: str, name: str, bad: str, good: str, minutes: int) -> list[Case]:
    return [
        Case("bad", alert, gauge(name, ON_ALPHA, bad), minutes, [WEB1]),
        Case("good", alert, gauge(name, ON_ALPHA, good), minutes),
    ]


def memory(available: str) -> dict[str, str]:
    return {
        **gauge("instance_guest_memory_bytes", f'{ON_ALPHA},kind="total"', "1000x20"),
        **gauge("instance_guest_memory_bytes", f'{ON_ALPHA},kind="available"', available),
    }


def requests(*, slow: str, all_of_them: str) -> dict[str, str]:
    """Requests to etcd of which some take between 2.5 and 5 s, and all others a millisecond."""
    bucket = f"kvmsupervisor_etcd_request_seconds_bucket{{{ALPHA},le="
    fast = all_of_them if slow == "0 1x20" else slow
    return {
        f'{bucket}"0.001"}}': fast,
        f'{bucket}"2.5"}}': fast,
        f'{bucket}"5.0"}}': all_of_them,
        f'{bucket}"+Inf"}}': all_of_them,
    }


NIC = f'{ON_ALPHA},nic="nic0"'
WRITES = f'{ON_ALPHA},disk="disk0",operation="write"'
FAILED = "instance_disk_failed_operations_total"
DROPPED, RECEIVED = "instance_network_dropped_packets_total", f'{NIC},direction="received"'
A_DISK = {"instance": "web1", "host": "alpha", "disk": "disk0"}
A_NIC = {"instance": "web1", "host": "alpha", "nic": "nic0"}
CRASHED, SHUTDOWN = f'{ON_ALPHA},reason="crashed"', f'{ON_ALPHA},reason="guest-shutdown"'

CASES = [
    Case("a dead supervisor", "KvmHostSilent", {f"up{{{ALPHA}}}": "1 0x5"}, 4, [HOST]),
    Case("an upgrade", "KvmHostSilent", {f"up{{{ALPHA}}}": "1 0 1x5"}, 4),
    *of_a_host("KvmHostWithoutSession", "session_remaining_seconds", "12 0x5", "12 0 14x5", 4),
    *of_a_host("KvmIdentityMismatch", "identity_mismatch", "0 1", "0 0", 1),
    *of_a_host("KvmEtcdAway", "etcd_up", "1 0x5", "1 0 1x5", 4),
    *of_a_host("KvmGuestsEndWithSupervisor", "guests_survive", "0x9", "1x9", 7),
    *of_a_host("KvmGuardMemoryUnlocked", "guard_memory_locked", "0x9", "1x9", 7),
    *of_a_host("KvmTakeover", "takeovers_total", "0 0 1x5", "1x20", 5),
    Case(
        "it sees nothing new, and another host does", "KvmHostBehind",
        {**gauge("watch_revision", ALPHA, "70x15"), **gauge("watch_revision", 'instance="beta:9746"', "70+1x15")}, 12,
        [HOST],
    ),
    Case(
        "asked a moment before the other, while keys change", "KvmHostBehind",
        {**gauge("watch_revision", ALPHA, "70+9x15"), **gauge("watch_revision", 'instance="beta:9746"', "75+9x15")}, 12,
    ),
    Case(
        "nothing changes", "KvmHostBehind",
        {**gauge("watch_revision", ALPHA, "70x15"), **gauge("watch_revision", 'instance="beta:9746"', "70x15")}, 12,
    ),
    *of_a_host("KvmCephAway", "ceph_up", "1 0x5", "1 0 1x5", 4),
    *of_a_host("KvmFencePending", "fences_pending", "0 2x5", "0 2 0x5", 4),
    *of_a_host("KvmSessionsLost", "sessions_lost_total", "0+1x5", "0 0 1x60", 5),
    Case("slow for long", "KvmEtcdSlow", requests(slow="0+30x20", all_of_them="0+60x20"), 18, [HOST]),
    Case("one slow request", "KvmEtcdSlow", requests(slow="0 1x20", all_of_them="0+600x20"), 18),
    *of_a_host("KvmHistoryChanged", "history_changes_total", "0 0 1x5", "1x20", 5),
    *of_a_host("KvmRemovalsHeld", "removals_held", "0 3", "0 0", 1),
    Case(
        "a host died, and two others tell so", "KvmOrphans",
        {**gauge("orphans", 'instance="beta:9746"', "0 3x5"), **gauge("orphans", 'instance="gamma:9746"', "0 3x5")},
        4, [{}],
    ),
    Case("a failover in time", "KvmOrphans", gauge("orphans", 'instance="beta:9746"', "0 3 0x5"), 4),

    Case(
        "halted although its QEMU lives", "KvmInstanceDown",
        {**gauge("instance_up", ON_ALPHA, "1 0x9"), **phases(ON_ALPHA, running="1x10")}, 7, [{"instance": "web1"}],
    ),
    Case(
        "waits for its bridge", "KvmInstanceDown",
        {**gauge("instance_up", ON_ALPHA, "0x10"), **phases(ON_ALPHA, waiting="1x10", running="0x10")}, 7,
        [{"instance": "web1"}],
    ),
    Case(
        "stopped on purpose", "KvmInstanceDown",
        {**gauge("instance_up", ON_ALPHA, "1 0x9"), **phases(ON_ALPHA, stopped="0 1x9", running="1 0x9")}, 9,
    ),
    Case(
        "on its way: it runs on one host, and the other waits for it", "KvmInstanceDown",
        {
            **gauge("instance_up", ON_ALPHA, "1x10"), **phases(ON_ALPHA, running="1x10"),
            **gauge("instance_up", ON_BETA, "0x10"), **phases(ON_BETA, waiting="1x10"),
        }, 9,
    ),

    Case("3 % of 1000", "KvmGuestMemoryLow", memory("30x20"), 17, [WEB1]),
    Case("for a moment", "KvmGuestMemoryLow", memory("500x9 30 500x9"), 17),

    Case("every 12 minutes, and up between", "KvmCrashLoop",
         gauge("instance_exits_total", CRASHED, "0x5 1x12 2x12 3x12 4x12 5x12"), 65, [SUMMED]),
    Case("at once, again and again", "KvmCrashLoop", gauge("instance_exits_total", CRASHED, "0+2x5"), 4,
         [SUMMED]),
    Case("once, and once more a day later", "KvmCrashLoop",
         gauge("instance_exits_total", CRASHED, "0x5 1x1440 2x60"), 1500),
    Case("its guest shuts down as people ask", "KvmCrashLoop", gauge("instance_exits_total", SHUTDOWN, "0+1x10"), 9),
    Case(
        # Two hosts that tell of one instance in turn, 7 and 0 ends: one series of both would count 7 a turn.
        "a mover, of whom two hosts tell", "KvmCrashLoop",
        {
            **gauge("instance_exits_total", CRASHED, "7x30"),
            **gauge("instance_exits_total", CRASHED.replace("alpha", "beta"), "0x30"),
        }, 29,
    ),

    Case("powers itself off when it is up", "KvmRestartLoop",
         gauge("instance_starts_total", ON_ALPHA, "0+1x20"), 19, [WEB1]),
    Case("restarted by a person", "KvmRestartLoop", gauge("instance_starts_total", ON_ALPHA, "0+1x3 3x17"), 19),
    Case(
        "a mover, of whom two hosts tell", "KvmRestartLoop",
        {
            **gauge("instance_starts_total", ON_ALPHA, "40x30"), **gauge("instance_starts_total", ON_BETA, "1x30"),
        }, 29,
    ),
    *of_an_instance("KvmGuestResets", "instance_resets_total", "0+3x10", "0+1x2 2x8", 9),
    Case("its bridge is gone", "KvmNicUnplugged",
         gauge("instance_nic_plugged", NIC, "1 0x5"), 5, [{**WEB1, "nic": "nic0"}]),
    Case("its bridge was made again", "KvmNicUnplugged", gauge("instance_nic_plugged", NIC, "1 0 1x5"), 5),
    Case("errors", "KvmDiskErrors", gauge(FAILED, WRITES, "0 0 2x9"), 5, [A_DISK]),
    Case("an error long ago", "KvmDiskErrors", gauge(FAILED, WRITES, "2x30"), 25),
    Case(
        "a second for each", "KvmDiskSlow",
        {
            **gauge("instance_disk_operation_seconds_total", WRITES, "0+60x40"),
            **gauge("instance_disk_operations_total", WRITES, "0+60x40"),
        }, 30, [A_DISK],
    ),
    Case(
        "a millisecond for each", "KvmDiskSlow",
        {
            **gauge("instance_disk_operation_seconds_total", WRITES, "0+0.06x40"),
            **gauge("instance_disk_operations_total", WRITES, "0+60x40"),
        }, 30,
    ),
    Case("many", "KvmNicDrops", gauge(DROPPED, RECEIVED, "0+6000x40"), 30, [A_NIC]),
    Case("a few", "KvmNicDrops", gauge(DROPPED, RECEIVED, "0+6x40"), 30),
    Case(
        "half of its time", "KvmCpuShort",
        {**gauge("instance_cpu_wait_seconds_total", ON_ALPHA, "0+60x40"), **gauge("instance_vcpus", ON_ALPHA, "2x40")},
        35, [WEB1],
    ),
    Case(
        "hardly ever", "KvmCpuShort",
        {**gauge("instance_cpu_wait_seconds_total", ON_ALPHA, "0+6x40"), **gauge("instance_vcpus", ON_ALPHA, "2x40")},
        35,
    ),
    *of_an_instance("KvmInstanceInvalid", "instance_invalid", "0 1x9", "0 1 0x9", 8),
    *of_an_instance("KvmHostAbsent", "instance_host_absent", "0 1x9", "0 1 0x9", 8),
    *of_an_instance("KvmInstanceUnguarded", "instance_unguarded", "0 1x5", "0 0x5", 4),
    *of_an_instance("KvmInternalErrors", "internal_errors_total", "0 0 1x5", "1x20", 5),
]  # fmt: skip


def rules() -> str:
    return FILE.read_text()


def alerts() -> list[str]:
    (group,) = yaml.safe_load(rules())["groups"]
    return [rule["alert"] for rule in group["rules"]]


def judge(folder: Path, *cases: Case, rewritten: str | None = None) -> subprocess.CompletedProcess[str]:
    """What `promtool test rules` makes of the cases; by their labels, for what is said of them is prose."""
    bare = [
        {key: value for key, value in rule.items() if key not in {"annotations", "labels"}}
        for rule in yaml.safe_load(rewritten or rules())["groups"][0]["rules"]
    ]
    (folder / "rules.yaml").write_text(json.dumps({"groups": [{"name": "kvmsupervisor", "rules": bare}]}))
    tests = [
        {
            "name": f"{case.alert}: {case.what}",
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
            "alert_rule_test": [
                {
                    "eval_time": f"{case.minutes}m",
                    "alertname": case.alert,
                    "exp_alerts": [{"exp_labels": labels} for labels in case.fires],
                }
            ],
        }
        for case in cases
    ]
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(json.dumps(document))
    return subprocess.run(
        ["promtool", "test", "rules", folder / "tests.yaml"], capture_output=True, text=True, timeout=60, check=False
    )


def test_each_alert_fires_and_is_silent(tmp_path: Path) -> None:
    """`promtool test rules` passes for every case."""
    done = judge(tmp_path, *CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_is_untested() -> None:
    """Each alert of the file has a case in which it fires and one in which it is silent, and there is no other."""
    assert {case.alert for case in CASES if case.fires} == set(alerts())
    assert {case.alert for case in CASES if not case.fires} == set(alerts())


def test_each_alert_says_how_bad_it_is() -> None:
    """A severity of three, and a sentence for people."""
    (group,) = yaml.safe_load(rules())["groups"]
    assert {rule["labels"]["severity"] for rule in group["rules"]} == {"critical", "warning", "info"}
    assert all(rule["annotations"]["summary"] for rule in group["rules"])


def test_the_cases_would_fail(tmp_path: Path) -> None:
    """A rule that looks at one host at a time does not pass: the case of an instance on its way tells."""
    up = "max by (instance) (kvmsupervisor_instance_up)"
    broken = rules().replace(up, "kvmsupervisor_instance_up")
    assert broken != rules()
    failed = judge(tmp_path, *CASES, rewritten=broken)
    assert failed.returncode != 0
    assert "it runs on one host, and the other waits for it" in failed.stdout + failed.stderr


def test_without_the_label_host_two_hosts_would_be_one_series(tmp_path: Path) -> None:
    """What `honor_labels` makes of two hosts' counters with the same labels, 7 and 0: ends that never were."""
    merged = gauge("instance_exits_total", 'instance="web1",reason="crashed"', " ".join(["7", "0"] * 5))
    assert judge(tmp_path, Case("merged", "KvmCrashLoop", merged, 9, [{"instance": "web1"}])).returncode == 0

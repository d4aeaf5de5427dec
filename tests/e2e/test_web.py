"""The page of a real cluster: real etcd, real supervisors, real QEMUs; asked over HTTP, without a browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from jsonschema import Draft202012Validator

from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.status import Phase
from tests.support.cluster import DEADLINE_S, Host, Hosts, Keys, eventually
from tests.support.etcd import EtcdServer
from tests.support.page import Page

SCHEMAS = Path(__file__).resolve().parents[2] / "kvmsupervisor" / "web" / "schemas"


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text()))


def test_the_page_shows_what_list_and_hosts_show(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Requirements: the same set, those of dead hosts as unknown, changes as they come, and values as their schemas."""
    alpha, beta = hosts("alpha", KVM_SESSION_TTL="2").start(), hosts("beta", KVM_SESSION_TTL="2").start()
    keys.put("1", ram=16, extra_flags=tiny, host="alpha")
    keys.put("2", ram=16, extra_flags=tiny, host="beta")
    keys.put("bad", ram="plenty", host="alpha")
    keys.put("nowhere", ram=16)
    for host, name in ((alpha, "1"), (beta, "2")):
        host.wait_for(name, Phase.RUNNING)
    with Page(keys, alpha) as page:
        page.in_step()
        for command, path in (("list", "instances"), ("hosts", "hosts")):
            printed = json.loads(alpha.cli(command, "-o", "json").stdout)
            shown = page.json(f"/api/v1/{path}")
            key = "id" if command == "list" else "host"
            assert [one[key] for one in shown] == [one[key] for one in printed]
            assert [one | two for one, two in zip(shown, printed, strict=True)] == shown
        with page.stream() as events:
            kind, first = events.next()
            assert (kind, {row["id"] for row in first["rows"]}) == ("reset", {"1", "2", "bad", "nowhere"})
            keys.put("1", description="another")
            assert any(row["description"] == "another" for row in events.until("change")["rows"])
            beta.kill9()
            while True:
                rows = {row["id"]: row for row in events.until("change")["rows"]}
                if rows.get("2", {}).get("phase") == "unknown":
                    break
            mark = events.mark
        keys.delete("nowhere")
        eventually("its removal", lambda: "nowhere" not in page.instances())
        with page.stream(since=mark) as events:
            kind, data = events.next()
            assert (kind, data["gone"]) == ("change", ["nowhere"])
        text = page.get("/")[1].decode()
        assert re.findall(r'<tr id="i-(\w+)"', text)[-1] == "1"
        assert '<span class="phase unknown">unknown</span>' in text
        assert b"not seen by its host" not in page.get("/instances/1")[1]
        assert page.json("/api/v1/events?instance=1")[-1]["instance"] == "1"
        layout = keys.layout
        for name, key in (
            ("status", layout.status_key(InstanceId("1"))),
            ("events", layout.events_key(InstanceId("1"))),
            ("lock", layout.lock_key(InstanceId("1"))),
        ):
            validator(name).validate(json.loads(keys.get(key) or b""))
        assert page.end() == 0


def test_etcd_away_and_back(etcd_alone: EtcdServer, etcd_prefix: str) -> None:
    """Requirement: it says so, with the time of what it shows, and goes on by itself; it starts without etcd, too."""
    keys = Keys(etcd_alone, etcd_prefix)
    keys.put("1", ram=16, host="alpha")
    with Host(keys, "alpha") as host, Page(keys, host) as page:
        page.in_step()
        with page.stream() as events:
            assert events.until("state")["in_step"] is True
            etcd_alone.kill()
            state = events.until("state")
            assert (state["in_step"], bool(state["problem"])) == (False, True)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", state["as_of"])
            assert page.get("/readyz")[0] == http.client.SERVICE_UNAVAILABLE
            assert list(page.instances()) == ["1"]
            text = page.get("/")[1].decode()
            assert "etcd does not answer" in text
            assert "What you see is as of" in text
            with Page(keys, host) as late:
                assert late.get("/readyz")[0] == http.client.SERVICE_UNAVAILABLE
                assert b"Nothing has been read from etcd yet" in late.get("/")[1]
                etcd_alone.start()
                etcd_alone.wait_ready()
                late.in_step()
                assert list(late.instances()) == ["1"]
            while not events.until("state")["in_step"]:
                pass
            keys.put("2", ram=16, host="alpha")
            assert [row["id"] for row in events.until("change")["rows"]] == ["2"]


def test_it_runs_without_privileges_and_reads_as_reader(etcd_alone: EtcdServer, tmp_path: Path) -> None:
    """Requirement: an ordinary user, and etcd's role reader, which may write nothing."""
    if os.geteuid() != 0:
        pytest.fail("the tests of another user run as root, as CI's do")
    script = Path(__file__).resolve().parents[2] / "config" / "etcd-roles"

    for user in ("root", "supervisor", "operator"):
        (tmp_path / user).write_text(f"{user}{user}")
    base = {"PATH": os.environ["PATH"], "ETCDCTL_ENDPOINTS": etcd_alone.endpoint}
    subprocess.run([script, tmp_path], env=base, check=True, capture_output=True)
    etcd_alone.ctl("user", "add", "web:webweb", user="root:rootroot")
    etcd_alone.ctl("user", "grant-role", "web", "reader", user="root:rootroot")
    etcd_alone.ctl("put", "/kvm/1/ram", "16", user="operator:operatoroperator")
    password = tmp_path / "web"
    password.write_text("webweb")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent != Path("/") and parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    environment = {
        "PATH": os.environ["PATH"],
        "KVM_CONFIG": "/dev/null",
        "KVM_WEB_LISTEN": "127.0.0.1:0",
        "KVM_LOG_FORMAT": "json",
        "LOCK": "/kvmsupervisor/locks/%i",
        "ETCD_ENDPOINTS": etcd_alone.endpoint,
        "ETCD_USERNAME": "web",
        "ETCD_PASSWORD_FILE": str(password),
    }

    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--no-new-privs",
             sys.executable, "-m", "kvmsupervisor", "web"],
            env=environment, stdout=out, stderr=out,
        )  # fmt: skip
    try:

        def answers() -> Any:
            assert process.poll() is None, log.read_text()
            found = re.search(r'"event": "web.listening", "port": (\d+)', log.read_text())
            if found is None:
                return None
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=DEADLINE_S)
            with contextlib.closing(connection):
                connection.request("GET", "/api/v1/instances")
                return json.loads(connection.getresponse().read())

        assert [one["id"] for one in eventually("its rows", answers)] == ["1"]
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\s+65534", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


FLOOD = 500


def test_a_flood_of_the_page_is_nothing_to_a_supervisor(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Requirement: 500 connections at once, half of them streams, killing and starting it: the supervisor sees none."""
    alpha = hosts("alpha").start()
    keys.put("1", ram=16, extra_flags=tiny, host="alpha")
    running = alpha.wait_for("1", Phase.RUNNING)
    supervisor = psutil.Process(alpha.pid)
    files = supervisor.num_fds()
    with Page(keys, alpha) as page, contextlib.ExitStack() as stack:
        page.in_step()
        flood = [
            stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=DEADLINE_S))
            for _ in range(FLOOD)
        ]
        for number, one in enumerate(flood):
            path = ("/api/v1/stream", "/", "/api/v1/instances")[number % 3]
            with contextlib.suppress(OSError):
                one.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()[: 40 if number % 7 == 0 else None])
        # It still answers, and the supervisor does.
        assert page.get("/healthz")[0] == http.client.OK
        assert alpha.running
        # Some come and go by themselves; of each connection of the flood one would stay.
        assert supervisor.num_fds() < files + FLOOD // 10
        assert alpha.wait_for("1", Phase.RUNNING).pid == running.pid
        page.kill()
    assert alpha.pid == supervisor.pid
    assert not alpha.events("instance.ended")

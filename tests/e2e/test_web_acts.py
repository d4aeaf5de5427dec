"""Acts through the page on the real thing: etcd with users and roles, a supervisor, a QEMU, TLS."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from kvmsupervisor.domain.status import Phase
from tests.deploy.test_etcd_roles import LOCK, Secured
from tests.support.certificates import Authority
from tests.support.cluster import eventually
from tests.support.etcd import EtcdServer
from tests.support.page import Page

TOKEN = "0123456789abcdef" * 3


@pytest.fixture
def secured(etcd_alone: EtcdServer, tmp_path: Path) -> Secured:
    found = Secured(etcd_alone, tmp_path)
    found.set_up()
    etcd_alone.ctl("user", "add", "web:webweb", user="root:rootroot")
    etcd_alone.ctl("user", "grant-role", "web", "reader", user="root:rootroot")
    (tmp_path / "web").write_text("webweb\n")
    return found


@pytest.fixture
def files(tmp_path: Path) -> Authority:
    """What `KVM_WEB_CONFIG` and `KVM_WEB_PEOPLE` name."""
    authority = Authority.make(tmp_path / "tls")
    authority.issue("server")
    hashed = bcrypt.hashpw(b"wonder", bcrypt.gensalt(5)).decode()
    (tmp_path / "tls" / "web.yml").write_text(
        "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n  client_ca_file: ca.pem\n"
        f"  client_auth_type: VerifyClientCertIfGiven\nbasic_auth_users:\n  alice: {hashed}\n"
    )
    (tmp_path / "tls" / "token").write_text(TOKEN)
    (tmp_path / "tls" / "people.yml").write_text("operator: ['cert:ops', token:ci]\ntokens: {ci: token}\n")
    return authority


def settings(secured: Secured, authority: Authority) -> dict[str, str]:
    return {
        "LOCK": LOCK,
        "ETCD_USERNAME": "web",
        "ETCD_PASSWORD_FILE": str(secured.folder / "web"),
        "KVM_WEB_CONFIG": str(authority.folder / "web.yml"),
        "KVM_WEB_PEOPLE": str(authority.folder / "people.yml"),
    }


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.certificate)


def test_a_machines_life_through_the_page(secured: Secured, files: Authority, tiny: str) -> None:
    """Requirement: created, stopped, started, deleted; each answer is a revision, which its host then acts on."""
    writer = {
        "KVM_WEB_ETCD_USERNAME": "operator",
        "KVM_WEB_ETCD_PASSWORD_FILE": str(secured.folder / "operator"),
    }
    with secured.host("supervisor") as host, Page(host.keys, host, **settings(secured, files), **writer) as page:
        host.start()
        page.tls = trusting(files)
        assert page.get("/readyz")[0] == 401
        page.headers = {"Authorization": f"Bearer {TOKEN}"}
        page.in_step()
        with page.stream() as events:

            def until(name: str, revision: int, fits: Callable[[Any], bool]) -> None:
                row: dict[str, Any] = {"acted_on": 0}
                while row["acted_on"] < revision or not fits(row):
                    row = {one["id"]: one for one in events.next()[1].get("rows", ())}.get(name, row)

            keys = {"host": "alpha", "ram": "16", "shutdown_timeout": "0", "extra_flags": tiny}
            status, (made,) = page.act("create", "one", keys=keys)
            assert (status, made["result"]) == (200, "done")
            until("one", made["revision"], lambda row: row["phase"] == "running")
            for act, phase in (("stop", "stopped"), ("start", "running")):
                status, (done, refused) = page.act(act, "one", "nobody")
                assert (status, done["result"], refused["result"]) == (409, "done", "refused")
                until("one", done["revision"], lambda row, phase=phase: row["phase"] == phase)  # type: ignore[misc]
            assert page.act("delete", "one")[0] == 200
            host.wait_forgotten("one")
            eventually("its end on the page", lambda: "one" not in page.instances())
        acts = [json.loads(line) for line in page.log.splitlines() if '"web.act"' in line]
        assert {(one["who"], one["address"]) for one in acts} == {("token:ci", "127.0.0.1")}
        assert [one["act"] for one in acts] == ["create", "stop", "stop", "start", "start", "delete"]


def test_a_page_that_only_reads_cannot_write(secured: Secured, files: Authority) -> None:
    """Law: without a user of its own for that, etcd refuses it. And the ways in, over real TLS."""
    secured.put("operator", "/kvm/one/ram", "16")
    with secured.host("operator") as host, Page(host.keys, host, **settings(secured, files)) as page:
        page.tls = trusting(files)
        origin = {"Origin": page.url, "X_Kvmsupervisor": "1"}
        page.headers = origin
        order = {"act": "stop", "instances": ["one"]}
        assert page.ask("POST", "/api/v1/acts", order)[0] == 401
        alice = "Basic YWxpY2U6d29uZGVy"
        assert json.loads(page.ask("GET", "/api/v1/me", Authorization=alice)[1]) == {
            "name": "alice",
            "roles": ["viewer"],
        }
        assert page.ask("POST", "/api/v1/acts", order, Authorization=alice)[0] == 403
        page.tls.load_cert_chain(*files.issue("ops"))
        status, (result,) = page.act("stop", "one")
        assert (status, result["result"]) == (409, "refused")
        assert "permission denied" in result["message"]
        assert "KVM_WEB_ETCD_USERNAME" in result["message"]
        page.headers = {"X_Kvmsupervisor": "1"}
        assert page.ask("POST", "/api/v1/acts", order)[0] == 403
        page.headers = {**origin, "Origin": "https://evil.example"}
        assert page.ask("POST", "/api/v1/acts", order)[0] == 403
        assert secured.get("/kvm/one/power") == ""
        # A role that is taken away is gone for the next request.
        (files.folder / "people.yml").write_text("console: ['cert:ops']\n")
        page.headers = origin
        eventually("another role", lambda: json.loads(page.get("/api/v1/me")[1])["roles"] == ["viewer", "console"])
        assert page.ask("POST", "/api/v1/acts", order)[0] == 403
    # Who may not write facts deletes a machine whose host is gone: its status stays, and that is no failure.
    said = {"id": "one", "host": "gone", "phase": Phase.WAITING, "reason": "x", "since": "2026-01-01T00:00:00Z"}
    secured.put("operator", "/kvm/one/host", "gone")
    secured.put("supervisor", "/kvmsupervisor/instances/one", json.dumps(said))
    with secured.host("operator") as people:
        done = people.cli("delete", "one", "--yes")
    assert (done.returncode, done.stdout) == (0, "one removed\n")
    assert "may not delete" in done.stderr
    assert secured.get("/kvm/one/ram") == ""

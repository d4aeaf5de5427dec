"""Consoles from any page to any host: two supervisors, two pages, certificates on both sides."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.cluster import DEADLINE_S, Host, Hosts, Keys, eventually
from tests.support.etcd import free_port
from tests.support.page import Page
from tests.support.people import Person, people
from tests.support.websocket import Client, Rejected


def in_step(page: Page) -> Page:
    Person(page, "alice").in_step()
    return page


@contextlib.contextmanager
def page_of_beta(keys: Keys, beta: Host, folder: Path, authority: Authority, *, server: str) -> Iterator[Page]:
    """The page of the host where the guest is: it knows pages by certificates."""
    port = beta.settings["KVM_WEB_URL"].rpartition(":")[2]
    folder.mkdir(exist_ok=True)
    certificate, key = authority.folder / f"{server}.pem", authority.folder / f"{server}.key"
    (folder / "web.yml").write_text(
        f"tls_server_config:\n  cert_file: {certificate}\n  key_file: {key}\n"
        f"  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: {authority.certificate}\n"
    )
    (folder / "people.yml").write_text("console: ['cert:alpha']\n")
    files = {"KVM_WEB_CONFIG": str(folder / "web.yml"), "KVM_WEB_PEOPLE": str(folder / "people.yml")}
    with Page(keys, beta, KVM_WEB_LISTEN=f"127.0.0.1:{port}", **files) as page:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(authority.folder / "alpha.pem", authority.folder / "alpha.key")

        def answers() -> bool:
            connection = http.client.HTTPSConnection("127.0.0.1", page.port, timeout=DEADLINE_S, context=context)
            with contextlib.closing(connection):
                connection.request("GET", "/readyz")
                return connection.getresponse().status == http.client.OK

        eventually("a page in step", answers)
        yield page


def peer(authority: Authority, name: str, trusted: Authority | None = None) -> dict[str, str]:
    """What a page shows to others, and whom it trusts."""
    return {
        "KVM_WEB_PEER_CERT": str(authority.folder / f"{name}.pem"),
        "KVM_WEB_PEER_KEY": str(authority.folder / f"{name}.key"),
        "KVM_WEB_PEER_CA": str((trusted or authority).certificate),
    }


def expired(authority: Authority, name: str) -> None:
    """Issue a certificate that ended yesterday."""
    folder = authority.folder
    made = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}")
    request, key = folder / f"{name}.csr", folder / f"{name}.key"
    subprocess.run([*made, "-keyout", key, "-out", request], check=True, capture_output=True, timeout=30)
    (folder / "ext").write_text("subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n")
    subprocess.run(
        [
            *("openssl", "x509", "-req", "-in", request, "-CA", authority.certificate, "-CAkey", folder / "ca.key"),
            *("-extfile", folder / "ext", "-days", "-1", "-out", folder / f"{name}.pem"),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )


def test_a_console_of_another_host(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """Requirement 13: from a page of alpha to a guest of beta, in the person's name; wrong certificates are told."""
    ours, strangers = Authority.make(tmp_path / "ca"), Authority.make(tmp_path / "strangers")
    for name in ("alpha", "beta", "gamma"):
        ours.issue(name)
    ours.issue("elsewhere", names=("DNS:elsewhere.example",))
    strangers.issue("alpha")
    expired(ours, "old")
    port = free_port()
    alpha = hosts("alpha").start()
    beta = hosts("beta", KVM_WEB_URL=f"https://localhost:{port}").start()
    keys.machines("beta", "one", ram=16, extra_flags=tiny, display="std")
    beta.wait_running("one")
    who = people(tmp_path, alice="console")
    at_beta = (keys, beta, tmp_path / "beta", ours)

    def page_of_alpha(**settings: str) -> Page:
        return in_step(Page(keys, alpha, **who, **settings))

    with page_of_beta(*at_beta, server="beta") as other:
        with page_of_alpha(**peer(ours, "alpha")) as page:
            alice = Person(page, "alice")
            with alice.console("display", "one") as display, alice.console("serial", "one") as serial:
                display.until(b"RFB 003.008\n")
                display.send(b"RFB 003.008\n")
                display.until(b"\x01\x01")
                serial.hears(**{"is": "keyboard", "yours": True})
                lock = (beta.run_dir / "one" / "console.lock").read_text()
                assert lock == "alice, by cert:alpha (in a browser)"
                serial.send('{"release": true}')
                serial.hears(**{"is": "keyboard", "holder": ""})
            told = [json.loads(line) for line in other._log.read_text().splitlines()]
            opened = {one["who"] for one in told if one["event"] == "web.console_opened"}
            assert opened == {"alice, by cert:alpha"}

        for settings, words in (
            ({}, "this page has no certificate to show there"),
            (peer(ours, "gamma"), "cert:gamma has not the role console"),
            (peer(strangers, "alpha", ours), "refuses this page's certificate"),
            (peer(ours, "old"), "refuses this page's certificate"),
            (peer(ours, "alpha", strangers), "the certificate of https://localhost"),
            (peer(ours, "alpha") | {"KVM_WEB_PEER_KEY": "/nowhere"}, "cannot be used"),
        ):
            with page_of_alpha(**settings) as page:
                assert words in refusal(Person(page, "alice")), settings

    for server, words in (("elsewhere", "Hostname mismatch"), ("old", "certificate has expired")):
        with page_of_beta(*at_beta, server=server), page_of_alpha(**peer(ours, "alpha")) as page:
            assert words in refusal(Person(page, "alice"))
    with page_of_alpha(**peer(ours, "alpha")) as page:
        assert "cannot be reached" in refusal(Person(page, "alice"))


def refusal(who: Person) -> str:
    """Why there is no console."""
    status, found = who.post("/api/v1/console-tickets", {"console": "display", "instance": "one"})
    if status != 200:
        return str(found["error"])
    with Client.connect(who.page.port, found["path"], who.headers.items()) as client:
        return client.the_end().reason


def test_the_name_of_another_is_taken_from_pages_only(keys: Keys, hosts: Hosts, tiny: str, tmp_path: Path) -> None:
    """Law: a person with a password who says for whom it is needs a ticket like all others."""
    alpha = hosts("alpha").start()
    keys.machines("alpha", "one", ram=16, extra_flags=tiny)
    alpha.wait_running("one")
    with Page(keys, alpha, **people(tmp_path, alice="console")) as page:
        in_step(page)
        alice = Person(page, "alice")
        headers = [*alice.headers.items(), ("X-KVMsupervisor-For", "root")]
        with pytest.raises(Rejected) as refused:
            Client.connect(page.port, "/api/v1/instances/one/serial", headers)
        assert refused.value.status == 403

"""Who may come in, while the files that say so change."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import bcrypt
import pytest
import structlog

from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.web.access import LOOK_S, Access, AccessError, AccessWatch, read_access
from kvmsupervisor.web.people import Role
from kvmsupervisor.web.tls import name_of, sans_of
from tests.fakes.clock import FakeClock
from tests.support.certificates import Authority
from tests.web.conftest import OPERATOR, Site, Viewer, serving

HASH = bcrypt.hashpw(b"wonder", bcrypt.gensalt(4)).decode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.make(tmp_path_factory.mktemp("ca"))
    made.issue("server")
    made.issue("other")
    return made


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Path:
    for name in ("server.pem", "server.key", "other.key", "ca.pem"):
        (tmp_path / name).write_bytes((authority.folder / name).read_bytes())
    (tmp_path / "web.yml").write_text(
        f"tls_server_config: {{cert_file: server.pem, key_file: server.key}}\nbasic_auth_users: {{alice: '{HASH}'}}\n"
    )
    (tmp_path / "ci.token").write_text(OPERATOR)
    (tmp_path / "people.yml").write_text("operator: [alice]\ntokens: {ci: ci.token}\n")
    return tmp_path


def settings(folder: Path, **more: str) -> Settings:
    return load_settings(
        {
            "KVM_CONFIG": "/dev/null",
            "KVM_WEB_CONFIG": str(folder / "web.yml"),
            "KVM_WEB_PEOPLE": str(folder / "people.yml"),
            **more,
        }
    )


def watching(folder: Path) -> tuple[AccessWatch, list[Access]]:
    found: list[Access] = []
    return AccessWatch(settings(folder), read_access(settings(folder)), FakeClock(), found.append), found


def test_all_is_read(folder: Path) -> None:
    """Users, roles, tokens, TLS of 1.2 at least."""
    access = read_access(settings(folder, KVM_WEB_TRUSTED_PROXY="10.0.0.2,fd00::/64"))
    assert access.known.users == {"alice": HASH.encode()}
    assert access.known.roles == {"alice": Role.OPERATOR}
    assert list(access.known.tokens.values()) == ["token:ci"]
    assert [str(one) for one in access.known.proxies] == ["10.0.0.2/32", "fd00::/64"]
    assert access.tls is not None
    assert access.tls.minimum_version == ssl.TLSVersion.TLSv1_2
    assert access.tls.verify_mode == ssl.CERT_NONE
    assert {path.name for path in access.mark} == {"web.yml", "people.yml", "server.pem", "server.key", "ci.token"}


def test_every_problem_of_every_file_stops_the_start(folder: Path) -> None:
    """One message has them all, each with the setting that names its file."""
    (folder / "web.yml").write_text("foo: 1\nbasic_auth_users: {alice: x}\n")
    (folder / "people.yml").write_text("bar: 1\n")
    with pytest.raises(AccessError) as raised:
        read_access(settings(folder))
    assert [one.partition(": ")[0] for one in raised.value.problems] == [
        "KVM_WEB_CONFIG",
        "KVM_WEB_CONFIG",
        "KVM_WEB_PEOPLE",
    ]


def test_what_the_first_act_would_miss_is_told_at_the_start(folder: Path) -> None:
    """Not with the first act, weeks later."""
    more = {"KVM_WEB_ETCD_USERNAME": "operator", "KVM_WEB_ETCD_PASSWORD_FILE": str(folder / "gone")}
    with pytest.raises(AccessError, match=r"KVM_WEB_ETCD_PASSWORD_FILE: it is .*/gone, and there is no such file"):
        read_access(settings(folder, **more))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("server.key", "other.key", "the key is not that of the certificate"),
        ("server.pem", "ci.token", "no PEM"),
        ("server.key", "ci.token", "no PEM, or its key has a passphrase"),
        ("ca.pem", "ci.token", "client_ca_file"),
    ],
)
def test_certificates_of_no_use_are_told(folder: Path, name: str, content: str, said: str) -> None:
    """Which files, and what is wrong with them."""
    text = (folder / "web.yml").read_text()
    client = "server.key, client_ca_file: ca.pem, client_auth_type: RequireAndVerifyClientCert}"
    (folder / "web.yml").write_text(text.replace("server.key}", client))
    (folder / name).write_bytes((folder / content).read_bytes())
    with pytest.raises(AccessError, match=said):
        read_access(settings(folder))


def test_a_key_with_a_passphrase_asks_nobody(folder: Path, authority: Authority) -> None:
    """OpenSSL would wait for a person at the terminal."""
    import subprocess  # noqa: PLC0415

    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:x",
         "-in", authority.folder / "server.key", "-out", folder / "server.key"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    with pytest.raises(AccessError, match="passphrase"):
        read_access(settings(folder))


def test_a_changed_file_is_read_again(folder: Path) -> None:
    """Any of them; once; by its contents also where its time is the same."""
    watch, found = watching(folder)
    watch.look()
    assert found == []
    (folder / "people.yml").write_text("console: [alice]\n")
    watch.look()
    watch.look()
    assert [access.known.roles for access in found] == [{"alice": Role.CONSOLE}]
    old = (folder / "server.pem").stat()
    (folder / "server.pem").rename(folder / "before.pem")
    (folder / "server.pem").write_bytes((folder / "before.pem").read_bytes())
    os.utime(folder / "server.pem", ns=(old.st_atime_ns, old.st_mtime_ns))
    watch.look()
    assert len(found) == 2
    assert found[1].tls is not found[0].tls


def test_a_file_that_turned_bad_changes_nothing(folder: Path) -> None:
    """It is told once, tried again each time, and in force once it is mended, whatever had to be mended."""
    watch, found = watching(folder)
    good = (folder / "web.yml").read_text()
    with structlog.testing.capture_logs() as logs:
        (folder / "web.yml").write_text(good.replace("server.pem", "new.pem"))
        for _ in range(3):
            watch.look()
        assert (found, len(watch.problems)) == ([], 1)
        (folder / "new.pem").write_bytes((folder / "server.pem").read_bytes())
        watch.look()
        assert (len(found), watch.problems) == (1, ())
        (folder / "web.yml").unlink()
        watch.look()
        (folder / "web.yml").write_text("")
        (folder / "people.yml").write_text("")
        watch.look()
    assert [one["event"] for one in logs] == [
        "web.access_kept", "web.access_changed", "web.access_kept", "web.access_changed",
    ]  # fmt: skip
    assert "new.pem" in logs[0]["problems"][0]


def test_a_link_that_leads_back(folder: Path) -> None:
    """As Kubernetes changes mounted files: a bad one, and the former again, which was in force all the time."""
    (folder / "people.yml").rename(folder / "good.yml")
    (folder / "bad.yml").write_text("operator: [zoe]")
    (folder / "people.yml").symlink_to("good.yml")
    watch, found = watching(folder)
    for name, problems in (("bad.yml", 1), ("good.yml", 0)):
        (folder / "people.yml").unlink()
        (folder / "people.yml").symlink_to(name)
        watch.look()
        assert (len(watch.problems), found) == (problems, [])


def test_a_certificate_and_its_key_are_two_writes(folder: Path, authority: Authority) -> None:
    """A renewal that is looked at between them leaves the old pair, and comes in force with the second one."""
    watch, found = watching(folder)
    (folder / "server.pem").write_bytes((authority.folder / "other.pem").read_bytes())
    watch.look()
    assert found == []
    assert "the key is not that of the certificate" in watch.problems[0]
    (folder / "server.key").write_bytes((authority.folder / "other.key").read_bytes())
    watch.look()
    assert (len(found), watch.problems) == (1, ())


async def test_who_loses_a_role_is_asked_again(folder: Path) -> None:
    """Attack: keep what was opened before. A stream ends; the next request has the new role, or none."""
    wanted = settings(folder)
    async with serving(read_access(wanted), wanted) as site:
        viewer = Viewer(site.get("/api/v1/stream", authorization=f"Bearer {OPERATOR}"))
        viewer.read()
        assert not viewer.subscription.over
        (folder / "people.yml").write_text("operator: [alice]\n")
        await site.clock.advance(LOOK_S)
        assert viewer.subscription.over
        assert viewer.read() == []
        assert site.get("/api/v1/me", authorization=f"Bearer {OPERATOR}").status == 401
        (folder / "people.yml").write_text("operator: [")
        await site.clock.advance(LOOK_S)
        (folder / "ci.token").write_text(OPERATOR)
        (folder / "people.yml").write_text("tokens: {ci: ci.token}\n")
        await site.clock.advance(LOOK_S)
        reply = site.get("/metrics", authorization=f"Bearer {OPERATOR}")
        assert b"kvmsupervisor_web_access_in_force 1\n" in reply.body


async def test_everything_but_healthz_asks(asking: Site) -> None:
    """Requirement 14; also what is not there, so that nobody learns what is."""
    for path in asking.service.routes._table:
        assert asking.get(path).status == (200 if path == "/healthz" else 401), path
    for path in ("/instances/1", "/api/v1/instances/1", "/static/list.js", "/api/v1/openapi.json", "/nothing"):
        assert asking.get(path).status == 401, path
    for method in ("POST", "PUT", "OPTIONS"):
        assert asking.get("/healthz", method=method).status == 401
    assert asking.get("/healthz", host="evil.example").status == 421


async def test_what_another_site_loads_is_not_answered(asking: Site) -> None:
    """Attack: a page elsewhere has a person's browser read all of it, or keep all streams. A link may be followed."""
    as_loaded = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors", "authorization": f"Bearer {OPERATOR}"}
    for path in ("/", "/api/v1/instances", "/api/v1/stream", "/static/list.js"):
        assert asking.get(path, **as_loaded).status == 403
        assert asking.get(path, **{**as_loaded, "sec_fetch_site": "same-origin"}).status == 200
    assert asking.get("/", **{**as_loaded, "sec_fetch_mode": "navigate"}).status == 200


async def test_a_page_says_who_one_is(asking: Site) -> None:
    """And what they may; there is no way to `create` for who may not."""
    for who, most, may in (("o", "operator", "viewer console operator"), ("v", "viewer", "viewer")):
        page = asking.get("/", authorization=f"Bearer {who * 40}").body.decode()
        assert f"<bdi>token:{who}</bdi> · {most}" in page
        assert f'data-may="{may}"' in page
        assert ("/create" in page) == (who == "o")
    # The list is remembered for many who look: not for another person.
    assert "token:o" not in asking.get("/", authorization=f"Bearer {'v' * 40}").body.decode()


def test_names_in_certificates() -> None:
    """The common name, otherwise the first other one of a kind that names somebody."""
    sans = (("othername", "x"), ("DNS", "a.example"), ("URI", "spiffe://b"), ("email", "c@d"))
    assert name_of({"subject": ((("organizationName", "o"),), (("commonName", "n"),)), "subjectAltName": sans}) == "n"
    assert name_of({"subject": (), "subjectAltName": sans}) == "a.example"
    assert name_of({}) == ""
    assert list(sans_of({"subjectAltName": sans})) == ["a.example", "spiffe://b", "c@d"]

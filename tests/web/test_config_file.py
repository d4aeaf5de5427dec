"""`KVM_WEB_CONFIG` and `KVM_WEB_PEOPLE`: what a plain exporter's file means here, and every problem named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmsupervisor.web.config_file import ClientAuth, read_web_config
from kvmsupervisor.web.people import Role
from kvmsupervisor.web.people_file import read_people

HASH = "$2y$10$" + "a" * 53


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("server.pem", "server.key", "ca.pem"):
        (tmp_path / name).write_text("x")
    (tmp_path / "ci.token").write_text("0123456789abcdef" * 4 + "\n")
    return tmp_path


def read(folder: Path, text: str) -> tuple[object, list[str]]:
    (folder / "web.yml").write_text(text)
    found, problems = read_web_config(folder / "web.yml")
    return found, [one.removeprefix(str(folder)) for one in problems]


def test_a_plain_file_of_exporters(folder: Path) -> None:
    """Files are found beside it; what has no meaning here is named, and no more."""
    (folder / "web.yml").write_text(
        f"""
        tls_server_config:
          cert_file: server.pem
          key_file: {folder}/server.key
          client_auth_type: RequireAndVerifyClientCert
          client_ca_file: ca.pem
          client_allowed_sans: [prometheus.example]
          min_version: TLS13
          prefer_server_cipher_suites: true
        http_server_config:
          http2: true
          headers:
            Strict-Transport-Security: max-age=31536000
            X-Frame-Options: deny
        basic_auth_users:
          alice: {HASH}
          no: '{HASH}'
        """
    )
    found, problems = read_web_config(folder / "web.yml")
    assert problems == []
    assert found.tls is not None
    assert (found.tls.cert_file, found.tls.key_file) == (folder / "server.pem", folder / "server.key")
    assert (found.tls.client_auth, found.tls.client_ca_file) == (ClientAuth.REQUIRED, folder / "ca.pem")
    assert (found.tls.client_sans, found.tls.min_version) == (frozenset({"prometheus.example"}), "TLS13")
    assert found.users == {"alice": HASH.encode(), "no": HASH.encode()}
    assert found.transport_security == "max-age=31536000"
    assert found.without_effect == (
        "tls_server_config.prefer_server_cipher_suites",
        "http_server_config.http2",
        "http_server_config.headers.X-Frame-Options",
    )


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "{}", "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key"]
)
def test_a_file_may_be_short(folder: Path, text: str) -> None:
    """An empty one says nothing; exporters take it, too."""
    assert read(folder, text)[1] == []


PROBLEMS = {
    "basic_auth_user: {a: x}": "/web.yml:1: the file has no 'basic_auth_user'; did you mean basic_auth_users?",
    "zzz: 1": "/web.yml:1: the file has no 'zzz'; there are basic_auth_users, http_server_config, tls_server_config",
    "rate_limit: {burst: 1}": "/web.yml:1: rate_limit is not taken here: this page limits wrong passwords only, always",
    "- a": "/web.yml:1: the file is a mapping, `name: value` on lines of their own",
    "a: b: c": "/web.yml:1: this is no YAML: mapping values are not allowed here",
    f"basic_auth_users:\n  a: {HASH}\n  a: {HASH}": "/web.yml:3: basic_auth_users: 'a' stands there twice",
    "basic_auth_users: {a: secret}": (
        "/web.yml:1: basic_auth_users: a has no bcrypt hash, such as `htpasswd -nBC 10 a` makes"
    ),
    "basic_auth_users: {a: $2y$31$" + "a" * 53 + "}": (
        "/web.yml:1: basic_auth_users: the hash of a has the cost 31; right would be 10 to 15"
    ),
    f"basic_auth_users: {{'a:b': {HASH}}}": (
        "/web.yml:1: basic_auth_users: 'a:b' is no name: it has no colon, as HTTP has it"
    ),
    "basic_auth_users:\n  a:": "/web.yml:2: the hash of 'a' has no value; leave the line out to do without it",
    "tls_server_config: {cert_fil: server.pem, key_file: server.key}": (
        "/web.yml:1: tls_server_config has no 'cert_fil'; did you mean cert_file?"
    ),
    "tls_server_config: {key_file: server.key}": "/web.yml: tls_server_config has no cert_file",
    "tls_server_config:": "/web.yml: tls_server_config has no key_file",
    "tls_server_config: {cert_file: gone.pem, key_file: server.key}": (
        "tls_server_config.cert_file is 'gone.pem', which cannot be read: No such file or directory"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, min_version: TLS10}": (
        "tls_server_config.min_version is 'TLS10', which is not taken here: it is not safe any more; right would be "
        "TLS12, TLS13"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, min_version: TLS13, max_version: TLS12}": (
        "min_version is TLS13, and max_version TLS12, which is older"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, client_auth_type: RequireAnyClientCert}": (
        "which is not taken here: such a certificate would say nothing of who the client is"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, client_auth_type: VerifyClientCertIfGiven}": (
        "client_auth_type is VerifyClientCertIfGiven, and there is no client_ca_file to verify with"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, client_ca_file: ca.pem}": (
        "has a client_ca_file, and no client_auth_type; right would be RequireAndVerifyClientCert"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, client_allowed_sans: [a]}": (
        "client_allowed_sans needs a client_auth_type that verifies certificates"
    ),
    "tls_server_config: {cert_file: server.pem, key_file: server.key, cipher_suites: [a]}": (
        "cipher_suites is not taken here: OpenSSL's own choice"
    ),
    "tls_server_config: {cert_file: [a], key_file: server.key}": (
        "tls_server_config.cert_file is one value, no list and no mapping"
    ),
    'http_server_config: {headers: {Strict-Transport-Security: "a\\r\\nb"}}': (
        "headers.Strict-Transport-Security is 'a\\r\\nb', which no header can hold"
    ),
    "http_server_config: {headers: {Set-Cookie: a}}": "http_server_config.headers has no 'Set-Cookie'; there are",
    "http_server_config: {http2: maybe}": "http_server_config.http2 is 'maybe'; right would be true, false",
}


@pytest.mark.parametrize(("text", "said"), PROBLEMS.items(), ids=range(len(PROBLEMS)))
def test_a_problem_is_named(folder: Path, text: str, said: str) -> None:
    """Where, what was found, and what would be right."""
    _, problems = read(folder, text)
    assert any(said in problem for problem in problems), problems


def test_all_problems_are_named_at_once_and_no_hash_is(folder: Path) -> None:
    """Whoever mends the file reads one message; a hash stays out of it."""
    _, problems = read(folder, f"basic_auth_users: {{a: {HASH}x, b: y}}\nfoo: 1\nhttp_server_config: {{foo: 1}}\n")
    assert len(problems) == 4
    assert HASH not in "".join(problems)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A missing file, a folder, bytes, too many of them."""
    assert read_web_config(tmp_path / "no")[1] == [f"{tmp_path}/no: it cannot be read: No such file or directory"]
    assert read_web_config(tmp_path)[1] == [f"{tmp_path}: it cannot be read: Is a directory"]
    (tmp_path / "a").write_bytes(b"\xff")
    assert "it is no text" in read_web_config(tmp_path / "a")[1][0]
    (tmp_path / "a").write_text("#" * (1 << 20) + "##")
    assert "more than 1 MiB" in read_web_config(tmp_path / "a")[1][0]
    (tmp_path / "a").write_text("[" * 1200)
    assert len(read_web_config(tmp_path / "a")[1]) == 1


def people(folder: Path, text: str, users: tuple[str, ...] | None = ("alice", "bob")) -> tuple[object, list[str]]:
    (folder / "people.yml").write_text(text)
    found, problems = read_people(folder / "people.yml", users, lambda _: None)
    return found, problems


def test_roles_and_tokens(folder: Path) -> None:
    """Names as the audit has them; a token's file beside it."""
    (folder / "people.yml").write_text(
        "operator: [alice, 'cert:ops', token:ci]\n"
        "console:\n  - bob\n  - proxy:carol@example.org\n"
        "tokens: {ci: ci.token}\n"
    )
    seen: list[Path] = []
    found, problems = read_people(folder / "people.yml", ("alice", "bob"), seen.append)
    assert problems == []
    assert seen == [folder / "people.yml", folder / "ci.token"]
    assert found.roles == {
        "alice": Role.OPERATOR,
        "cert:ops": Role.OPERATOR,
        "token:ci": Role.OPERATOR,
        "bob": Role.CONSOLE,
        "proxy:carol@example.org": Role.CONSOLE,
    }
    assert list(found.tokens.values()) == ["token:ci"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("operators: [alice]", "the file has no 'operators'; did you mean operator?"),
        ("operator: [alcie]", "'alcie' is nobody: did you mean alice?"),
        ("operator: [zoe]", "'zoe' is nobody: KVM_WEB_CONFIG has no such user (basic_auth_users)"),
        ("operator: ['token:cd']", "'token:cd' is nobody: tokens has no such name"),
        ("operator: ['cert:']", "'cert:' is nobody"),
        ("operator: alice", "operator is a list, such as [one, other]"),
        ("operator: [alice]\nconsole: [alice]", "'alice' is console already; the greatest role is enough"),
        ("tokens: {ci: gone}", "gone cannot be read: No such file or directory"),
        ("tokens: {ci: people.yml}", "has no token of 32 to 4096 characters in one word"),
        ("tokens: {a: ci.token, b: ci.token}", "has the token of token:"),
    ],
)
def test_a_problem_of_people_is_named(folder: Path, text: str, said: str) -> None:
    """A role for nobody is a typo: somebody misses it."""
    problems = people(folder, text)[1]
    assert len(problems) == 1
    assert said in problems[0]


def test_names_are_not_doubted_where_the_other_file_is_bad(folder: Path) -> None:
    """One mistake is told once."""
    assert people(folder, "operator: [zoe]", users=None)[1] == []

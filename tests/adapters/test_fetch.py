"""Fetching user data, from real servers that do as they should, and from all others."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
from pathlib import Path

import pytest

from kvmsupervisor.adapters.fetch import FetchFailed, download, fetch
from kvmsupervisor.domain.addresses import is_inward
from tests.support.certificates import Authority
from tests.support.web import Answer, Site, drip, ok, raw, redirect, reset, site

DATA = b"#cloud-config\nhostname: a\n"
SHORT_S = 0.3
"""A time limit that is meant to be reached."""


async def failure(url: str, *, timeout_s: float = 20, root: Path | None = None, ca_file: Path | None = None) -> str:
    """The message with which a fetch fails."""
    with pytest.raises(FetchFailed) as caught:
        await fetch(url, file_root=root, timeout_s=timeout_s, ca_file=ca_file, limit_bytes=1 << 20, max_redirects=3)
    return str(caught.value)


# --- what works -----------------------------------------------------------------------------------------------


async def test_a_file_comes_as_it_is() -> None:
    """Law: the very bytes, asked for in plain HTTP/1.1, with the query and without the fragment."""
    async with site(a=ok(DATA)) as server:
        assert await fetch(server.url("/a?x=1#part"), file_root=None) == DATA
        assert await fetch(server.url("/a", host="localhost"), file_root=None) == DATA
    first = server.requests[0]
    assert first.startswith(f"GET /a?x=1 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n")
    assert "Accept-Encoding: identity\r\n" in first
    assert "Authorization" not in first


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"HTTP/1.0 200 OK\r\n\r\n" + DATA),
        raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n" + DATA),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1a\r\n" + DATA + b"\r\n0\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n" + DATA),
    ],
    ids=["1.0", "continue", "chunked", "longer than it says"],
)
async def test_every_way_to_send_a_body(answer: Answer) -> None:
    """Law: a body ends where HTTP says, whatever the server does behind it."""
    async with site(a=answer) as server:
        assert await fetch(server.url("/a"), file_root=None) == DATA


async def test_exactly_the_limit_is_taken() -> None:
    """Law: 1 MiB is taken."""
    data = b"#!" + bytes((1 << 20) - 2)
    async with site(a=ok(data)) as server:
        assert await fetch(server.url("/a"), file_root=None) == data


def authorizations(server: Site) -> list[str | None]:
    found: list[str | None] = []
    for head in server.requests:
        lines = [line for line in head.split("\r\n") if line.startswith("Authorization: Basic ")]
        found.append(base64.b64decode(lines[0].split()[2]).decode() if lines else None)
    return found


async def test_user_and_password_are_sent_to_their_own_host_only() -> None:
    """Law: basic authentication for the URL's origin, on redirects too; a stranger never sees it."""
    async with site(b=ok(DATA)) as stranger, site(b=ok(DATA)) as server:
        user = "us%40er:p%3Aw%2F"
        server.answers |= {"/a": redirect("/b"), "/c": redirect(server.url("/b")), "/d": redirect(stranger.url("/b"))}
        for path in ("/a", "/c", "/d"):
            assert await fetch(server.url(path, user=f"{user}@"), file_root=None) == DATA
        assert authorizations(server) == ["us@er:p:w/"] * 5
        assert authorizations(stranger) == [None]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status: int) -> None:
    """Law: each kind of redirect, as many as allowed."""
    async with site(a=redirect("b", status), b=redirect("/c", status), c=redirect("d"), d=ok(DATA)) as server:
        assert await fetch(server.url("/a"), file_root=None, max_redirects=3) == DATA


# --- servers that do not do as they should ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raw(b"HTTP/1.1 404 Not Found\r\n\r\n"), "status 404 'Not Found'; see whether the URL is right"),
        (raw(b"HTTP/1.1 500 \x1b[31mOh\r\n\r\n"), r"status 500 '\x1b[31mOh'; see whether the URL is right"),
        (raw(b"HTTP/1.1 500 Oh\xff\r\n\r\n"), "status 500 'Ohÿ'; see whether the URL is right"),
        (raw(b"HTTP/1.1 401 No\r\n\r\n"), "status 401 'No'; see whether the URL's user and password are right"),
        (raw(b"HTTP/1.1 204 Empty\r\n\r\n"), "status 204 'Empty'; see"),
        (raw(b""), "the connection was closed without an answer; see whether its server is well"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-"), "an answer that breaks off or is no HTTP"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + DATA), "an answer that breaks off or is no HTTP"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + DATA), "an answer that breaks off or is no HTTP"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5_000 + b"\r\n\r\n"), "an answer that breaks off"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 20 + b"\r\n\r\n"), "more than 1048576 bytes"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1a\r\nhello"), "an answer that breaks off"),
        (raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "an answer that breaks off or is no HTTP"),
        (raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000), "an answer that breaks off or is no HTTP"),
        (reset(b""), "the connection broke (Connection reset by peer); see whether its server is well"),
        (ok(bytes(2 << 20)), "more than 1048576 bytes; user data is shorter"),
        (raw(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(2 << 20)), "more than 1048576 bytes; user data is shorter"),
        (drip(b"HTTP/1.0 200 OK\r\n\r\n", bytes(1 << 20)), "more than 1048576 bytes; user data is shorter"),
        (redirect("file:///etc/passwd"), "a redirect from http to file; give the URL of the file itself"),
        (redirect("ftp://127.0.0.1/"), "a redirect to what is no http or https URL; give the URL"),
        (redirect("http://[::1"), "a redirect to what is no http or https URL; give the URL"),
        (raw(b"HTTP/1.1 302 Found\r\n\r\n"), "status 302, a redirect that does not say where to"),
        (redirect("/a"), "more than 3 redirects; give the URL that they lead to, if they end"),
        (redirect("/b?token=secret"), "redirected to http://…@127.0.0.1:"),
    ],
)
async def test_what_goes_wrong_is_named(answer: Answer, message: str) -> None:
    """Law: every failure of a server is a `FetchFailed` that says what was found and what to do, and no secret."""
    async with site(a=answer) as server:
        said = await failure(server.url("/a", user="user:secret@"))
    assert said.startswith(message)
    assert "secret" not in said
    assert said.isprintable()


async def test_a_closed_port_and_an_unknown_name_are_named() -> None:
    """Law: without a server the message says which host and port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        said = await failure(f"http://user:secret@127.0.0.1:{port}/a")
    assert said.startswith(f"cannot connect to 127.0.0.1 port {port} (")
    assert said.endswith("; see whether host and port are right and its server runs")
    assert (await failure(f"http://{'x' * 64}.invalid/")).startswith(f"cannot connect to {'x' * 64}.invalid port 80 (")
    assert (await failure("http://host:secret/")).startswith("found no URL of user data; it is a URL: http://HOST/PATH")


@pytest.mark.parametrize(
    "answer",
    [drip(), drip(b"HTTP/1.1 200 OK\r\nX: "), drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")],
    ids=["status", "header", "body"],
)
async def test_the_time_limit_holds_for_the_whole_transfer(answer: Answer) -> None:
    """Law: a server that sends a byte now and then does not keep a start waiting; its connection is closed."""
    async with site(a=answer) as server:
        said = await failure(server.url("/a"), timeout_s=SHORT_S)
        await server.until(lambda: not server.open)
    assert said == "not complete within 0.3 s; see whether its server is well"


async def test_the_time_limit_holds_before_there_is_an_answer(tmp_path: Path) -> None:
    """Law: neither a server that accepts and is silent, nor one that never shakes hands, is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for url in (f"http://127.0.0.1:{port}/", f"https://127.0.0.1:{port}/"):
            assert (await failure(url, timeout_s=SHORT_S)).startswith("not complete within 0.3 s")


@pytest.mark.parametrize("secure", [False, True])
async def test_cancelling_closes_the_connection(secure: bool, authority: Authority) -> None:
    """Law: a fetch that is cancelled ends at once and leaves no connection."""
    answer = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
    async with site(authority.issue("server") if secure else None, a=answer) as server:
        task = asyncio.ensure_future(fetch(server.url("/a"), file_root=None, ca_file=authority.certificate))
        await server.until(lambda: bool(server.requests))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.until(lambda: not server.open)


# --- https ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


async def test_https_trusts_the_named_authority(authority: Authority) -> None:
    """Law: with its authority in `ca_file` a server is trusted."""
    async with site(authority.issue("server"), a=ok(DATA)) as server:
        assert await fetch(server.url("/a"), file_root=None, ca_file=authority.certificate) == DATA


class SlowSink:
    """Where an image goes that is written to a slow disk: each part takes until the server has gone."""

    def __init__(self, server: Site) -> None:
        self._server = server
        self.data = b""

    async def begin(self, at: int, whole: int | None) -> None:
        assert (at, whole) == (0, len(DATA))

    async def take(self, data: bytes) -> None:
        await self._server.until(lambda: not self._server.open)
        # The end of the connection was read, and told to whoever reads from it.
        await asyncio.sleep(0.05)
        self.data += data


@pytest.mark.parametrize("secure", [False, True])
async def test_a_server_may_close_the_connection_while_its_answer_is_written(
    authority: Authority, *, secure: bool
) -> None:
    """Law: who was asked to close the connection may do so before all of the answer has been taken."""
    async with site(authority.issue("server") if secure else None, a=ok(DATA)) as server:
        sink = SlowSink(server)
        url = server.url("/a")
        await download(url, sink, have=0, limit_bytes=1 << 20, file_root=None, ca_file=authority.certificate)
        assert sink.data == DATA


async def test_https_trusts_the_systems_store(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the system's store counts, also beside a `ca_file`."""
    # OpenSSL's own variable says where the system's store is.
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    other = Authority.make(authority.folder / "other")
    async with site(authority.issue("server"), a=ok(DATA)) as server:
        assert await fetch(server.url("/a"), file_root=None) == DATA
        assert await fetch(server.url("/a"), file_root=None, ca_file=other.certificate) == DATA


async def test_a_stranger_or_another_name_is_not_trusted(authority: Authority) -> None:
    """Law: certificates are verified, names too; the message says how to trust one."""
    async with site(authority.issue("server"), a=ok(DATA)) as server:
        said = await failure(server.url("/a"))
        assert said.startswith("the server's certificate is not trusted (")
        assert "KVM_MEDIA_CACERT" in said
        assert server.requests == []
    async with site(authority.issue("elsewhere", ["DNS:elsewhere"]), a=ok(DATA)) as server:
        said = await failure(server.url("/a"), ca_file=authority.certificate)
        assert said.startswith("the server's certificate is not trusted (IP address mismatch")


async def test_https_never_leads_to_http(authority: Authority) -> None:
    """Law: what begins in TLS stays there; the other way is fine."""
    async with site(b=ok(DATA)) as plain, site(authority.issue("server"), b=ok(DATA)) as secure:
        secure.answers["/a"] = redirect(plain.url("/b"))
        said = await failure(secure.url("/a"), ca_file=authority.certificate)
        assert said == "a redirect from https to http; give the URL of the file itself"
        assert plain.requests == []
        plain.answers["/a"] = redirect(secure.url("/b"))
        assert await fetch(plain.url("/a"), file_root=None, ca_file=authority.certificate) == DATA


async def test_https_to_a_server_without_tls_is_named() -> None:
    """Law: a plain server behind an https URL is a failure with a message."""

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        said = await failure(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/a")
    assert said.startswith("cannot connect to 127.0.0.1 port ")


async def test_authorities_are_read_again_when_they_changed(authority: Authority, tmp_path: Path) -> None:
    """Law: a new `ca_file` counts without a restart; an unreadable one is named."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("none\n")
    async with site(authority.issue("server"), a=ok(DATA)) as server:
        assert (await failure(server.url("/a"), ca_file=ca_file)).startswith(f"the authorities in {ca_file} cannot be")
        ca_file.write_bytes(authority.certificate.read_bytes())
        os.utime(ca_file, ns=(1, 1))
        assert await fetch(server.url("/a"), file_root=None, ca_file=ca_file) == DATA
        ca_file.unlink()
        assert (await failure(server.url("/a"), ca_file=ca_file)).startswith(f"the authorities in {ca_file} cannot be")


def test_nothing_verifies_less_than_the_default() -> None:
    """Law: the context that these tests rely on is one that checks names and certificates."""
    context = ssl.create_default_context()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


# --- file -------------------------------------------------------------------------------------------------------


async def test_files_below_the_allowed_folder_are_read(tmp_path: Path) -> None:
    """Law: a regular file below the root, links within it included, and with %XX in its name."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a b").write_bytes(DATA)
    (root / "link").symlink_to("sub/a b")
    (tmp_path / "alias").symlink_to(root)
    for url in (f"file://{root}/sub/a%20b", f"file://localhost{root}/link", f"file://{root}/sub/../link"):
        assert await fetch(url, file_root=root) == DATA
        assert await fetch(url, file_root=tmp_path / "alias") == DATA


async def test_nothing_else_is_read(tmp_path: Path) -> None:
    """Law: no way out by dots or links, no pipe, device or folder, nothing without a root; nothing is waited for."""
    root = tmp_path / "root"
    root.mkdir()
    outside = tmp_path / "root-2"
    outside.write_bytes(DATA)
    (root / "link").symlink_to(outside)
    os.mkfifo(root / "pipe")
    (root / "long").write_bytes(bytes((1 << 20) + 1))
    cases = {
        "link": "a file outside of",
        "../root-2": "a file outside of",
        "%2e%2e/root-2": "a file outside of",
        "pipe": "what is no regular file; name a regular file",
        "": "what is no regular file; name a regular file",
        "long": "more than 1048576 bytes",
        "absent": "the file cannot be opened (No such file or directory)",
        "a%00b": "the file cannot be opened (embedded null byte)",
    }
    for path, message in cases.items():
        assert (await failure(f"file://{root}/{path}", root=root)).startswith(message), path
    assert (await failure(f"file://{outside}", root=root)).startswith("a file outside of")
    assert (await failure("file:///dev/zero", root=Path("/"))).startswith("what is no regular file")
    said = await failure(f"file://{outside}")
    assert said == "file: is not allowed on this host; set KVM_MEDIA_ROOT to the folder that it may read"


# --- redirects to this host -----------------------------------------------------------------------------------

OUTSIDE = "127.0.0.2"
"""An address of loopback that these tests take for one somewhere else."""


def inward(address: str) -> bool:
    return address != OUTSIDE and is_inward(address)


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", True),
        ("169.254.169.254", True), ("fe80::1%eth0", True), ("::ffff:169.254.169.254", True), ("::", True),
        ("224.0.0.1", True), ("ff02::1", True),
        ("::127.0.0.1", True), ("64:ff9b::7f00:1", True), ("64:ff9b:1::a9fe:a9fe", True), ("2002:7f00:1::", True),
        ("2001:0:a00:1::8000:fefe", True), ("fd00:ec2::254", True), ("100.100.100.200", True), ("168.63.129.16", True),
        ("64:ff9b::5db8:d822", False), ("2002:5db8:d822::", False),
        ("10.0.0.1", False), ("192.168.1.1", False), ("203.0.113.7", False), ("fd00::1", False), ("2001:db8::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_this_hosts_own(address: str, inside: bool) -> None:
    """Law: loopback, link-local, unspecified, multicast and clouds' metadata, in every spelling; no private network."""
    assert is_inward(address) is inside


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1"])
async def test_no_stranger_leads_to_this_host(name: str) -> None:
    """Law: a redirect to a service that only this host reaches is not followed, however its address is written."""
    async with site(secret=ok(DATA)) as service, site(address=OUTSIDE) as server:
        server.answers["/a"] = redirect(f"http://{name}:{service.port}/secret")
        url = server.url("/a", host=OUTSIDE)
        with pytest.raises(FetchFailed, match="redirect"):
            await fetch(url, file_root=None, timeout_s=20, is_inward=inward)
        assert service.requests == []
        # With a person's word it is.
        if name == "127.0.0.1":
            assert await fetch(url, file_root=None, timeout_s=20, is_inward=inward, follow_inward=True) == DATA


async def test_a_url_of_this_host_may_lead_anywhere() -> None:
    """Law: who writes a loopback URL means this host, with all its services; elsewhere redirects go on as ever."""
    async with site(b=ok(DATA)) as other, site(a=redirect("/b"), b=ok(DATA), address=OUTSIDE) as server:
        async with site(a=redirect(other.url("/b"))) as here:
            assert await fetch(here.url("/a"), file_root=None, timeout_s=20, is_inward=inward) == DATA
        url = server.url("/a", host=OUTSIDE)
        assert await fetch(url, file_root=None, timeout_s=20, is_inward=inward) == DATA

"""Who may do what: users and tokens, certificates, and how a refusal is told."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvmsupervisor.adapters.etcd import Denied, Etcd, EtcdConfig, Unavailable
from kvmsupervisor.adapters.etcd.api import Unreachable
from tests.adapters.etcd.traffic import SOON_S, follow
from tests.support.certificates import Authority
from tests.support.etcd import EtcdServer, Tls, free_port

ROOT = "root:rootpw"
SECRET = "secret"  # noqa: S105 - of a server that lives for one test


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    folder = Path(tempfile.mkdtemp(prefix="kvs"))
    yield Authority.make(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    cert, key = authority.issue("server")
    client_cert, client_key = authority.issue("client")
    return Tls(ca=authority.certificate, cert=cert, key=key, client_cert=client_cert, client_key=client_key)


@asynccontextmanager
async def connected(config: EtcdConfig) -> AsyncIterator[Etcd]:
    etcd = Etcd(config)
    try:
        yield etcd
    finally:
        await etcd.close()


class TestUsers:
    """Authentication by user and password; the server's tokens live for one second."""

    @pytest.fixture(params=["http", "https"])
    def server(self, request: pytest.FixtureRequest, tls: Tls) -> Iterator[EtcdServer]:
        made = EtcdServer(args=("--auth-token-ttl", "1"), tls=tls if request.param == "https" else None)
        with made as server:
            server.ctl("role", "add", "kvm")
            server.ctl("role", "grant-permission", "kvm", "--prefix=true", "readwrite", "/kvm/")
            server.ctl("user", "add", f"worker:{SECRET}")
            server.ctl("user", "grant-role", "worker", "kvm")
            server.enable_auth(ROOT)
            yield server

    def config(self, server: EtcdServer, folder: Path, content: str = f"{SECRET}\n") -> EtcdConfig:
        file = folder / "password"
        file.write_text(content)
        tls = server.tls
        return EtcdConfig(
            endpoints=server.endpoints,
            cacert=tls.ca if tls else None,
            cert=tls.client_cert if tls else None,
            key=tls.client_key if tls else None,
            username="worker",
            password_file=file,
        )

    async def test_an_expired_token_is_renewed(self, server: EtcdServer, tmp_path: Path) -> None:
        """Calls and new watches go on after the token's time, and after a restart that forgot it."""
        async with connected(self.config(server, tmp_path)) as etcd:
            first = await etcd.put("/kvm/1", b"1")
            token = etcd._caller.auth._metadata
            # Simple tokens are deleted by a timer of the server; there is nothing to wait for but time.
            await asyncio.sleep(3)
            last = await etcd.put("/kvm/1", b"2")
            assert etcd._caller.auth._metadata != token

            await asyncio.sleep(3)
            seen = await follow(etcd, "/kvm/", first, last)
            assert [value for _, value, *_ in seen] == [b"1", b"2"]

            await asyncio.to_thread(server.member.restart)
            await asyncio.to_thread(server.member.wait_ready)
            last = await etcd.put("/kvm/1", b"3")
            assert len(await follow(etcd, "/kvm/", first, last)) == 3

    async def test_a_change_of_users_makes_no_difference(self, server: EtcdServer, tmp_path: Path) -> None:
        """A change of roles outdates tokens (`revision of auth store is old`): they are renewed, too."""
        async with connected(self.config(server, tmp_path)) as etcd:
            await etcd.put("/kvm/1", b"1")
            await asyncio.to_thread(server.ctl, "user", "add", "another:one", user=ROOT)
            await etcd.put("/kvm/1", b"2")
            await asyncio.to_thread(server.ctl, "auth", "disable", user=ROOT)
            await etcd.put("/other", b"1")

    async def test_a_lack_of_rights_is_denied(self, server: EtcdServer, tmp_path: Path) -> None:
        """Reading, writing and watching elsewhere raise `Denied`, which is an answer: etcd is up."""
        async with connected(self.config(server, tmp_path)) as etcd:
            with pytest.raises(Denied, match="get /other: etcdserver: permission denied"):
                await etcd.get("/other")
            with pytest.raises(Denied):
                await etcd.put("/other", b"1")
            assert etcd.up
            async with etcd.watch("/other/", 1) as watch, asyncio.timeout(SOON_S):
                with pytest.raises(Denied):
                    await anext(aiter(watch))
                assert not watch.connected

    async def test_a_wrong_password_is_denied_until_the_file_is_right(self, server: EtcdServer, tmp_path: Path) -> None:
        """The password is read again for each log-in, so mending the file is enough."""
        async with connected(self.config(server, tmp_path, "wrong")) as etcd:
            with pytest.raises(Denied, match="invalid user ID or password"):
                await etcd.get("/kvm/1")
            (tmp_path / "password").write_text(SECRET)
            assert await etcd.get("/kvm/1") is None
            (tmp_path / "password").unlink()
        async with connected(self.config(server, tmp_path)) as etcd:
            (tmp_path / "password").unlink()
            with pytest.raises(Denied, match="password file"):
                await etcd.get("/kvm/1")

    async def test_without_a_user_it_is_denied(self, server: EtcdServer) -> None:
        """A client without a user is told that one is wanted; with TLS its certificate's name is no user."""
        tls = server.tls
        config = EtcdConfig(
            endpoints=server.endpoints,
            cacert=tls.ca if tls else None,
            cert=tls.client_cert if tls else None,
            key=tls.client_key if tls else None,
        )
        async with connected(config) as etcd:
            with pytest.raises(Denied):
                await etcd.get("/kvm/1")
            async with etcd.watch("/kvm/", 1) as watch, asyncio.timeout(SOON_S):
                with pytest.raises(Denied):
                    await anext(aiter(watch))


class TestCertificates:
    """TLS: each endpoint is checked against its own name, and shows this client's certificate."""

    async def test_each_endpoint_has_its_own_name(self, authority: Authority, tls: Tls) -> None:
        """Two members with certificates for different names are both right under their own."""
        one_cert, one_key = authority.issue("one", ("IP:127.0.0.1",))
        two_cert, two_key = authority.issue("two", ("DNS:localhost",))
        one = self.with_server_certificate(tls, one_cert, one_key)
        two = self.with_server_certificate(tls, two_cert, two_key)
        with EtcdServer(tls=one) as first, EtcdServer(tls=two) as second:
            named = f"https://localhost:{second.member.client_port}"
            for endpoint in (first.endpoint, named):
                async with connected(self.config(tls, endpoint)) as etcd:
                    await etcd.put("/a", b"1")
            async with connected(self.config(tls, second.endpoint)) as etcd:
                with pytest.raises(Denied, match="for another name"):
                    await etcd.get("/a")
            # One wrong endpoint among right ones is no reason to give up.
            async with connected(self.config(tls, second.endpoint, first.endpoint)) as etcd:
                assert await etcd.get("/a") is not None

    async def test_bad_certificates_are_told_apart(self, tls: Tls, tmp_path: Path) -> None:
        """A foreign CA, a missing or foreign client certificate and bad files are `Denied`, with the cause."""
        foreign = await asyncio.to_thread(Authority.make, tmp_path / "foreign")
        foreign_cert, foreign_key = await asyncio.to_thread(foreign.issue, "client")
        garbage = tmp_path / "garbage.pem"
        garbage.write_text("garbage")
        with EtcdServer(tls=tls) as server:
            endpoints = server.endpoints
            cases = {
                "not issued by the CA": EtcdConfig(
                    endpoints=endpoints, cacert=foreign.certificate, cert=tls.client_cert, key=tls.client_key
                ),
                "refuses the client certificate, or wants one": EtcdConfig(endpoints=endpoints, cacert=tls.ca),
                "refuses the client certificate": EtcdConfig(
                    endpoints=endpoints, cacert=tls.ca, cert=foreign_cert, key=foreign_key
                ),
                "no valid PEM": EtcdConfig(
                    endpoints=endpoints, cacert=garbage, cert=tls.client_cert, key=tls.client_key
                ),
            }
            for message, config in cases.items():
                async with connected(config) as etcd:
                    with pytest.raises(Denied, match=message):
                        await etcd.get("/a")
            async with connected(EtcdConfig(endpoints=(f"http://127.0.0.1:{server.member.client_port}",))) as etcd:
                with pytest.raises(Unavailable):
                    await etcd.get("/a", timeout_s=0.5)

    def test_a_missing_file_is_named(self, tls: Tls, tmp_path: Path) -> None:
        """A certificate file that does not exist is named when the client is made."""
        missing = tmp_path / "no.pem"
        with pytest.raises(Denied, match=r"CA certificate .*no\.pem"):
            Etcd(EtcdConfig(endpoints=("https://127.0.0.1:1",), cacert=missing))

    def config(self, tls: Tls, *endpoints: str) -> EtcdConfig:
        return EtcdConfig(endpoints=endpoints, cacert=tls.ca, cert=tls.client_cert, key=tls.client_key)

    def with_server_certificate(self, tls: Tls, cert: Path, key: Path) -> Tls:
        return Tls(ca=tls.ca, cert=cert, key=key, client_cert=tls.client_cert, client_key=tls.client_key)


class TestAnswersToPeople:
    """A client that does not wait: what is wrong with each endpoint, at once, and in words that help."""

    async def cause(self, url: str, *others: str, cacert: Path | None = None) -> str:
        """What it says of `url`."""
        async with connected(EtcdConfig(endpoints=(url, *others), cacert=cacert, impatient=True)) as etcd:
            with pytest.raises(Unreachable) as caught:
                await etcd.get("/kvm/1/host")
        assert [*caught.value.causes] == [url, *others]
        assert str(caught.value).count(url) == 1
        return caught.value.causes[url]

    async def test_nobody_listens(self) -> None:
        """Each endpoint is tried, and named once."""
        other = f"http://127.0.0.1:{free_port()}"
        assert "connection refused" in await self.cause(f"http://127.0.0.1:{free_port()}", other)

    async def test_a_name_that_does_not_exist(self) -> None:
        """A typo in a host's name."""
        assert "cannot be resolved" in await self.cause("http://etcd.invalid:2379")

    async def test_the_wrong_scheme(self, tls: Tls) -> None:
        """Http for a server with TLS, and https for one without."""
        with EtcdServer(tls=tls) as server:
            assert "write https://" in await self.cause(server.endpoint.replace("https", "http"))
        with EtcdServer() as server:
            assert "no TLS, write http://" in await self.cause(server.endpoint.replace("http", "https"), cacert=tls.ca)

    async def test_a_stranger(self, tls: Tls) -> None:
        """A server of another authority."""
        other = Authority.make(tls.ca.parent / "other")
        with EtcdServer(tls=tls) as server:
            assert "not issued by the CA" in await self.cause(server.endpoint, cacert=other.certificate)

    async def test_one_that_was_met_is_waited_for(self) -> None:
        """Once somebody has answered, an outage is one: the deadline counts, as for every other client."""
        with EtcdServer() as server:
            async with connected(EtcdConfig(endpoints=server.endpoints, impatient=True)) as etcd:
                assert await etcd.get("/kvm/1/host") is None
                server.kill()
                with pytest.raises(Unavailable) as caught:
                    await etcd.get("/kvm/1/host", timeout_s=0.5)
        assert not isinstance(caught.value, Unreachable)

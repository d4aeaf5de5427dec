"""Who somebody is, by what their request brings. Attacks of WEB.md section 4, and others, among them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
from ipaddress import ip_network
from typing import Any

import bcrypt
import pytest
import structlog

from kvmsupervisor.adapters.web import Peer, Request
from kvmsupervisor.web import tries
from kvmsupervisor.web.passwords import ADDRESS_TRIES, NAME_TRIES, WAITING, Passwords, bcrypt_fits
from kvmsupervisor.web.people import ANYBODY, Person, Refusal, Role, need, up_to
from kvmsupervisor.web.recognition import Known, Recognition

TOKEN = "0123456789abcdef" * 4
CERT = {"subject": ((("commonName", "ops"),),), "subjectAltName": (("DNS", "ops.example"), ("IP Address", "10.0.0.9"))}
USERS = {"alice": b"$2b$04$alice", "bob": b"$2b$12$bob"}


class Fits:
    """Stands in for bcrypt: the password is what the hash ends in."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes]] = []
        self.most = 0
        self._now = 0

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        self._now += 1
        self.most = max(self.most, self._now)
        self.asked.append((password, hashed))
        self._now -= 1
        return hashed.endswith(b"$" + password)


class Bench:
    def __init__(self, **known: Any) -> None:
        self.time = 1000.0
        self.fits = Fits()
        self.people = Recognition(Known(**known), lambda: self.time, Passwords(lambda: self.time, self.fits))

    async def ask(self, address: str = "10.0.0.5", certificate: Any = None, **headers: str) -> Person:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        peer = Peer(address=address, secure=True, certificate=certificate)
        return await self.people.of(Request(method="GET", path="/", headers=named, peer=peer))

    async def status(self, address: str = "10.0.0.5", certificate: Any = None, **headers: str) -> int:
        try:
            await self.ask(address, certificate, **headers)
        except Refusal as refusal:
            return int(refusal.refused.status)
        return 200


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def test_roles_include_those_before_them() -> None:
    """An operator may all, whoever has a console may look."""
    assert up_to(Role.VIEWER) == {Role.VIEWER}
    assert up_to(Role.CONSOLE) == {Role.VIEWER, Role.CONSOLE}
    assert up_to(Role.OPERATOR) == set(Role)
    need(Person("alice", up_to(Role.OPERATOR)), Role.CONSOLE)
    for person, said in ((Person("bob", up_to(Role.CONSOLE)), "bob has not"), (ANYBODY, "asks nobody who they are")):
        with pytest.raises(Refusal, match=said) as refusal:
            need(person, Role.OPERATOR)
        assert refusal.value.refused.status == 403


async def test_nobody_is_asked_where_nobody_is_known() -> None:
    """Without files: everybody may look, whatever they bring."""
    assert await Bench().ask(authorization=basic("alice", "alice")) == ANYBODY
    assert not ANYBODY.may(Role.CONSOLE)


async def test_passwords() -> None:
    """A right one is somebody, with their role; a viewer without one. Everything else is 401, with the ways in."""
    bench = Bench(users=USERS, roles={"alice": Role.OPERATOR})
    assert await bench.ask(authorization=basic("alice", "alice")) == Person("alice", up_to(Role.OPERATOR))
    assert await bench.ask(authorization=basic("bob", "bob")) == Person("bob", up_to(Role.VIEWER))
    assert await bench.ask(authorization=basic("bob", "bob").replace("Basic", "bAsIc")) == Person(
        "bob", up_to(Role.VIEWER)
    )
    with pytest.raises(Refusal) as refusal:
        await bench.ask()
    assert refusal.value.refused.status == 401
    assert refusal.value.refused.headers["WWW-Authenticate"].startswith("Basic realm=")
    for wrong in (
        "Basic",
        "Basic !",
        "Basic YWxpY2U=",
        "Basic é",
        "Digest x",
        "Bearer x",
        basic("", ""),
        basic("alice", ""),
    ):
        assert await bench.status(authorization=wrong) == 401, wrong


async def test_a_password_is_computed_once() -> None:
    """A scrape each 15 s costs nothing; another hash for the same name is another matter."""
    bench = Bench(users=USERS)
    for _ in range(5):
        await bench.ask(authorization=basic("alice", "alice"))
    assert len(bench.fits.asked) == 1
    bench.people.use(Known(users={"alice": b"$2b$04$other"}))
    assert await bench.status(authorization=basic("alice", "alice")) == 401
    bench.people.use(Known(users={"bob": b"$2b$04$bob"}))
    assert await bench.status(authorization=basic("alice", "alice")) == 401
    assert await bench.status(authorization=basic("alice", "other")) == 401


async def test_a_browsers_first_requests_come_at_once() -> None:
    """Eight with the same password: computed once, and one at a time."""
    bench = Bench(users=USERS)
    found = await asyncio.gather(*(bench.ask(authorization=basic("alice", "alice")) for _ in range(8)))
    assert {one.name for one in found} == {"alice"}
    assert (len(bench.fits.asked), bench.fits.most) == (1, 1)


async def test_a_name_that_nobody_has_costs_the_same() -> None:
    """Attack: find names by time, or by the tries that they have. As expensive as the most expensive; as many tries."""
    bench = Bench(users={"alice": b"$2b$12$" + b"a" * 53})
    found = []
    for name in ("alice", "mallory"):
        found.append([await bench.status(authorization=basic(name, "x")) for _ in range(NAME_TRIES + 1)])
        bench.time += 3600
    assert found[0] == found[1] == [401] * NAME_TRIES + [429]
    hashes = [hashed[:7] for _, hashed in bench.fits.asked]
    assert hashes == [b"$2b$12$"] * (2 * NAME_TRIES)


async def test_a_password_for_the_dummy_is_nobodys() -> None:
    """Attack: a name that nobody has, and whatever password would fit what is computed for it."""
    bench = Bench(users=USERS)
    bench.people._passwords._dummy = b"$x"
    assert await bench.status(authorization=basic("mallory", "x")) == 401
    assert await bench.status(authorization=basic("mallory", "x")) == 401


async def test_a_hundred_wrong_passwords() -> None:
    """Requirement 15: then 429, with when to come again; whoever has come in goes on, from that address, too."""
    bench = Bench(users=USERS)
    await bench.ask(authorization=basic("bob", "bob"))
    found = []
    for number in range(100):
        found.append(await bench.status(authorization=basic(f"user{number % 20}", str(number))))
        assert await bench.status(authorization=basic("bob", "bob")) == 200
    assert found == [401] * ADDRESS_TRIES + [429] * (100 - ADDRESS_TRIES)
    assert len(bench.fits.asked) == ADDRESS_TRIES + 1
    with pytest.raises(Refusal) as refusal:
        await bench.ask(authorization=basic("alice", "alice"))
    assert refusal.value.refused.headers == {"Retry-After": "1"}
    assert await bench.status("10.0.0.6", authorization=basic("alice", "alice")) == 200
    bench.time += 1
    assert await bench.status(authorization=basic("alice", "alice")) == 200
    assert bench.people.refused["too many"] == 81


async def test_one_name_is_not_tried_for_ever() -> None:
    """Attack: guess the password of somebody who has come in, at the speed of what is remembered: 429."""
    bench = Bench(users=USERS)
    await bench.ask(authorization=basic("bob", "bob"))
    for number in range(NAME_TRIES):
        assert await bench.status(authorization=basic("bob", str(number))) == 401
    assert await bench.status(authorization=basic("bob", "bob")) == 429
    bench.time += 3
    assert await bench.status(authorization=basic("bob", "bob")) == 200


async def test_many_at_once_are_as_many_tries() -> None:
    """Attack: send all guesses before the first one is answered."""
    bench = Bench(users=USERS)
    found = await asyncio.gather(*(bench.status(authorization=basic("bob", str(n))) for n in range(50)))
    assert (found.count(401), found.count(429)) == (NAME_TRIES, 40)


async def test_no_more_wait_than_can_be_served() -> None:
    """Attack: from many addresses at once. Who has come in is not behind them."""
    bench = Bench(users=USERS)
    await bench.ask(authorization=basic("bob", "bob"))
    waiting = [asyncio.create_task(bench.status(f"10.1.0.{n}", authorization=basic("x", "x"))) for n in range(100)]
    await asyncio.sleep(0)
    assert await bench.status(authorization=basic("bob", "bob")) == 200
    found = await asyncio.gather(*waiting)
    assert (found.count(401), found.count(429)) == (WAITING, 100 - WAITING)


async def test_who_leaves_gets_no_try_back() -> None:
    """Attack: break off before the answer, so that wrong ones are not counted."""
    bench = Bench(users=USERS)
    for number in range(NAME_TRIES):
        task = asyncio.create_task(bench.ask(authorization=basic("bob", str(number))))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert await bench.status(authorization=basic("bob", "x")) == 429


def test_addresses_of_one_network_are_one() -> None:
    """Attack: an IPv6 customer has 2^64 addresses. And buckets that are only asked for are not kept."""
    assert tries.neighbourhood("2001:db8::1") == tries.neighbourhood("2001:db8::ffff:1") == "2001:db8::"
    assert tries.neighbourhood("::ffff:10.0.0.1") == "10.0.0.1"
    assert tries.neighbourhood("fe80::1%eth0") == "fe80::"
    assert tries.neighbourhood("") == ""
    buckets = tries.Tries(2, 1.0, lambda: 0.0)
    for number in range(tries.BUCKETS * 2):
        assert buckets.wait_s(number) == 0
    assert len(buckets._buckets) == 0
    for number in range(tries.BUCKETS * 2):
        buckets.take(number)
    assert len(buckets._buckets) == tries.BUCKETS


def test_the_loop_is_not_held_up_by_bcrypt() -> None:
    """Law: hashes are computed in a thread: while one is, others are answered."""
    went_on = threading.Event()

    async def go() -> None:
        def slow(password: bytes, hashed: bytes) -> bool:
            return went_on.wait(30)

        people = Recognition(Known(users=USERS), time.monotonic, Passwords(time.monotonic, slow))
        request = Request(method="GET", path="/", headers={"authorization": basic("alice", "x")})
        waiting = asyncio.create_task(people.of(request))
        while not people._passwords._waiting:  # noqa: ASYNC110 - a turn of the loop
            await asyncio.sleep(0)
        with pytest.raises(Refusal):
            await people.of(Request(method="GET", path="/"))
        went_on.set()
        assert (await waiting).name == "alice"
        people.close()

    asyncio.run(go())


def test_real_bcrypt() -> None:
    """Hashes of htpasswd ($2y$) and of others; 72 bytes count, a NUL fits nothing; a hash of nonsense neither."""
    made = bcrypt.hashpw(b"wonder", bcrypt.gensalt(4))
    for kind in (b"$2a$", b"$2b$", b"$2y$", b"$2x$"):
        assert bcrypt_fits(b"wonder", kind + made[4:])
        assert not bcrypt_fits(b"wander", kind + made[4:])
    long = bcrypt.hashpw(b"a" * 72, bcrypt.gensalt(4))
    assert bcrypt_fits(b"a" * 100, long)
    assert not bcrypt_fits(b"wonder\0", made)
    assert not bcrypt_fits(b"x", b"$2b$04$" + b"!" * 53)


async def test_tokens() -> None:
    """A program's; without a limit, as nobody guesses 128 bits."""
    tokens = {hashlib.sha256(TOKEN.encode()).digest(): "token:ci"}
    bench = Bench(tokens=tokens, roles={"token:ci": Role.OPERATOR})
    assert await bench.ask(authorization=f"Bearer {TOKEN}") == Person("token:ci", up_to(Role.OPERATOR))
    for wrong in (f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}", "Bearer", f"Basic {TOKEN}", f"Token {TOKEN}", "Bearer é"):
        assert await bench.status(authorization=wrong) == 401, wrong


async def test_certificates() -> None:
    """The name that an authority has signed; one of certain names, where the file wants that."""
    bench = Bench(by_certificate=True, roles={"cert:ops": Role.OPERATOR})
    assert await bench.ask(certificate=CERT) == Person("cert:ops", up_to(Role.OPERATOR))
    unnamed = {"subject": (), "subjectAltName": (("DNS", "x.example"),)}
    assert (await bench.ask(certificate=unnamed)).name == "cert:x.example"
    assert await bench.status(certificate={"subject": ()}) == 401
    assert await bench.status() == 401
    assert await Bench(by_certificate=True, sans=frozenset({"10.0.0.9"})).status(certificate=CERT) == 200
    assert await Bench(by_certificate=True, sans=frozenset({"other"})).status(certificate=CERT) == 403
    # A server that verified nothing, and whatever a client has sent.
    assert await Bench(users=USERS).status(certificate=CERT) == 401
    assert await Bench(proxies=PROXIES, roles={"cert:ops": Role.OPERATOR}).status(certificate=CERT) == 401


async def test_where_exporters_want_both_a_certificate_alone_is_not_enough() -> None:
    """Attack: the file asks for certificate and password, and Prometheus' certificate alone opens the page."""
    bench = Bench(by_certificate=True, users=USERS, roles={"cert:ops": Role.CONSOLE})
    assert await bench.status(certificate=CERT) == 200
    other = {"subject": ((("commonName", "prometheus"),),)}
    assert await bench.status(certificate=other) == 401
    assert (await bench.ask(certificate=other, authorization=basic("bob", "bob"))).name == "bob"
    assert await bench.status(certificate=CERT, authorization=basic("bob", "wrong")) == 401


async def test_a_certificate_cannot_be_somebody_else() -> None:
    """Attack: a common name that is a user's, a token's or a proxy's; or that hides in a log."""
    bench = Bench(by_certificate=True, roles={"alice": Role.OPERATOR, "token:ci": Role.OPERATOR})
    for name in ("alice", "token:ci", "alice\n", "\u202eecila"):
        person = await bench.ask(certificate={"subject": ((("commonName", name),),)})
        assert person.name.startswith("cert:")
        assert person.name.isprintable()
        assert not person.may(Role.CONSOLE)


PROXIES = (ip_network("10.0.0.0/30"), ip_network("::1/128"))


async def test_a_trusted_proxy_names_people() -> None:
    """From its addresses only; whatever else it hands on of the person's own login."""
    bench = Bench(proxies=PROXIES, users=USERS, roles={"proxy:carol": Role.OPERATOR})
    for address in ("10.0.0.2", "::ffff:10.0.0.2", "::1"):
        assert (await bench.ask(address, x_remote_user="carol")).roles == up_to(Role.OPERATOR)
    assert (await bench.ask("10.0.0.2", x_remote_user="carol", authorization=basic("carol", "x"))).name == "proxy:carol"
    assert await bench.status("10.0.0.2") == 401
    assert (await bench.ask("10.0.0.2", authorization=basic("bob", "bob"))).name == "bob"


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("10.0.0.5", {"x_remote_user": "carol"}),
        ("10.0.0.5", {"x_remote_user": "carol", "x_forwarded_for": "10.0.0.2"}),
        ("", {"x_remote_user": "carol"}),
        ("10.0.0.2", {"x_remote_user": "mallory, carol"}),
        ("10.0.0.2", {"x_remote_user": ""}),
        ("10.0.0.2", {"x_remote_user": "ca\trol"}),
        ("10.0.0.2", {"x_remote_user": "c" * 300}),
    ],
)
async def test_who_is_no_proxy_cannot_speak_as_one(address: str, headers: dict[str, str]) -> None:
    """Attack: the header from elsewhere, or twice through a proxy that adds to it, or nothing in it."""
    bench = Bench(proxies=PROXIES, roles={"proxy:carol": Role.OPERATOR})
    assert await bench.status(address, **headers) == 401
    # Some servers take `_` for `-`, and a proxy that replaces one lets the other through.
    like = Request(method="GET", path="/", headers={"x_remote_user": "carol"}, peer=Peer(address="10.0.0.2"))
    with pytest.raises(Refusal):
        await bench.people.of(like)


async def test_tries_are_counted_by_the_client_behind_a_proxy() -> None:
    """Attack: use up the tries of everybody behind the proxy; or claim ever other addresses without one."""
    bench = Bench(proxies=PROXIES, users=USERS)
    for number in range(30):
        await bench.status("10.0.0.2", x_forwarded_for="192.0.2.66", authorization=basic("bob", str(number)))
    assert await bench.status("10.0.0.2", x_forwarded_for="192.0.2.66", authorization=basic("bob", "bob")) == 429
    assert await bench.status("10.0.0.2", x_forwarded_for="192.0.2.7", authorization=basic("bob", "bob")) == 200
    assert (
        await bench.status("10.0.0.2", x_forwarded_for="192.0.2.7, 192.0.2.66", authorization=basic("bob", "bob"))
        == 429
    )
    for said, found in (
        ("192.0.2.7, 10.0.0.1", "192.0.2.7"),
        ("10.0.0.2, 192.0.2.7", "192.0.2.7"),
        ("192.0.2.7, rubbish", "10.0.0.2"),
        ("", "10.0.0.2"),
        ("10.0.0.1", "10.0.0.1"),
    ):
        chain = Request(method="GET", path="/", headers={"x-forwarded-for": said}, peer=Peer(address="10.0.0.2"))
        assert bench.people.address_of(chain) == found
    bench = Bench(users=USERS)
    last = 0
    for number in range(NAME_TRIES + 1):
        last = await bench.status("10.0.0.5", x_forwarded_for=f"192.0.2.{number}", authorization=basic("bob", "x"))
    assert last == 429


async def test_nothing_of_a_password_is_told() -> None:
    """Law: a log has the name and the address of who was refused; never what they sent as a password."""
    bench = Bench(users=USERS)
    with structlog.testing.capture_logs() as logs:
        await bench.status(authorization=basic("bob\x1b[31m", "hunter2"))
        await bench.status(authorization="Bearer hunter2")
    assert [(one["event"], one["user"], one["address"]) for one in logs] == [
        ("web.login_failed", "bob\\x1b[31m", "10.0.0.5"),
        ("web.login_failed", "token", "10.0.0.5"),
    ]
    assert "hunter2" not in str(logs)

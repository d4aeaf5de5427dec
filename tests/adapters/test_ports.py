"""Whether a server could listen on a port: real sockets on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvmsupervisor.adapters.ports import trouble_with


def free_port(address: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(params=["127.0.0.1", "::1"])
def taken(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Where somebody listens."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((request.param, 0))
        listener.listen(1)
        yield request.param, listener.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::"])
def test_a_free_port(address: str) -> None:
    """Law: a free port has no trouble, and stays free."""
    port = free_port(address)
    assert trouble_with(address, port) is None
    assert trouble_with(address, port) is None


def test_a_port_that_is_taken(taken: tuple[str, int]) -> None:
    """Law: where another program listens is told, on its address and on all of them."""
    address, port = taken
    everywhere = "::" if ":" in address else "0.0.0.0"
    assert trouble_with(address, port) == "another program listens there"
    assert trouble_with(everywhere, port) == "another program listens there"


def test_another_address_is_another_place(taken: tuple[str, int]) -> None:
    """Law: the same port on another address is free."""
    address, port = taken
    assert trouble_with("127.0.0.2" if address == "127.0.0.1" else "127.0.0.1", port) is None


def test_an_earlier_connection_does_not_matter() -> None:
    """Law: a server that has just ended, with a connection in TIME_WAIT, leaves the port free."""
    with socket.socket() as listener:
        # As servers do; without it the address is theirs for a minute more.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listener.accept()
            # The end that closes first is left in TIME_WAIT.
            server.close()
            assert client.recv(1) == b""
    assert trouble_with("127.0.0.1", port) is None


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "::1%no-such-if", "not an address"])
def test_an_address_that_the_host_has_not(address: str) -> None:
    """Law: an address that is not the host's is trouble, in the kernel's words, never an exception."""
    assert trouble_with(address, free_port()) not in {None, "another program listens there", ""}

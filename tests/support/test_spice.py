"""The handshake in `tests/support/spice.py`, against the SPICE server of a real QEMU."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import eventually
from tests.support.etcd import free_port
from tests.support.spice import LinkResult, link

Display = Callable[..., int]

RIGHT, OTHER = "correct horse 7", "wrong"


@pytest.fixture
def display() -> Iterator[Display]:
    """Starts a paused QEMU with a display; returns its port, once somebody listens there."""
    with contextlib.ExitStack() as stack:

        def start(ticketing: str, *more: str) -> int:
            port = free_port()
            argv = [
                "qemu-system-x86_64",
                "-nodefaults",
                "-no-user-config",
                "-S",
                "-machine",
                "q35,accel=tcg",
                "-m",
                "32",
            ]
            argv += ["-vga", "qxl", "-spice", f"port={port},addr=127.0.0.1,{ticketing}", *more]
            qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            stack.callback(qemu.communicate)
            stack.callback(qemu.kill)

            def listens() -> bool:
                assert qemu.poll() is None, qemu.communicate()[1]
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            eventually("the SPICE server", listens)
            return port

        yield start


def test_a_display_without_a_password(display: Display) -> None:
    """Law: with ticketing disabled every viewer is let in, whatever password it was given."""
    port = display("disable-ticketing=on")
    assert link("127.0.0.1", port) is LinkResult.OK
    assert link("127.0.0.1", port, password=OTHER) is LinkResult.OK


def test_a_display_with_a_password(display: Display, tmp_path: Path) -> None:
    """Law: the right password is let in; a wrong one, or none, is denied; and so again after that."""
    secret = tmp_path / "password"
    secret.write_text(RIGHT)
    port = display("password-secret=spice0", "-object", f"secret,id=spice0,file={secret}")
    for _ in range(2):
        assert link("127.0.0.1", port, password=RIGHT) is LinkResult.OK
        assert link("127.0.0.1", port, password=OTHER) is LinkResult.PERMISSION_DENIED
        assert link("127.0.0.1", port) is LinkResult.PERMISSION_DENIED


def test_what_is_no_spice_server() -> None:
    """Law: another server on that port, and nobody there, are told from a display."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def greet() -> None:
            with other.accept()[0] as client:
                client.sendall(b"SSH-2.0-something\r\n" * 9)
                client.recv(4096)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ValueError, match="no SPICE server"):
            link("127.0.0.1", port)
        thread.join()
    with pytest.raises(OSError, match="refused"):
        link("127.0.0.1", port)

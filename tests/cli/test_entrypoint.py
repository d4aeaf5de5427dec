"""What a container's arguments mean, and its health check."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvmsupervisor.cli import health
from kvmsupervisor.cli.entrypoint import route

QEMU = ("-m", "512", "-drive", "file=a b.img", "--", "-nographic")


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        ((), {}, ("run",)),
        ((), {"INSTANCE": " "}, ("run",)),
        ((), {"INSTANCE": "web1"}, ("exec",)),
        (QEMU, {}, ("exec", "--", *QEMU)),
        (QEMU, {"INSTANCE": "web1"}, ("exec", "--", *QEMU)),
        (("--", "-m", "512"), {}, ("exec", "--", "-m", "512")),
        (("--version",), {}, ("exec", "--", "--version")),
        (("list", "-o", "json"), {}, ("list", "-o", "json")),
        (("run",), {"INSTANCE": "web1"}, ("run",)),
        (("exec", "--", "-m", "512"), {}, ("exec", "--", "-m", "512")),
    ],
)
def test_arguments_are_qemus_or_a_command(
    arguments: tuple[str, ...], environ: dict[str, str], expected: tuple[str, ...]
) -> None:
    """Law: nothing supervises; a hyphen is QEMU's, word by word as it came; anything else is a command."""
    assert route(arguments, environ) == expected


def test_the_entry_point_runs_the_command() -> None:
    """Law: the command line gets what `route` says, with the program's own name and exit code."""
    done = subprocess.run(
        [sys.executable, "-c", "from kvmsupervisor.cli.entrypoint import main; main()", "list", "--nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "kvmsupervisor list" in done.stderr


@pytest.fixture
def served() -> Iterator[tuple[str, list[int]]]:
    """An HTTP server that answers /healthz with the first of a list of codes; its address."""
    codes = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(codes[0] if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base has it
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_port}", codes
    server.shutdown()
    thread.join()
    server.server_close()


def test_healthy_is_what_healthz_says(served: tuple[str, list[int]]) -> None:
    """Law: 200 is healthy, anything else is not, and what was answered is told."""
    address, codes = served
    assert health.check({"KVM_LISTEN": address}) is None
    port = address.rpartition(":")[2]
    assert health.check({"KVM_LISTEN": f"0.0.0.0:{port}"}) is None
    codes[0] = 503
    assert health.check({"KVM_LISTEN": address}) == f"{address}/healthz answers 503"


def test_silence_is_unhealthy_and_says_where() -> None:
    """Law: nobody listens: unhealthy."""
    assert "Connection refused" in str(health.check({"KVM_LISTEN": "127.0.0.1:1"}))


def test_what_serves_nothing_has_nothing_to_be_ill_of() -> None:
    """Law: without HTTP, and in single mode, the container's own life is its health."""
    assert health.check({"KVM_LISTEN": "off"}) is None
    assert health.check({"INSTANCE": "web1", "KVM_LISTEN": "127.0.0.1:1"}) is None


def test_bad_settings_are_told() -> None:
    """Law: the check says what keeps the supervisor from starting."""
    assert "KVM_LISTEN" in str(health.check({"KVM_LISTEN": "nonsense"}))

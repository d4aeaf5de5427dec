"""What a command does not need is not imported before it is needed: imports are most of the time of a start.

Nothing here measures time. A process of its own tells which modules it has.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmsupervisor.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]

NEVER = ("rich", "prometheus_client", "pycdlib", "h11", "psutil", "jeepney", "daemon", "difflib")
"""What neither the first read of etcd nor the first start or adoption needs."""

LATER = (
    "structlog",
    "kvmsupervisor.supervisor",
    "kvmsupervisor.instance",
    "kvmsupervisor.machine",
    "kvmsupervisor.guard",
)
"""What can wait until etcd has been asked."""

OTHERS = ("kvmsupervisor.single", "kvmsupervisor.adapters.fetch", "kvmsupervisor.adapters.web.exchange")
"""What a supervisor may never need."""


def modules(program: str) -> set[str]:
    """What is imported once this program has run."""
    told = f"{program}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_etcd_is_asked_before_the_rest_is_imported() -> None:
    """The thread that imports the rest is held up at its first import of ours, and etcd is asked all the same."""
    program = """
import os, sys

def hold(event, arguments):
    if event == "import" and arguments[0] == "kvmsupervisor.config.logs":
        os.read(0, 1)
        os.write(1, " ".join(sys.modules).encode())
        os._exit(0)

sys.argv[1:] = ["run"]
from kvmsupervisor.cli.main import main
sys.addaudithook(hold)
main()
"""
    with socket.create_server(("127.0.0.1", 0)) as etcd:
        etcd.settimeout(60)
        environment = {
            "PATH": os.environ["PATH"],
            "ETCD_ENDPOINTS": f"http://127.0.0.1:{etcd.getsockname()[1]}",
            "KVM_RUN_DIR": "/run/never-made",
        }
        with subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                etcd.accept()[0].close()
                told, trouble = process.communicate(".", timeout=60)
            finally:
                process.kill()
    found = set(told.split())
    assert "grpc" in found, trouble
    assert not found & {*NEVER, *LATER, *OTHERS}


def test_a_supervisor_does_not_pay_for_what_it_may_never_need() -> None:
    found = modules("import kvmsupervisor.cli.supervise")
    assert "kvmsupervisor.supervisor.supervisor" in found
    assert not found & {*NEVER, *OTHERS}


@pytest.mark.parametrize(
    "module", ["read_commands", "write_commands", "spice_command", "config_command", "confirm_removal", "break_lock"]
)
def test_a_command_is_completed_and_explained_without_etcds_client(module: str) -> None:
    """A shell asks for completion at each press of a key."""
    found = modules(f"import kvmsupervisor.cli.main, kvmsupervisor.cli.{module}")
    assert not found & {*NEVER, *LATER, *OTHERS, "grpc", "google"}


def test_help_needs_no_command() -> None:
    program = """
import sys
from kvmsupervisor.cli.main import main
sys.argv[1:] = ["--version"]
try:
    main()
except SystemExit:
    pass
"""
    found = modules(program)
    commands = {f"kvmsupervisor.cli.{one.module}" for one in COMMANDS.values()}
    assert not found & {*NEVER, *LATER, *OTHERS, *commands, "asyncio"}

"""SSH into the demo's guest: what this machine must have for it, and what is put into the guest."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvmsupervisor.cli.demo import ssh_layer
from kvmsupervisor.cli.demo.packages import GuestError
from kvmsupervisor.cli.demo.ssh import Ssh
from kvmsupervisor.cli.demo.stage import DemoError

ENVIRON = {"PATH": os.environ["PATH"]}


def program(path: Path, script: str) -> str:
    """A program that is this shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_key_pair_of_its_own_reaches_the_guest_as_user_data(tmp_path: Path) -> None:
    """The person's own keys, settings and known hosts stay out of it."""
    qemu = program(tmp_path / "qemu", "echo tap; echo user")
    ssh = await Ssh.prepare(tmp_path, port=2345, qemu=qemu, environ=ENVIRON)
    assert ssh.key.stat().st_mode & 0o777 == 0o600
    assert ssh.wishes["forward"] == "tcp:127.0.0.1:2345:22"
    assert (
        ssh.wishes["user-data"] == f"#cloud-config\nssh_authorized_keys:\n  - {ssh.key.with_suffix('.pub').read_text()}"
    )
    assert ssh.line.startswith(f"ssh -F none -p 2345 -i {ssh.key} -o IdentitiesOnly=yes ")
    assert ssh.line.endswith(" -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR root@127.0.0.1")


async def test_what_is_missing_for_ssh_is_named(tmp_path: Path) -> None:
    """In one line: the client with Debian's package, QEMU's own network, a QEMU at all, an answer."""
    qemu = program(tmp_path / "qemu", "echo tap; echo bridge")
    with pytest.raises(
        DemoError, match=r"^no program named ssh in PATH; on Debian it is in the package openssh-client$"
    ):
        await Ssh.prepare(tmp_path, port=2345, qemu=qemu, environ={"PATH": str(tmp_path)})
    with pytest.raises(DemoError, match=r"^/.*/qemu has no network of its own .*does not name user.$"):
        await Ssh.prepare(tmp_path, port=2345, qemu=qemu, environ=ENVIRON)
    with pytest.raises(DemoError, match=r"^/no/qemu cannot be started: No such file or directory$"):
        await Ssh.prepare(tmp_path, port=2345, qemu="/no/qemu", environ=ENVIRON)
    program(tmp_path / "ssh", "echo not; echo today; exit 255")
    with pytest.raises(DemoError, match=r"^ssh ended with exit code 255: not today$"):
        await Ssh(2345, tmp_path / "key", "").ask("uptime", {"PATH": f"{tmp_path}:/bin"})


def test_a_server_that_cannot_be_fetched_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the cache has nothing of it: the next time it is tried again."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "apt-get", "echo E: no network; echo E: none at all; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "argv", ["ssh_layer", str(tmp_path), "initramfs"])
    with pytest.raises(SystemExit) as ended:
        ssh_layer.main()
    assert ended.value.code == "apt-get cannot download dropbear-bin; it says: E: no network E: none at all"
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "lock"}


def test_the_server_comes_with_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """What its libraries need, too; a name that is in no package is not its need."""
    libraries = tmp_path / "usr" / "lib" / "x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (tmp_path / "usr" / "sbin").mkdir()
    (tmp_path / "usr" / "sbin" / "dropbear").write_bytes(b"\x7fELF\0libz.so.1\0libc.so.6\0libother.so.2\0")
    (libraries / "libz.so.1.3").write_bytes(b"z\0libz.so.1\0libdeep.so.10\0libc.so.6\0")
    (libraries / "libz.so.1").symlink_to("libz.so.1.3")
    for name in ("libdeep.so.10", "libc.so.6", "libm.so.6"):
        (libraries / name).write_bytes(name.encode())
    with pytest.raises(GuestError, match=r"^no ld-linux-x86-64\.so\.2 in dropbear-bin and what it depends on$"):
        ssh_layer.server_files(tmp_path)
    (libraries / "ld-linux-x86-64.so.2").write_bytes(b"linker")
    files = ssh_layer.server_files(tmp_path)
    assert files.pop("lib64/ld-linux-x86-64.so.2") == b"linker"
    assert sorted(files) == [
        "bin/dropbear",
        *(f"lib/x86_64-linux-gnu/{name}" for name in ("libc.so.6", "libdeep.so.10", "libz.so.1")),
    ]

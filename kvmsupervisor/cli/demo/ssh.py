"""The person's side of SSH into the demo's guest: a key pair of the demo's own, the user data, and the command line."""

from __future__ import annotations

import asyncio
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvmsupervisor.aio import end_tool
from kvmsupervisor.cli.demo.stage import DemoError
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.user_network import LOOPBACK, USER

MAC = "52:54:00:00:00:01"
GUEST_PORT = 22


@frozen
class Ssh:
    """A way into the guest.

    Attributes:
        port: of 127.0.0.1, leads to the guest's.
        key: the file of the private key.
        public: the public key, one line.
    """

    port: int
    key: Path
    public: str

    @classmethod
    async def prepare(cls, folder: Path, *, port: int, qemu: str, environ: Mapping[str, str]) -> Ssh:
        """Make a key pair in `folder`.

        Raises:
            DemoError: this machine lacks something for SSH; the message is one line.
        """
        for program in ("ssh", "ssh-keygen"):
            if shutil.which(program, path=environ.get("PATH")) is None:
                raise DemoError(f"no program named {program} in PATH; on Debian it is in the package openssh-client")
        networks = await _output([qemu, "-netdev", "help"], environ)
        if "user" not in networks.split():
            raise DemoError(f"{qemu} has no network of its own (`{qemu} -netdev help` does not name user)")
        key = folder / "ssh_key"
        await _output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f", str(key)], environ)
        return cls(port, key, key.with_suffix(".pub").read_text().strip())

    @property
    def wishes(self) -> dict[str, str]:
        """The keys of an instance that let SSH in."""
        return {
            "mac": MAC,
            "bridge": USER,
            "forward": f"tcp:{LOOPBACK}:{self.port}:{GUEST_PORT}",
            "user-data": f"#cloud-config\nssh_authorized_keys:\n  - {self.public}\n",
        }

    @property
    def command(self) -> list[str]:
        """Logs in, without the person's own settings. The host key is new each time: not kept, not compared."""
        options = ("IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        return [
            *("ssh", "-F", "none", "-p", str(self.port), "-i", str(self.key)),
            *(word for option in options for word in ("-o", option)),
            f"root@{LOOPBACK}",
        ]

    @property
    def line(self) -> str:
        """The command, as a person types it."""
        return shlex.join(self.command)

    async def ask(self, question: str, environ: Mapping[str, str]) -> str:
        """Run a command in the guest; return what it prints.

        Raises:
            DemoError: it was not run; the message is one line.
        """
        *command, guest = self.command
        return await _output([*command, "-o", "BatchMode=yes", guest, question], environ)


async def _output(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Run a program to its end, or kill it when this is cancelled; return what it printed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise DemoError(f"{command[0]} cannot be started: {error.strerror}") from error
    try:
        output, _ = await process.communicate()
    finally:
        await end_tool(process)
    text = output.decode(errors="replace").strip()
    if process.returncode != 0:
        raise DemoError(f"{command[0]} ended with exit code {process.returncode}: {' '.join(text.split())}")
    return text

"""The version of this host's QEMU, and which versioned machine type a plain name such as `q35` stands for there.

A guest is installed on one version of a machine type. After an update of QEMU the plain name stands for a newer
version, which is different hardware to the guest. So the versioned name is recorded when a machine first starts.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Mapping

from kvmsupervisor.aio import end_tool

LIMIT_S = 20.0
"""How long QEMU may take to list them. On an idle host it takes 50 ms."""

VERSION_S = 5.0
"""How long QEMU may take to tell its version."""

_ALIAS = re.compile(r"^(\S+)\s.*\(alias of (\S+)\)\s*$", re.MULTILINE)


class MachineTypes:
    """Asks QEMU for its machine types once, when they are first needed."""

    def __init__(self, qemu: str) -> None:
        self._qemu = qemu
        self._aliases: Mapping[str, str] | None = None
        self._asking = asyncio.Lock()

    async def versioned(self, machine: str) -> str:
        """The versioned name of `machine`; `machine` itself where it has a version, or QEMU does not answer.

        A QEMU that cannot be run reports the cause when it is started.
        """
        async with self._asking:
            if self._aliases is None:
                self._aliases = await _aliases(self._qemu)
        return (self._aliases or {}).get(machine, machine)


async def _aliases(qemu: str) -> Mapping[str, str] | None:
    try:
        process = await asyncio.create_subprocess_exec(
            qemu,
            "-machine",
            "help",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(LIMIT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        await end_tool(process)
    # An answer without any machine type is a failure; the next call may succeed.
    return dict(_ALIAS.findall(output.decode(errors="replace"))) or None


def qemu_version(qemu: str) -> str:
    """The version of a QEMU, as `7.2.22`; empty where it does not tell."""
    try:
        told = subprocess.run([qemu, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"version (\d+(?:\.\d+)+)", told.stdout)
    return "" if found is None else found[1]

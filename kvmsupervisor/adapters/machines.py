"""The machine types that this host's QEMU knows: which versioned type a plain name such as `q35` stands for.

A guest is installed on one version of a machine; after an update of QEMU the plain name stands for a newer one, which
is other hardware to it. So the versioned name is recorded when a machine first starts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

LIMIT_S = 20.0
"""How long QEMU may take to list them: 50 ms on an idle host."""

_ALIAS = re.compile(r"^(\S+)\s.*\(alias of (\S+)\)\s*$", re.MULTILINE)


class MachineTypes:
    """Asks QEMU once, when it is first needed."""

    def __init__(self, qemu: str) -> None:
        self._qemu = qemu
        self._aliases: Mapping[str, str] | None = None
        self._asking = asyncio.Lock()

    async def versioned(self, machine: str) -> str:
        """What `machine` stands for; itself when it is a versioned name already, or when QEMU does not answer.

        QEMU that cannot be run says why when it is started, in its own words.
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
        if process.returncode is None:
            process.kill()
            await process.wait()
    # An answer without any is a failure, which another time may go well.
    return dict(_ALIAS.findall(output.decode(errors="replace"))) or None

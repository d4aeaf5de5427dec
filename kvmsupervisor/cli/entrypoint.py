"""`kvmsupervisor-container`, the image's entry point: turns a container's arguments into a command.

The image that this grew from took QEMU's options as its arguments. So arguments that begin with a hyphen are QEMU's
here, unlike on the command line of `kvmsupervisor`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

INSTANCE = "INSTANCE"
"""Variable that names the one instance that a container without arguments runs from its keys."""


def route(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """The command line of `kvmsupervisor` for these arguments of a container.

    - none: `run`, or `exec` for the instance that `INSTANCE` names
    - QEMU's options, which begin with a hyphen: `exec -- …`, each word as it is
    - anything else: a command of `kvmsupervisor`
    """
    if not arguments:
        return ("exec",) if environ.get(INSTANCE, "").strip() else ("run",)
    if arguments[0].startswith("-"):
        # People who know `exec` write a leading "--".
        options = arguments[1:] if arguments[0] == "--" else arguments
        return ("exec", "--", *options)
    return tuple(arguments)


def main() -> None:
    """Run the command for the container's arguments, and exit with its code."""
    # Imported here: the code above does not need it.
    from kvmsupervisor.cli.main import main as command_line  # noqa: PLC0415

    sys.argv[1:] = route(sys.argv[1:], os.environ)
    command_line()

"""What a container's arguments mean: `kvmsupervisor-container`, the image's entry point.

The image that this grew from took QEMU's options as its arguments. So, other than on the command line of
`kvmsupervisor`, arguments that begin with a hyphen are QEMU's here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

INSTANCE = "INSTANCE"
"""Names the one instance that a container without arguments runs, from its keys."""


def route(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """The command line of `kvmsupervisor` for these arguments of a container.

    - none: `run`, or `exec` for the instance that `INSTANCE` names
    - QEMU's options, which begin with a hyphen: `exec -- …`, each word as it is
    - anything else is a command already
    """
    if not arguments:
        return ("exec",) if environ.get(INSTANCE, "").strip() else ("run",)
    if arguments[0].startswith("-"):
        # A leading "--" of its own is what people write who know `exec`.
        options = arguments[1:] if arguments[0] == "--" else arguments
        return ("exec", "--", *options)
    return tuple(arguments)


def main() -> None:
    """Run the command that the container's arguments mean, and exit with its code."""
    # Imported here: what is above has no need of it.
    from kvmsupervisor.cli.main import main as command_line  # noqa: PLC0415

    sys.argv[1:] = route(sys.argv[1:], os.environ)
    command_line()

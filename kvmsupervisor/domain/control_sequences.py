"""What makes a terminal do more than print. Pure. Source: ECMA-48; xterm's control sequences."""

from __future__ import annotations

import re

_CONTROL = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    rb"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS, SOS, PM, APC, with what they hold
    rb"|\x1b[ -/]*[0-~]?"  # the other escape sequences
    rb"|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f]"
)


def printed(data: bytes) -> bytes:
    """Output without control sequences.

    For output from before: old questions of a program to its terminal would be answered again, into the guest.
    """
    return _CONTROL.sub(b"", data)

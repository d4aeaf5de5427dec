"""TCP ports of this host: whether somebody listens there already."""

from __future__ import annotations

import errno
import socket

TAKEN = "another program listens there"
"""The trouble that is the port's; every other one is the address's."""


def trouble_with(address: str, port: int) -> str | None:
    """Why a server cannot listen there, for people; None when it can. Nothing listens afterwards."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As QEMU does: the end of an earlier connection does not stand in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return TAKEN
            return error.strerror or str(error)
    return None

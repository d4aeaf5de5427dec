"""TCP and UDP ports of this host: whether another program listens there already."""

from __future__ import annotations

import errno
import socket

TAKEN = "another program listens there"
"""The trouble with a port; every other trouble is with the address."""


def trouble_with(address: str, port: int, protocol: str = "tcp") -> str | None:
    """Why a server cannot listen there, for people; None when it can. Does not keep the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
        try:
            if protocol == "tcp":
                # As QEMU does, so that a closed connection in TIME_WAIT does not count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            if protocol == "tcp":
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return TAKEN
            return error.strerror or str(error)
    return None

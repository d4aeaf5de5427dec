"""Knocks at a SPICE server as a viewer does: the link handshake of the main channel, up to its verdict on the password.

    link("127.0.0.1", 5901)                    # LinkResult.OK: a display is served, without a password
    link("127.0.0.1", 5901, password="wrong")  # LinkResult.PERMISSION_DENIED

Source: spice-protocol, spice/protocol.h. All numbers are little-endian. Client: SpiceLinkHeader, SpiceLinkMess. Server:
SpiceLinkHeader, SpiceLinkReply with a 1024-bit RSA key. Client: the password, with a NUL behind it, encrypted by
RSA-OAEP with SHA-1. Server: one number. Needs the program openssl.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import tempfile
from enum import IntEnum

MAGIC = b"REDQ"
VERSION = (2, 2)
MAIN_CHANNEL = 1
PUBLIC_KEY_BYTES = 162
TICKET_BYTES = 128
DEADLINE_S = 30.0

_HEADER = struct.Struct("<4sIII")  # magic, major and minor version, size of what follows
_MESSAGE = struct.Struct("<IBBIII")  # connection id, channel type and id, common and channel caps, their offset
_REPLY = struct.Struct(f"<I{PUBLIC_KEY_BYTES}sIII")  # error, public key, common and channel caps, their offset


class LinkResult(IntEnum):
    """`SpiceLinkErr`: the server's verdict."""

    OK = 0
    ERROR = 1
    INVALID_MAGIC = 2
    INVALID_DATA = 3
    VERSION_MISMATCH = 4
    NEED_SECURED = 5
    NEED_UNSECURED = 6
    PERMISSION_DENIED = 7
    BAD_CONNECTION_ID = 8
    CHANNEL_NOT_AVAILABLE = 9


def link(host: str, port: int, *, password: str = "", timeout_s: float = DEADLINE_S) -> LinkResult:
    """Link to the main channel; return the first verdict that is not OK, or the last one.

    Args:
        host: of the server.
        port: of the server, the one without TLS.
        password: what the viewer would be given; empty is what one sends that was given none.
        timeout_s: for each answer.

    Raises:
        OSError: nobody listens, or nobody answers.
        ValueError: it answers something else than SPICE.
    """
    with socket.create_connection((host, port), timeout=timeout_s) as server:
        # Without capabilities: the server then takes the password at once, without choosing an authentication.
        message = _MESSAGE.pack(0, MAIN_CHANNEL, 0, 0, 0, _MESSAGE.size)
        server.sendall(_HEADER.pack(MAGIC, *VERSION, len(message)) + message)
        magic, major, _, size = _HEADER.unpack(_read(server, _HEADER.size))
        if magic != MAGIC or major != VERSION[0] or size < _REPLY.size:
            raise ValueError(f"no SPICE server: it answers {magic!r}, version {major}, {size} bytes")
        error, public_key, *_ = _REPLY.unpack(_read(server, size)[: _REPLY.size])
        if error != LinkResult.OK:
            return LinkResult(error)
        server.sendall(_ticket(public_key, password))
        return LinkResult(struct.unpack("<I", _read(server, 4))[0])


def _ticket(public_key: bytes, password: str) -> bytes:
    with tempfile.NamedTemporaryFile() as key:
        key.write(public_key)
        key.flush()
        options = ("rsa_padding_mode:oaep", "rsa_oaep_md:sha1", "rsa_mgf1_md:sha1")
        argv = ["openssl", "pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey", key.name]
        done = subprocess.run(
            [*argv, *(word for option in options for word in ("-pkeyopt", option))],
            input=password.encode() + b"\0",
            capture_output=True,
            check=True,
            timeout=DEADLINE_S,
        )
    assert len(done.stdout) == TICKET_BYTES
    return done.stdout


def _read(server: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = server.recv(size - len(data))
        if not more:
            raise ValueError(f"the server ended the connection after {len(data)} of {size} bytes")
        data += more
    return data

"""What an error of gRPC or etcd means for the request that failed.

The first question is whether a write may have happened. It may, unless the error is known to come before any write: an
unknown text or code never counts as "not done". Sources of the texts, and of where the server returns them:
https://github.com/etcd-io/etcd/blob/v3.4.0/etcdserver/api/v3rpc/rpctypes/error.go and
https://github.com/etcd-io/etcd/blob/v3.4.0/etcdserver/v3_server.go (what is returned before a proposal).
"""

from __future__ import annotations

from typing import Any

from kvmsupervisor.adapters.etcd.api import Ahead, Compacted, Denied, LeaseGone, NoSpace, Rejected
from kvmsupervisor.adapters.etcd.protocol import grpc


class AttemptFailed(Exception):
    """One endpoint did not answer the request: try another one.

    Attributes:
        reason: for people.
        done_maybe: whether the request may have been carried out all the same.
        permanent: whether this endpoint fails in the same way until somebody changes certificates.
        connected: whether there was a connection.
    """

    def __init__(self, reason: str, *, done_maybe: bool, permanent: bool = False, connected: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.done_maybe = done_maybe
        self.permanent = permanent
        self.connected = connected


class TokenRefused(Exception):
    """The token is unknown, expired, or older than the last change of users or roles. Nothing was done."""


class ReplyTooLarge(Exception):
    """The reply is larger than this client accepts: ask for less."""


class LeaseExists(Rejected):
    """A lease with that id exists: an earlier attempt to grant it was carried out."""


_NOT_DONE = frozenset(
    {
        # The server returns these before it proposes anything.
        "etcdserver: no leader",
        "etcdserver: too many requests",
        "etcdserver: not capable",
        "etcdserver: rpc not supported for learner",
        "raft proposal dropped",
    }
)

_TOKEN = frozenset(
    {
        "etcdserver: invalid auth token",
        "etcdserver: revision of auth store is old",
        # The reply to a request without a token, for example when authentication was switched on just now.
        "etcdserver: user name is empty",
    }
)

_DENIED = frozenset(
    {
        "etcdserver: permission denied",
        "etcdserver: authentication failed, invalid user ID or password",
        "etcdserver: user name not found",
    }
)

_REFUSING_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""With these codes, etcd's text is about the request, not about the cluster."""

_CERTIFICATES = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate was not issued by the CA in use",
    "Hostname Verification": "the server's certificate is for another name",
    "Failed to create security handshaker": "the CA, certificate or key in use is no valid PEM",
    # A TLS 1.3 server rejects the client after its own side of the handshake is complete. gRPC reports its alert so.
    "TSI_DATA_CORRUPTED": "the server refuses the client certificate, or wants one",
}
"""Parts of gRPC's messages (1.76 to 1.85) for a handshake that can never succeed. Other texts count as a mere
failure."""


def judge(error: Any, what: str) -> Exception:
    """Translate an `AioRpcError` that ended the request `what`.

    Returns:
        `EtcdError` when the error is final, otherwise `AttemptFailed`, `TokenRefused` or `ReplyTooLarge`.
    """
    code, text = error.code(), error.details() or ""
    if (known := judge_text(text, what)) is not None:
        return known
    if text.startswith("etcdserver: ") and code in _REFUSING_CODES:
        return Rejected(f"{what}: {text}")
    if text.startswith("grpc: received message larger than max"):
        # From the server's gRPC (Go), about the request. etcd's own limit is a little lower.
        return Rejected(f"{what}: the request is too large for etcd ({text})")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ReplyTooLarge(f"{what}: {text}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return AttemptFailed("no answer in time", done_maybe=True)
    return AttemptFailed(text or code.name, done_maybe=True)


def judge_text(text: str, what: str) -> Exception | None:
    """Translate etcd's text, where the text alone decides; otherwise return None.

    A canceled watch has no code. Its text is Go's whole phrase: `rpc error: code = … desc = etcdserver: …`.
    """
    text = text.rpartition(" desc = ")[2]
    if text in _TOKEN:
        return TokenRefused(text)
    if text in _DENIED:
        return Denied(f"{what}: {text}")
    if text in _NOT_DONE:
        return AttemptFailed(text, done_maybe=False)
    match text:
        case "etcdserver: mvcc: required revision has been compacted":
            return Compacted(0)
        case "etcdserver: mvcc: required revision is a future revision":
            return Ahead(f"{what}: etcd has not come to that revision")
        case "etcdserver: mvcc: database space exceeded":
            return NoSpace(f"{what}: etcd has no space left ({text}): see docs/etcd.md")
        case "etcdserver: requested lease not found":
            return LeaseGone(f"{what}: {text}")
        case "etcdserver: lease already exists":
            return LeaseExists(f"{what}: {text}")
    return None


_NO_CONNECTION = {
    "Connection refused": "connection refused: nothing listens there",
    "WRONG_VERSION_NUMBER": "what answers there speaks no TLS: write http:// and not https://",
    # etcd without TLS closes the connection in the middle of the handshake.
    "Handshake read failed": "what answers there breaks the handshake off: if it speaks no TLS, write http://",
    "errors resolving": "this host name cannot be resolved",
    "Failed parsing HTTP/2": "what answers there is no etcd",
}
"""Parts of gRPC's messages (1.76 to 1.85) for a connection that cannot be made, and what they mean for people."""


def no_connection(text: str) -> AttemptFailed:
    """Translate gRPC's message about a connection that could not be made."""
    for mark, meaning in _CERTIFICATES.items():
        if mark in text:
            return AttemptFailed(f"{meaning} ({text})", done_maybe=False, permanent=True, connected=False)
    said = next((meaning for mark, meaning in _NO_CONNECTION.items() if mark in text), text)
    return AttemptFailed(said, done_maybe=False, connected=False)

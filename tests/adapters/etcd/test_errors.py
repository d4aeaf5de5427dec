"""What an error means: above all, when a write may be said not to have happened."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from grpc import StatusCode as Code

from kvmsupervisor.adapters.etcd import Compacted, Denied, LeaseGone, NoSpace, Rejected
from kvmsupervisor.adapters.etcd.errors import (
    AttemptFailed,
    LeaseExists,
    ReplyTooLarge,
    TokenRefused,
    judge,
    no_connection,
)


@dataclass(frozen=True)
class Error:
    """As much of an `AioRpcError` as is looked at."""

    _code: Code
    _details: str | None

    def code(self) -> Code:
        return self._code

    def details(self) -> str | None:
        return self._details


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAVAILABLE, "etcdserver: no leader"),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests"),
        (Code.UNKNOWN, "raft proposal dropped"),
    ],
)
def test_what_was_refused_before_it_was_proposed_was_not_done(code: Code, details: str) -> None:
    """These, and only these, failures say that a write did not happen."""
    failure = judge(Error(code, details), "put /a")
    assert isinstance(failure, AttemptFailed)
    assert not failure.done_maybe


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAVAILABLE, "etcdserver: request timed out"),
        (Code.UNAVAILABLE, "etcdserver: request timed out, possibly due to previous leader failure"),
        (Code.UNAVAILABLE, "etcdserver: leader changed"),
        (Code.UNAVAILABLE, "etcdserver: server stopped"),
        (Code.UNAVAILABLE, "Socket closed"),
        (Code.UNAVAILABLE, None),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        (Code.CANCELLED, "context canceled"),
        (Code.INTERNAL, "what nobody has seen yet"),
        (Code.UNKNOWN, "etcdserver: what nobody has seen yet"),
        (Code.INVALID_ARGUMENT, "said by something that is not etcd"),
    ],
)
def test_whatever_else_may_have_been_done(code: Code, details: str | None) -> None:
    """Where nobody vouches for the opposite, a write may have happened."""
    failure = judge(Error(code, details), "put /a")
    assert isinstance(failure, AttemptFailed)
    assert failure.done_maybe


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Compacted),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", Denied),
        (Code.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password", Denied),
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", TokenRefused),
        (Code.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", TokenRefused),
        (Code.INVALID_ARGUMENT, "etcdserver: user name is empty", TokenRefused),
        (Code.NOT_FOUND, "etcdserver: requested lease not found", LeaseGone),
        (Code.FAILED_PRECONDITION, "etcdserver: lease already exists", LeaseExists),
        (Code.INVALID_ARGUMENT, "etcdserver: request is too large", Rejected),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", Rejected),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", NoSpace),
        (Code.RESOURCE_EXHAUSTED, "grpc: received message larger than max (9 vs. 8)", Rejected),
        (Code.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 8)", ReplyTooLarge),
    ],
)
def test_an_answer_is_an_answer(code: Code, details: str, kind: type[Exception]) -> None:
    """What etcd says about the request itself is final, and is told by what the caller does next."""
    assert type(judge(Error(code, details), "put /a")) is kind


def test_only_certificates_are_beyond_waiting() -> None:
    """A refused connection may be accepted tomorrow; a certificate for another name will not mend."""
    assert not no_connection("ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused").permanent
    assert no_connection("Custom verification check failed: Hostname Verification Check failed.").permanent

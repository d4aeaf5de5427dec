"""The metadata of every request: it demands a member that has a leader, and carries the user's token.

The token is sent as plain metadata, as etcd's own client does. gRPC's call credentials do not work without TLS.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvmsupervisor.adapters.etcd.api import Denied
from kvmsupervisor.adapters.etcd.channel import Endpoint
from kvmsupervisor.adapters.etcd.config import EtcdConfig, read_secret
from kvmsupervisor.adapters.etcd.errors import AttemptFailed, judge
from kvmsupervisor.adapters.etcd.protocol import grpc, rpc

Metadata = tuple[tuple[str, str], ...]

HAS_LEADER = ("hasleader", "true")
"""Makes a member that is cut off from its peers answer with an error instead of waiting (etcd's API guide)."""


class Auth:
    """The token in use. It is renewed when etcd refuses it, with one request for a token at a time."""

    def __init__(self, config: EtcdConfig) -> None:
        self._username = config.username
        self._password_file = config.password_file
        self._metadata: Metadata | None = None
        self._lock = asyncio.Lock()

    @property
    def known(self) -> Metadata | None:
        """The metadata to send; None before a log-in, and once etcd has refused the token."""
        return self._metadata

    async def metadata(self, endpoint: Endpoint, *, timeout_s: float) -> Metadata:
        """Return the metadata to send; log in at `endpoint` first if there is no token.

        Raises:
            Denied: wrong user or password, or the password file cannot be read.
            AttemptFailed: the endpoint did not answer; nothing was done.
        """
        async with self._lock:
            if self._metadata is None:
                self._metadata = await self._log_in(endpoint, timeout_s)
            return self._metadata

    def forget(self, refused: Metadata) -> None:
        """Log in again before the next request, unless `refused` was replaced already.

        Raises:
            Denied: there is no user to log in as.
        """
        if self._username is None:
            raise Denied("etcd wants a user and a password, and none is configured")
        if self._metadata == refused:
            self._metadata = None

    def renewable(self, metadata: Metadata) -> bool:
        """Whether `metadata` contains a token, which may be the cause of a refusal."""
        return len(metadata) > 1

    async def _log_in(self, endpoint: Endpoint, timeout_s: float) -> Metadata:
        if self._username is None or self._password_file is None:
            return (HAS_LEADER,)
        password = await asyncio.to_thread(_read_password, self._password_file)
        request = rpc.AuthenticateRequest(name=self._username, password=password)
        try:
            reply = await endpoint.auth.Authenticate(request, metadata=(HAS_LEADER,), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.details() == "etcdserver: authentication is not enabled":
                return (HAS_LEADER,)
            failure = judge(error, f"logging in as {self._username!r}")
            if isinstance(failure, AttemptFailed):
                failure = AttemptFailed(f"logging in: {failure.reason}", done_maybe=False)
            raise failure from error
        return (HAS_LEADER, ("token", reply.token))


def _read_password(path: Path) -> str:
    text = read_secret(path, "etcd password file").decode(errors="surrogateescape")
    return text.splitlines()[0] if text else ""

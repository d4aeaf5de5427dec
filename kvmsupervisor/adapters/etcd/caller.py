"""Carries out one call, with several endpoints, a deadline, and a token that may expire."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from kvmsupervisor.adapters.etcd.api import Ambiguous, Denied, EtcdError, Unavailable, Unreachable
from kvmsupervisor.adapters.etcd.auth import Auth, Metadata
from kvmsupervisor.adapters.etcd.channel import Endpoint, Endpoints, speaks_tls
from kvmsupervisor.adapters.etcd.config import EtcdConfig
from kvmsupervisor.adapters.etcd.errors import AttemptFailed, ReplyTooLarge, TokenRefused, judge
from kvmsupervisor.adapters.etcd.protocol import grpc, rpc
from kvmsupervisor.aio import StrayCancellation, no_stray_cancellation
from kvmsupervisor.domain.durations import Durations

Reply = TypeVar("Reply")

Request = Callable[[Endpoint, Metadata, float], Awaitable[Reply]]
"""Sends one request to an endpoint, with metadata and a time limit in seconds."""

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.4
"""Pauses after every endpoint has failed once: short compared with an election (1 s), long compared with a request."""

_CLOSED = "the etcd client is closed"
_GIVEN_UP = "gRPC gave the call up"


class Caller:
    """Carries out calls. Everything that talks to one etcd shares it.

    Attributes:
        endpoints: the members.
        auth: the token.
        closed: whether `close` was called.
        up: whether the last request of a call or a watch was answered (a refusal is an answer).
        durations: of calls.
        renewed_every_s: see `EtcdConfig`.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self.renewed_every_s = config.renewed_every_s
        self.closed = False
        self.endpoints = Endpoints(config)
        self.auth = Auth(config)
        self.up = False
        self.durations = Durations()
        # Whether any endpoint has ever answered.
        self._met = False

    async def call(
        self, what: str, request: Request[Reply], *, timeout_s: float | None = None, repeatable: bool
    ) -> Reply:
        """Send a request to one endpoint after the other until one answers.

        Args:
            what: the request's name in messages, such as `put /kvm/1/host`.
            request: sends the request.
            timeout_s: deadline of the whole call; None for the configured one.
            repeatable: whether the request may be carried out twice without harm.

        Raises:
            Ambiguous: the request is not repeatable, and may or may not have been carried out.
            Unavailable: no endpoint answered by the deadline; the message has the error of each.
            Unreachable: no endpoint can be connected to, and the configuration is impatient.
            EtcdError: any other final answer.
            ReplyTooLarge: the answer is larger than this client accepts.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            reply = await self._call(what, request, timeout_s=timeout_s, repeatable=repeatable)
        except (EtcdError, ReplyTooLarge) as error:
            self.durations.took(loop.time() - begun, failed=isinstance(error, Unavailable))
            raise
        self.durations.took(loop.time() - begun)
        return reply

    async def _call(self, what: str, request: Request[Reply], *, timeout_s: float | None, repeatable: bool) -> Reply:
        timeout_s = self._config.call_timeout_s if timeout_s is None else timeout_s
        progress = _Progress(what, asyncio.get_running_loop().time() + timeout_s, _FIRST_PAUSE_S)
        while (left_s := progress.left_s()) > 0 and not self.closed:
            endpoint = self.endpoints.current
            try:
                reply = await self._attempt(endpoint, what, request, min(left_s, self._config.attempt_timeout_s))
            except AttemptFailed as failure:
                self.up = False
                if failure.done_maybe and not repeatable:
                    self.endpoints.leave(endpoint)
                    raise Ambiguous(
                        f"{what}: it is unknown whether etcd did it: {endpoint.url}: {failure.reason}"
                    ) from failure
                progress.failed[endpoint.url] = failure
                await self._try_elsewhere(endpoint, progress)
            except TokenRefused as refusal:
                # Try the same endpoint with a fresh token. An endpoint that refuses that one, too, lags.
                if progress.relogged_in:
                    progress.failed[endpoint.url] = AttemptFailed(str(refusal), done_maybe=False)
                    await self._try_elsewhere(endpoint, progress)
                progress.relogged_in = True
            except (EtcdError, ReplyTooLarge):
                self.up = self._met = True
                raise
            else:
                self.up = self._met = True
                return reply
        self.up = False
        raise Unavailable(_CLOSED if self.closed else progress.gave_up(timeout_s))

    async def open(self, endpoint: Endpoint, timeout_s: float | None = None) -> Metadata:
        """Connect to an endpoint and get a token; nothing but the log-in is sent.

        Raises:
            AttemptFailed: no connection, or no token, within `timeout_s` (None: the configured limit).
            Denied: wrong user or password.
        """
        if endpoint.connected and (known := self.auth.known) is not None:
            # As at nearly every request: nothing is waited for, so no time limit is needed.
            return known
        timeout_s = self._config.attempt_timeout_s if timeout_s is None else timeout_s
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            with no_stray_cancellation():
                async with asyncio.timeout_at(deadline):
                    await endpoint.connect()
                    return await self.auth.metadata(endpoint, timeout_s=deadline - loop.time())
        except StrayCancellation as error:
            raise self._gave_up(done_maybe=False) from error
        except TimeoutError as error:
            raise AttemptFailed("no connection in time", done_maybe=False, connected=False) from error

    async def revision(self) -> int:
        """Return the store's revision, confirmed by a quorum.

        Raises:
            Unavailable: no quorum within the configured deadline.
        """

        async def ask(endpoint: Endpoint, metadata: Metadata, timeout_s: float) -> int:
            # The cheapest linearizable read: a count of one key, which does not exist.
            request = rpc.RangeRequest(key=b"\0", count_only=True)
            reply = await endpoint.kv.Range(request, metadata=metadata, timeout=timeout_s)
            return int(reply.header.revision)

        return await self.call("read the revision", ask, repeatable=True)

    async def close(self) -> None:
        """Close all channels; calls in flight end with `Unavailable`."""
        self.closed = True
        await self.endpoints.close()

    async def _attempt(self, endpoint: Endpoint, what: str, request: Request[Reply], timeout_s: float) -> Reply:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        metadata = await self.open(endpoint, timeout_s)
        if self.closed:
            raise AttemptFailed(_CLOSED, done_maybe=False)
        try:
            with no_stray_cancellation():
                reply = await request(endpoint, metadata, deadline - loop.time())
                endpoint.answered_at = loop.time()
                return reply
        except StrayCancellation as error:
            raise self._gave_up(done_maybe=True) from error
        except grpc.aio.AioRpcError as error:
            failure = judge(error, what)
            if isinstance(failure, TokenRefused):
                self.auth.forget(metadata)
            raise failure from error

    def _gave_up(self, *, done_maybe: bool) -> AttemptFailed:
        """What a cancellation that nobody requested comes to.

        gRPC raises one when the channel was closed, or when a stream could not be written to.
        """
        return AttemptFailed(_CLOSED if self.closed else _GIVEN_UP, done_maybe=done_maybe)

    async def _try_elsewhere(self, endpoint: Endpoint, progress: _Progress) -> None:
        self.endpoints.leave(endpoint)
        progress.attempts += 1
        if self._config.impatient and not self._met and progress.nobody_connects(len(self.endpoints)):
            raise Unreachable(await _causes(progress.failed))
        if len(progress.failed) == len(self.endpoints) and all(
            failure.permanent for failure in progress.failed.values()
        ):
            raise Denied(f"{progress.what}: {progress.said()}")
        if progress.attempts % len(self.endpoints) == 0:
            await asyncio.sleep(min(progress.pause_s, max(progress.left_s(), 0)))
            progress.pause_s = min(2 * progress.pause_s, _LONGEST_PAUSE_S)


async def _causes(failed: Mapping[str, AttemptFailed]) -> dict[str, str]:
    """What is wrong with each endpoint. A TLS server tells a client without TLS nothing, so this tries TLS."""

    async def cause(url: str, failure: AttemptFailed) -> str:
        if await speaks_tls(url):
            return "what answers there speaks TLS: write https:// and not http://"
        return failure.reason

    return dict(zip(failed, await asyncio.gather(*(cause(*one) for one in failed.items())), strict=True))


class _Progress:
    """The progress of one call."""

    def __init__(self, what: str, deadline: float, pause_s: float) -> None:
        self.what = what
        self.deadline = deadline
        self.pause_s = pause_s
        self.attempts = 0
        self.relogged_in = False
        self.failed: dict[str, AttemptFailed] = {}

    def left_s(self) -> float:
        return self.deadline - asyncio.get_running_loop().time()

    def nobody_connects(self, endpoints: int) -> bool:
        """Whether all `endpoints` were tried, and none could be connected to."""
        return len(self.failed) == endpoints and not any(failure.connected for failure in self.failed.values())

    def said(self) -> str:
        return "; ".join(f"{url}: {failure.reason}" for url, failure in self.failed.items())

    def gave_up(self, timeout_s: float) -> str:
        return f"{self.what}: etcd did not answer within {timeout_s:g} s: {self.said() or 'nothing was tried'}"

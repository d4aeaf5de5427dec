"""The channels to the members, and which of them is in use.

There is one gRPC channel per endpoint. So TLS checks each member against its own name, and a member that answers pings
but not calls can be left; gRPC itself would never leave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any

from kvmsupervisor.adapters.etcd.config import EtcdConfig, read_secret, split_endpoint
from kvmsupervisor.adapters.etcd.errors import AttemptFailed, no_connection
from kvmsupervisor.adapters.etcd.protocol import grpc, rpc, stubs

_OPTIONS = (
    # Pings alone notice a dead connection after 14 s (calls and watches notice it sooner). etcd closes a connection
    # that pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    # This option, not the one above, limits the wait for a ping's answer; its default is a minute.
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A member that is back should be used soon. There are few clients, so they need not spread their attempts.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # One reply may have 10,000 keys, which can exceed the default of 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
    # This adapter decides what is sent twice.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Two clients in one process must not share a connection; otherwise they would share its timeouts.
    ("grpc.use_local_subchannel_pool", 1),
)


TLS_ANSWER_S = 0.5
"""How long a port may take to answer a TLS handshake. Arbitrary: three times a slow link's time, while a person
waits."""


class Endpoint:
    """One member: its channel, its stubs, and when it last answered a call."""

    def __init__(self, url: str, channel: Any) -> None:
        self.url = url
        self.kv = stubs.KVStub(channel)
        self.lease = stubs.LeaseStub(channel)
        self.watch = stubs.WatchStub(channel)
        self.auth = stubs.AuthStub(channel)
        self._maintenance = stubs.MaintenanceStub(channel)
        self._channel = channel
        # When a call was last answered, by asyncio's clock; minus infinity before the first answer.
        self.answered_at = float("-inf")

    @property
    def connected(self) -> bool:
        """Whether the channel is connected now."""
        state = self._channel.get_state(try_to_connect=True)
        return bool(state is grpc.ChannelConnectivity.READY)

    async def connect(self) -> None:
        """Wait until the channel is connected; has no time limit of its own.

        Only a request that is sent after this can have been carried out.

        Raises:
            AttemptFailed: connecting failed; nothing was sent.
        """
        while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise no_connection(await self._why_not())
            if state is grpc.ChannelConnectivity.SHUTDOWN:
                raise AttemptFailed("the etcd client is closed", done_maybe=False)
            await self._channel.wait_for_state_change(state)

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        await self._channel.close()

    async def _why_not(self) -> str:
        # gRPC tells the cause only as the answer to a request. A status request does no harm, and fails at once.
        try:
            await self._maintenance.Status(rpc.StatusRequest(), timeout=0.5)
        except grpc.aio.AioRpcError as error:
            said = str(error.details() or error.code().name)
            return said.removeprefix("failed to connect to all addresses; last error: ")
        return "the connection was lost"


class Endpoints:
    """All members; every call and watch uses the same one.

    Invariant: `current` changes only by `leave`, which calls all callbacks for the endpoint (see `on_left`). So no
    watch stays with a member that calls have left.
    """

    def __init__(self, config: EtcdConfig) -> None:
        credentials = _credentials(config)
        self._all = [Endpoint(url, _channel(url, credentials)) for url in dict.fromkeys(config.endpoints)]
        self._index = 0
        self._users: dict[Endpoint, set[Callable[[], object]]] = {endpoint: set() for endpoint in self._all}

    @property
    def current(self) -> Endpoint:
        """The endpoint in use."""
        return self._all[self._index]

    def __len__(self) -> int:
        return len(self._all)

    def leave(self, endpoint: Endpoint) -> None:
        """Use the next endpoint from now on, unless that has happened already; call the callbacks for this one."""
        if self.current is endpoint:
            self._index = (self._index + 1) % len(self._all)
            for tell in list(self._users[endpoint]):
                tell()

    def on_left(self, endpoint: Endpoint, tell: Callable[[], object]) -> Callable[[], None]:
        """Call `tell` when `endpoint` is left; return a function that ends this."""
        self._users[endpoint].add(tell)
        return lambda: self._users[endpoint].discard(tell)

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(endpoint.close() for endpoint in self._all))


async def speaks_tls(url: str) -> bool:
    """Whether the server at an http endpoint speaks TLS; false for an https endpoint."""
    target, secure = split_endpoint(url)
    if secure:
        return False
    host, _, port = target.rpartition(":")
    # Nothing is sent to the server and nothing from it is used, so its identity does not matter.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(TLS_ANSWER_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    except ssl.SSLError as error:
        # An error about certificates, for example, means TLS, too. These three reasons mean that it is not TLS.
        return error.reason not in {"WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING", "HTTP_REQUEST"}
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()
    return True


def _channel(url: str, credentials: Any) -> Any:
    target, secure = split_endpoint(url)
    if secure:
        return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
    return grpc.aio.insecure_channel(target, options=_OPTIONS)


def _credentials(config: EtcdConfig) -> Any:
    """Read the certificates, if any endpoint needs them; otherwise None."""
    if not any(split_endpoint(url)[1] for url in config.endpoints):
        return None
    cacert = read_secret(config.cacert, "CA certificate") if config.cacert else None
    cert = read_secret(config.cert, "client certificate") if config.cert else None
    key = read_secret(config.key, "client key") if config.key else None
    return grpc.ssl_channel_credentials(cacert, key, cert)

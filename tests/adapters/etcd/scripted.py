"""A member of etcd that says what a test tells it to: for what a healthy server cannot be made to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kvmsupervisor.adapters.etcd.protocol import mvcc, rpc, stubs

Script = Callable[["Stream"], Awaitable[None]]


class Stream:
    """One watch stream as the server sees it.

    Attributes:
        start_revision: what the client asked for.
    """

    def __init__(self, requests: AsyncIterator[Any], context: Any) -> None:
        self.start_revision = 0
        self._requests = requests
        self._context = context

    async def accept(self, *, revision: int = 1, cluster_id: int = 1) -> None:
        """Take the client's request to create a watch, and say yes."""
        await self.take()
        header = rpc.ResponseHeader(revision=revision, cluster_id=cluster_id)
        await self.send(header=header, created=True)

    async def take(self) -> Any:
        """Take the client's next request."""
        request = await anext(self._requests)
        if request.HasField("create_request"):
            self.start_revision = request.create_request.start_revision
        return request

    async def send(self, **fields: Any) -> None:
        """Send one `WatchResponse`."""
        await self._context.write(rpc.WatchResponse(**fields))

    async def send_puts(self, *revisions: int, fragment: bool = False) -> None:
        """Send one put per revision given; the value is its place in the message."""
        events = [
            mvcc.Event(kv=mvcc.KeyValue(key=b"/k", value=str(place).encode(), mod_revision=revision))
            for place, revision in enumerate(revisions)
        ]
        await self.send(events=events, fragment=fragment)

    async def silence(self) -> None:
        """Say nothing more."""
        await asyncio.Event().wait()


class ScriptedEtcd:
    """Serves watches, each by the next script, and says which revision the store is at.

    Attributes:
        url: for clients.
        revision: what a linearizable read shows.
        mute: whether reads get no answer.
        served: how many watches there were.
        logins: how many tokens were given out.
    """

    def __init__(self, *scripts: Script) -> None:
        self.url = ""
        self.revision = 1
        self.mute = False
        self.served = 0
        self.logins = 0
        self._scripts = iter(scripts)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedEtcd]:
        """Serve, until the end of the block."""
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        stubs.add_WatchServicer_to_server(self, server)
        stubs.add_KVServicer_to_server(_Calls(self), server)
        stubs.add_AuthServicer_to_server(_Calls(self), server)
        self.url = f"http://127.0.0.1:{port}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)

    async def Watch(self, requests: AsyncIterator[Any], context: Any) -> None:  # noqa: N802 - gRPC's name
        self.served += 1
        script = next(self._scripts, Stream.silence)
        await script(Stream(requests, context))


class _Calls:
    """The calls of the KV and Auth services that are made."""

    def __init__(self, etcd: ScriptedEtcd) -> None:
        self._etcd = etcd

    def __getattr__(self, name: str) -> Any:
        # gRPC wants a handler for every method of a service.
        return self._refuse

    async def Range(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        if self._etcd.mute:
            await asyncio.Event().wait()
        return rpc.RangeResponse(header=rpc.ResponseHeader(revision=self._etcd.revision))

    async def Authenticate(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self._etcd.logins += 1
        return rpc.AuthenticateResponse(token=f"token {self._etcd.logins}")

    async def _refuse(self, request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not scripted")

"""`kvmsupervisor web` as a process of its own, and what it answers."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import signal
import ssl
from collections.abc import Iterator
from typing import Any, Self

from tests.support import fork_server
from tests.support.cluster import DEADLINE_S, ROOT, Host, Keys, eventually

_NUMBERS = itertools.count()


class Page:
    """`kvmsupervisor web`, in a process of its own."""

    def __init__(self, keys: Keys, host: Host, **settings: str) -> None:
        # Not `id(self)`, which a later page may have, too.
        self._log = host.folder / f"web{next(_NUMBERS)}.log"
        environment = host.environment | {"KVM_WEB_LISTEN": "127.0.0.1:0", "ETCD_ENDPOINTS": keys.etcd.endpoints[0]}
        with self._log.open("ab") as log:
            self._process = fork_server.start(("web",), env=environment | settings, cwd=ROOT, output=log.fileno())
        self.pid = self._process.pid
        self.tls: ssl.SSLContext | None = None
        """How to talk to it; None for plain HTTP."""
        self.headers: dict[str, str] = {}
        """Sent with each request."""
        self.port: int = eventually("the page's port", self._listening)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            assert self.end() == 0, self._log.read_text()

    @property
    def url(self) -> str:
        """Of the list, without a slash at its end."""
        return f"http{'' if self.tls is None else 's'}://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_S)

    def end(self) -> int:
        """SIGTERM; return the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(DEADLINE_S)

    def _listening(self) -> int | None:
        assert self._process.poll() is None, self._log.read_text()
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                if (said := json.loads(line))["event"] == "web.listening":
                    return int(said["port"])
        return None

    def connect(self) -> http.client.HTTPConnection:
        """A new connection."""
        if self.tls is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=DEADLINE_S, context=self.tls)

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask for a path."""
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        """Ask for a path with further headers; a body is sent as JSON."""
        named = {name.replace("_", "-"): value for name, value in {**self.headers, **headers}.items()}
        kind = {} if body is None else {"Content-Type": "application/json"}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), named | kind)
            reply = connection.getresponse()
            return reply.status, reply.read()

    def act(self, act: str, *instances: str, **more: object) -> tuple[int, list[dict[str, Any]]]:
        """Do something; return the status, and the result of each."""
        status, body = self.ask("POST", "/api/v1/acts", {"act": act, "instances": instances, **more})
        found = json.loads(body)
        assert "results" in found, found
        return status, found["results"]

    def json(self, path: str) -> Any:
        """The same for JSON."""
        status, body = self.get(path)
        assert status == http.client.OK, body
        return json.loads(body)

    def in_step(self) -> None:
        """Wait until it shows what etcd has."""
        eventually("a page in step", lambda: self.get("/readyz")[0] == http.client.OK)

    def instances(self) -> dict[str, Any]:
        """All that it shows, by id."""
        return {one["id"]: one for one in self.json("/api/v1/instances")}

    @contextlib.contextmanager
    def stream(self, since: str = "") -> Iterator[Events]:
        """Open a stream."""
        named = self.headers | ({"Last-Event-ID": since} if since else {})
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/api/v1/stream", headers=named)
            yield Events(connection.getresponse())


class Events:
    """What comes over a stream."""

    def __init__(self, reply: http.client.HTTPResponse) -> None:
        assert reply.status == http.client.OK
        self._reply = reply
        self.mark = ""

    def next(self) -> tuple[str, Any]:
        """The next event: its name and data."""
        fields: dict[str, str] = {}
        while line := self._reply.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            fields[name] = value
        if "data" not in fields:
            return self.next()
        self.mark = fields.get("id", self.mark)
        return fields["event"], json.loads(fields["data"])

    def until(self, kind: str) -> Any:
        """The data of the next event of a kind."""
        while True:
            found, data = self.next()
            if found == kind:
                return data

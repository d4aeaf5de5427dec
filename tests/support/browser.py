"""A real browser: headless Chromium, told what to do over WebDriver (W3C) and its own protocol (CDP).

A client of our own, of the dozen calls that are needed: Selenium would be a hundred times as much, and its manager
looks for drivers in the network. Chromium runs as whoever runs the tests, with a profile of its own, and is told to
ask nobody for anything.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.cluster import eventually
from tests.support.etcd import free_port

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

DEADLINE_S = 60.0
"""For one call. A page is loaded in a moment; a busy machine may need longer."""

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
"""Keys as WebDriver names them."""


class NoBrowser(AssertionError):
    """Chromium or its driver is not installed: a failure, never a skip."""


def program(name: str) -> str:
    """The path of a program."""
    found = shutil.which(name)
    if found is None:
        raise NoBrowser(f"{name} is missing: `tools/install-system browser` installs it")
    return found


class Browser:
    """One window.

    Args:
        port: of the driver.
        profile: folder of the browser's own files.
    """

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        self._session = ""
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": program("chromium")}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self._session = f"/session/{self._call('POST', '/session', {'capabilities': wanted})['sessionId']}"

    def open(self, url: str) -> None:
        """Load a page."""
        self._do("url", {"url": url})

    def run(self, script: str, *args: object) -> Any:
        """Run JavaScript in the page, also where its scripts are switched off; return what it returns."""
        return self._do("execute/sync", {"script": script, "args": args})

    def until(self, what: str, script: str, *args: object) -> Any:
        """Wait until a script returns something that counts as true; return that."""
        return eventually(what, lambda: self.run(script, *args), DEADLINE_S)

    def type(self, keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        acts = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._do("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": acts}]})

    def cdp(self, command: str, **params: object) -> Any:
        """Use Chromium's own protocol."""
        return self._do("goog/cdp/execute", {"cmd": command, "params": params})

    def size(self, width: int, height: int) -> None:
        """Make the page that large, in CSS pixels."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, *, on: bool) -> None:
        """Say that the person wants it dark, or light."""
        found = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=found)

    def scripts(self, *, on: bool) -> None:
        """Switch the pages' scripts on or off."""
        self.cdp("Emulation.setScriptExecutionDisabled", value=not on)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self._do("screenshot")))

    def requested(self) -> list[str]:
        """The URLs that were asked for since the last call, by whatever part of the pages."""
        messages = [json.loads(one["message"])["message"] for one in self._do("se/log", {"type": "performance"})]
        sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        sockets = [one["params"]["url"] for one in messages if one["method"] == "Network.webSocketCreated"]
        return [*sent, *sockets]

    def complaints(self) -> list[str]:
        """What the browser's console says since the last call: errors of scripts, and of the policy."""
        return [f"{one['level']}: {one['message']}" for one in self._do("se/log", {"type": "browser"})]

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._call("DELETE", self._session)

    def _do(self, name: str, body: object = None) -> Any:
        return self._call("GET" if body is None else "POST", f"{self._session}/{name}", body)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            reply = json.loads(connection.getresponse().read())
        value = reply["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{path}: {value['error']}: {value['message']}")
        return value


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A driver and its browser; both end with it, and leave nothing behind."""
    folder, port = Path(tempfile.mkdtemp(prefix="kvs", dir="/tmp")), free_port()
    try:
        with (folder / "log").open("wb") as log:
            driver = subprocess.Popen([program("chromedriver"), f"--port={port}"], stdout=log, stderr=log)
        try:
            eventually("chromedriver", lambda: _answers(port))
            made = Browser(port, folder / "profile")
            try:
                yield made
            finally:
                made.close()
        finally:
            driver.terminate()
            driver.wait(timeout=30)
    finally:
        # Processes of the browser write while they end.
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/status")
            return bool(json.loads(connection.getresponse().read())["value"]["ready"])
    return False

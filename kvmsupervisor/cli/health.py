"""The image's health check, `python -m kvmsupervisor.cli.health`: asks the supervisor whether its event loop turns.

Exit status 0 is healthy, 1 is not, as Docker's HEALTHCHECK wants it. It is Python because the image has Python; curl
would take 5 MB.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping

from kvmsupervisor.cli.entrypoint import INSTANCE
from kvmsupervisor.config.load import SettingsError, load_settings

TIMEOUT_S = 5.0
"""Half of the time that Docker gives the check; a supervisor whose loop turns answers in milliseconds."""


def check(environ: Mapping[str, str]) -> str | None:
    """The problem, for people; None when there is none."""
    if environ.get(INSTANCE, "").strip():
        # Single mode: the guest lives as long as its container, and there is no HTTP server.
        return None
    try:
        listen = load_settings(environ).listen
    except SettingsError as error:
        return f"the settings cannot be used: {error}"
    if listen is None:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)
    connection = http.client.HTTPConnection(host, listen.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"{listen}: {error}"
    finally:
        connection.close()
    return None if status == http.HTTPStatus.OK else f"{listen}/healthz answers {status}"


def main() -> int:
    """Print the problem, if any, and return the exit status."""
    trouble = check(os.environ)
    print(trouble or "healthy")  # noqa: T201 - Docker keeps the check's output
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())

"""The image's health check: asks this host's supervisor whether its loop turns. `python -m kvmsupervisor.cli.health`.

Exit status 0 is healthy, 1 is not: what Docker's HEALTHCHECK asks for. It uses Python because the image has it: a
curl for this alone would be 5 MB.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping

from kvmsupervisor.cli.entrypoint import INSTANCE
from kvmsupervisor.config.load import SettingsError, load_settings

TIMEOUT_S = 5.0
"""Half of what Docker gives the check; a supervisor that turns answers in milliseconds."""


def check(environ: Mapping[str, str]) -> str | None:
    """What is wrong, for people; None when nothing is."""
    if environ.get(INSTANCE, "").strip():
        # One guest in single mode: it lives as long as its container, and nothing serves HTTP.
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
    """Print what is wrong and return the exit status."""
    trouble = check(os.environ)
    print(trouble or "healthy")  # noqa: T201 - Docker keeps the check's output
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())

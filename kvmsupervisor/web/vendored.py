"""Files of others that browsers get, as npm has them: `vendor/manifest.json` names each, with its licence and digest.

`tools/vendor` writes the folder. A file's path holds its package's version, so browsers may keep it for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kvmsupervisor.adapters.web import Reply

FOLDER = Path(__file__).with_name("vendor")
PREFIX = "/static/vendor/"

TYPES: Mapping[str, str] = {
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
"""By suffix; licences are plain text."""


@cache
def manifest() -> Any:
    """What the folder holds."""
    return json.loads((FOLDER / "manifest.json").read_bytes())


@cache
def files() -> frozenset[str]:
    """The paths in the folder that may be asked for."""
    return frozenset(f"{one['folder']}/{path}" for one in manifest()["packages"] for path in one["files"])


def path_of(name: str) -> str:
    """Where browsers find the file of that name."""
    (found,) = (path for path in files() if path.rpartition("/")[2] == name)
    return PREFIX + found


def vendored(path: str) -> Reply | None:
    """A file of the folder; None for any other path."""
    if path not in files():
        return None
    return Reply(
        status=HTTPStatus.OK,
        body=(FOLDER / path).read_bytes(),
        content_type=TYPES.get(Path(path).suffix, "text/plain; charset=utf-8"),
        headers={"Cache-Control": "private, max-age=31536000, immutable"},
    )

"""The JSON schema of files of wishes, for editors that complete and check YAML.

It knows the names of keys, and the values of those that have few. `apply` checks the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmsupervisor.cli.common import VALUES
from kvmsupervisor.cli.wish_files.reading import IMAGES, TEMPLATE
from kvmsupervisor.domain.keys import ID_PATTERN
from kvmsupervisor.domain.names import FREE_KEY, FREE_KEY_PREFIX, WISH_KEYS
from kvmsupervisor.domain.parse_keys import ALL_NUMBERED_KEYS

CLOSED = frozenset({"power", "restart", "firmware", "hugepages", "display"})
"""Keys that have no other values than those that are completed."""

_ID = f"^{ID_PATTERN.pattern}$"

# A reader of YAML may take text for something else; `apply` takes it for text.
_TEXT: Mapping[str, Any] = {"type": ["string", "number", "boolean"]}


def schema() -> dict[str, Any]:
    """The schema, as a JSON object."""
    keys = dict.fromkeys((*WISH_KEYS, *ALL_NUMBERED_KEYS, FREE_KEY), _TEXT)
    # `on` and `off` are truths to readers of YAML 1.1.
    keys |= {name: {"anyOf": [{"enum": list(VALUES[name])}, {"type": "boolean"}]} for name in sorted(CLOSED)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Instances of kvmsupervisor",
        "type": "object",
        "properties": {IMAGES: {"type": "object", "additionalProperties": _TEXT}},
        "patternProperties": {
            _ID: {
                "type": "object",
                "properties": keys,
                "patternProperties": {f"^{FREE_KEY_PREFIX}": _TEXT},
                "additionalProperties": False,
            },
            f"^\\{TEMPLATE}": True,
        },
        "additionalProperties": False,
    }

"""Why an act is not done."""

from __future__ import annotations


class Refused(Exception):
    """The keys, or what is observed, do not allow it. The message is for people, and may have several lines."""

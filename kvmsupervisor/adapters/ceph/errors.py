"""How a call of Ceph's tools fails, by what its caller does next."""

from __future__ import annotations

from kvmsupervisor.domain.ceph import Trouble


class CephError(Exception):
    """The call failed. The subclasses say what to do next; the message is for people."""


class CephAway(CephError):
    """The cluster does not answer: wait and try again."""


class _NoAnswerInTime(CephAway):
    """The tool was killed at its deadline."""


class CephRefused(CephError):
    """The cluster refuses this client, or the settings do not lead to a cluster: an operator has to fix something."""


class NoSuchImage(CephError):
    """The image or its pool does not exist: the wish names the wrong one, or it has not been created yet.

    Attributes:
        kind: what of it is not there.
    """

    def __init__(self, message: str, kind: Trouble = Trouble.NO_IMAGE) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def lacks_place(self) -> bool:
        """Whether its pool, or its namespace, is not there."""
        return self.kind is not Trouble.NO_IMAGE


class CephFailed(CephError):
    """A tool failed in another way, or its output was not understood.

    Attributes:
        is_there: what it was to make is there already.
    """

    def __init__(self, message: str, *, is_there: bool = False) -> None:
        super().__init__(message)
        self.is_there = is_there

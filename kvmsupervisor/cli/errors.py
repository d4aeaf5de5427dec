"""The ways in which a command fails: one class for each exit code of docs/cli.md."""

from __future__ import annotations

import click


class CommandError(click.ClickException):
    """A command did not do what it was asked to do. The message is for people and needs no traceback."""

    exit_code = 1

    def format_message(self) -> str:
        """The message, line by line, without control characters: it may repeat values from etcd."""
        from kvmsupervisor.cli.output import printable  # noqa: PLC0415 - only an error pays for it

        return "\n".join(printable(line) for line in self.message.split("\n"))


class Refused(CommandError):
    """The keys, or the observed state, do not allow the command; or a check found something."""

    exit_code = 1


class EtcdAway(CommandError):
    """No endpoint of etcd answered."""

    exit_code = 3


class TimedOut(CommandError):
    """The wish is written, but was not fulfilled when `--timeout` passed."""

    exit_code = 4


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

"""How a command ends other than by success: one class for each exit code of DESIGN §7."""

from __future__ import annotations

import click


class CommandError(click.ClickException):
    """A command did not do what was asked. Its message is for people and needs no traceback."""

    exit_code = 1

    def format_message(self) -> str:
        """The message, line by line, in which nothing can act on a terminal: it may repeat what stands in etcd."""
        from kvmsupervisor.cli.output import printable  # noqa: PLC0415 - only an error pays for it

        return "\n".join(printable(line) for line in self.message.split("\n"))


class Refused(CommandError):
    """Refused, or not so: the keys, or what is observed, do not allow it."""

    exit_code = 1


class EtcdAway(CommandError):
    """No endpoint of etcd answered."""

    exit_code = 3


class TimedOut(CommandError):
    """The wish is written, but was not a fact when `--timeout` passed."""

    exit_code = 4


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

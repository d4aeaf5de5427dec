"""Words that are no command and no option: what was found, what is wrong with it, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from kvmsupervisor.domain.values import nearest, plain, show

ELSEWHERE: Mapping[str, str] = {
    "ls": "list",
    "ps": "list",
    "get": "show",
    "info": "show",
    "describe": "show",
    "nodes": "hosts",
    "log": "logs",
    "tail": "logs",
    "event": "events",
    "tasks": "events",
    "dominfo": "show",
    "new": "create",
    "launch": "create",
    "define": "create",
    "edit": "set",
    "config": "set",
    "rm": "delete",
    "remove": "delete",
    "undefine": "delete",
    "shutdown": "stop",
    "destroy": "stop --now",
    "reboot": "restart",
    "dumpxml": "argv",
}
"""What other tools (virsh, incus, multipass, qm, kubectl) call these commands. Only told, never run: `destroy` is a
power cut in virsh, and a removal in others."""

OPTIONS_ELSEWHERE: Mapping[str, str] = {
    "--json": "-o json",
    "--format": "-o",
    "--wide": "-o wide",
    "--selector": "-l",
    "--assume-yes": "--yes",
    "--force": "--yes",
    "-f": "--yes",
    "--timeout-s": "--timeout",
}
"""What other tools call these options; told where the command has ours."""


class TellingGroup(click.Group):
    """A group that tells the nearest name for a command, or an option of a command, that does not exist."""

    def names(self) -> Mapping[str, str]:
        """The words for commands (`values.plain` → the command to suggest)."""
        return {plain(name): name for name in self.commands}

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for an unknown word, say which was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchOption:
            raise
        except click.UsageError as error:
            raise click.UsageError(self._no_command(ctx, args[0]), ctx) from error

    def _no_command(self, ctx: click.Context, word: str) -> str:
        names = self.names()
        meant = names.get(plain(word)) or nearest(word, names, cutoff=0.6)
        right = f"`{ctx.command_path} --help` lists them" if meant is None else f"did you mean {meant}?"
        return f"found {show(word)}, which is no command of `{ctx.command_path}`; {right}"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the group's own options; say it of those that it has not."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _no_option(error, ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; of an option that it has not, say which was probably meant."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            raise _no_option(error, ctx) from error


def _no_option(error: click.NoSuchOption, ctx: click.Context) -> click.UsageError:
    where = error.ctx or ctx
    own = [name for parameter in where.command.get_params(where) for name in _names(parameter)]
    word = error.option_name
    known = {plain(name): name for name in own}
    other = OPTIONS_ELSEWHERE.get(word.lower())
    meant = other if other is not None and other.split()[0] in own else nearest(word, known, cutoff=0.6)
    if meant is not None:
        right = f"did you mean {meant}?"
    else:
        right = f"its options are {', '.join(name for name in own if name.startswith('--'))}"
    if isinstance(where.command, click.Group):
        right += "; those of a command stand behind its name"
    return click.UsageError(f"found {show(word)}, which is no option of `{where.command_path}`; {right}", where)


def _names(parameter: click.Parameter) -> Iterable[str]:
    return parameter.opts if isinstance(parameter, click.Option) else ()

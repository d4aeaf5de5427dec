"""The entry point: `kvmsupervisor COMMAND …`.

Commands are imported when they are used, so that `--version`, `--help`, `run` and shell completion pay for
nothing that they do not need.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from kvmsupervisor import __version__
from kvmsupervisor.cli.errors import INTERRUPTED
from kvmsupervisor.cli.unknown import ELSEWHERE, TellingGroup
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.values import plain

PROGRAM = "kvmsupervisor"

NOT_WRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""Errors of a write to standard output when its file cannot grow. click handles a closed pipe: exit code 1, quietly."""


@frozen
class LazyCommand:
    """Where a command is defined, and its line in `--help`, which needs no import."""

    module: str
    attribute: str
    help: str


COMMANDS: Mapping[str, LazyCommand] = {
    "run": LazyCommand("run", "run", "Run this host's supervisor."),
    "demo": LazyCommand("demo.command", "demo", "Try it on this machine: etcd, a supervisor, a guest that boots."),
    "list": LazyCommand("read_commands", "list_command", "List the instances: their hosts, phases and reasons."),
    "show": LazyCommand("read_commands", "show", "Show everything about one instance."),
    "hosts": LazyCommand("hosts_command", "hosts", "List the hosts: their state, what runs there, their memory."),
    "top": LazyCommand("top_command", "top", "Show which instances use processor, memory, disks, network."),
    "events": LazyCommand("events_command", "events", "Tell what happened to instances, and why."),
    "logs": LazyCommand("logs_command", "logs", "Show what supervisor and QEMU said of an instance, on its host."),
    "web": LazyCommand("web_command", "web", "Show the whole cluster on a page, in a process of its own."),
    "create": LazyCommand("write_commands", "create", "Create an instance from its keys."),
    "set": LazyCommand("write_commands", "set_command", "Change keys of an instance."),
    "delete": LazyCommand("write_commands", "delete", "Remove an instance, after its guest was shut down."),
    "start": LazyCommand("write_commands", "start", "Start instances."),
    "stop": LazyCommand("write_commands", "stop", "Shut instances down and keep them off."),
    "restart": LazyCommand("write_commands", "restart", "Shut instances down and start them again."),
    "reset": LazyCommand("write_commands", "reset", "Press the reset button of instances."),
    "drain": LazyCommand("drain_command", "drain", "Have a host empty itself: its machines move to other hosts."),
    "undrain": LazyCommand("drain_command", "undrain", "Take a host into service again."),
    "move": LazyCommand("move_command", "move", "Move an instance to another host, while it runs if it can."),
    "apply": LazyCommand("wish_files.apply_command", "apply", "Make instances as files say: show, ask, write."),
    "export": LazyCommand("wish_files.export_command", "export", "Print instances as a file that `apply` reads."),
    "import": LazyCommand("imports.command", "import_command", "Print a machine of libvirt or Proxmox as such a file."),
    "snapshot": LazyCommand(
        "snapshot_command", "snapshot", "Take, list, delete snapshots of instances, or roll back to one."
    ),
    "clone": LazyCommand("clone_command", "clone_command", "Create an instance with copies of another one's disks."),
    "image": LazyCommand("image_command", "image", "Keep the image library: add, list, remove, fetch."),
    "console": LazyCommand("console.command", "console", "Use an instance's serial console, on its host."),
    "spice": LazyCommand("spice_command", "spice", "Write a file that opens an instance's display."),
    "check": LazyCommand("read_commands", "check", "Find all that is wrong with the keys and the instances."),
    "argv": LazyCommand("read_commands", "argv", "Print the QEMU command line of an instance."),
    "check-config": LazyCommand("config_command", "check_config", "Check and print this host's settings."),
    "confirm-removal": LazyCommand(
        "confirm_removal", "confirm_removal", "Confirm removals, moves and power=off that a host holds."
    ),
    "confirm-identity": LazyCommand(
        "identity_command", "confirm_identity", "Keep this host's guests after its name, prefix or LOCK changed."
    ),
    "break-lock": LazyCommand(
        "break_lock", "break_lock", "Release an instance that a dead host holds and Ceph cannot fence."
    ),
    "remove-host": LazyCommand(
        "remove_host", "remove_host", "Delete what a host that is gone for good has left in etcd."
    ),
    "exec": LazyCommand("exec_command", "exec_command", "Run one QEMU and exit with it (single mode)."),
    "completion": LazyCommand("completion", "completion", "Print the completion script for a shell."),
}


class LazyGroup(TellingGroup):
    """A group whose commands are imported when they are called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table: the daily ones first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command, or None for a name that is none."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(import_module(f"kvmsupervisor.cli.{entry.module}"), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def names(self) -> Mapping[str, str]:
        """Its own words and those of other tools, importing no command."""
        return {**ELSEWHERE, **{plain(name): name for name in COMMANDS}}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Complete a command's name from the table, importing none."""
        # Imported here: click loads it only while a shell asks.
        from click.shell_completion import CompletionItem  # noqa: PLC0415

        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=entry.help) for name, entry in COMMANDS.items() if name.startswith(incomplete)
        ]


@click.group(
    PROGRAM,
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings come from the environment, then from /etc/kvmsupervisor/kvmsupervisor.toml: see check-config. "
    "Exit codes: 0 done; 1 refused, or a problem was found; 2 usage; 3 etcd unreachable; 4 timed out waiting.",
)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Run virtual machines from etcd keys: QEMU/KVM, one supervisor per host, no control plane."""


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        result = cli.main(prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None or error.errno not in NOT_WRITTEN:
            raise
        # Python writes the rest of its buffer at the end of the process: to /dev/null, or that would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
        sys.exit(1)
    except click.Abort as error:
        # Ctrl-C, or the end of input at a question. click has ended the line, except at a question.
        if error.__cause__ is None:
            click.echo(err=True)
        sys.exit(INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)

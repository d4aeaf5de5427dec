"""`import`: prints a machine of another system as a file that `apply` reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import click

from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.imports import libvirt, proxmox
from kvmsupervisor.cli.imports.found import Machine, NotThat
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cli.value_files import STDIN
from kvmsupervisor.cli.wish_files.difference import in_order
from kvmsupervisor.cli.wish_files.reading import written
from kvmsupervisor.cluster.acts import mac_auto
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.spec import RawValue

MOST_BYTES = 4 << 20
"""Of one file. Arbitrary: a hundred times what a machine takes."""


class PoolType(click.ParamType):  # type: ignore[type-arg]
    """`STORAGE=POOL`, as a pair."""

    name = "storage=pool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split it; a storage alone is a pool of that name."""
        if isinstance(value, tuple):
            return value
        storage, equals, pool = str(value).partition("=")
        if not storage or (equals and not pool):
            self.fail(f"{value!r} is no STORAGE=POOL, such as ceph-vm=rbd", param, ctx)
        return storage, pool or storage


@click.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--host", help="The host that shall run it; without it nothing runs it yet.")
@click.option("--ceph", type=PoolType(), multiple=True, metavar="STORAGE[=POOL]",
              help="A storage of Proxmox VE that is a pool of Ceph: its images are used as they are.")  # fmt: skip
def import_command(files: Sequence[str], host: str | None, ceph: Sequence[tuple[str, str]]) -> None:
    """Print a machine of libvirt or Proxmox VE as a file for `apply`, and what is not brought over as comments.

    FILE is what `virsh dumpxml` prints, or /etc/pve/qemu-server/<vmid>.conf; - is standard input. No key is written,
    and no disk is copied: the comments say which, and how. Shut the machine down there before it starts here.

    Example: kvmsupervisor import 100.conf --ceph ceph-vm=rbd --host alpha >web1.yaml
    """
    found = [(file, one) for file in files for one in _read(file, dict(ceph))]
    ids = [one.id for _, one in found]
    for file, one in found:
        if ids.count(one.id) > 1:
            note(f"{file}: another machine is called {one.id}, too: give them ids of their own")
        if host is not None:
            one.keys["host"] = host
        click.echo(_page(file, one))


def _read(file: str, ceph: dict[str, str]) -> list[Machine]:
    said = "standard input" if file == STDIN else file
    try:
        if file == STDIN:
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise Refused(f"{said} cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise Refused(f"{said} has more than {MOST_BYTES >> 20} MiB: it describes no machine")
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip().startswith("<"):
            return libvirt.read(text)
        return [proxmox.read(text, ceph=ceph, vmid=PurePath(file).stem)]
    except UnicodeDecodeError as error:
        raise Refused(f"{said} is no text (not UTF-8 at byte {error.start})") from error
    except NotThat as error:
        raise Refused(f"{said} cannot be used: {error}") from error


def _page(file: str, machine: Machine) -> str:
    """The part of a file, behind comments on what is not in it."""
    # An address that `apply` chooses is a sound one.
    keys = {key: mac_auto.unused(()) if mac_auto.asks(key, text) else text for key, text in machine.keys.items()}
    wish = parse_wish(InstanceId(machine.id), {key.encode(): RawValue(text.encode(), 0) for key, text in keys.items()})
    lines = [f"# {printable(PurePath(file).name)}"]
    problems = [str(problem) for problem in wish.problems]
    for title, said in (("has to be mended", problems), ("not brought over", machine.left)):
        lines += [f"# {title}:", *(f"#   {printable(one)}" for one in said)] if said else []
    return "\n".join([*lines, written(machine.id, sorted(machine.keys.items(), key=lambda pair: in_order(pair[0])))])

"""`spice`: writes the file with which remote-viewer opens an instance's display.

Source: remote-viewer(1), "CONNECTION FILE"; the syntax is that of GLib's key files (docs.gtk.org, "GKeyFile").
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.common import INSTANCE, Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import note, printable
from kvmsupervisor.cluster.overview import Cluster, Instance, read_instance, shown
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.spec import RawValue
from kvmsupervisor.domain.status import Phase


@frozen(kw_only=True)
class Display:
    """An instance's SPICE server.

    Attributes:
        instance: of the server.
        host: that runs the instance.
        address: on which it listens.
        port: on which it listens.
        password: that a viewer needs; None for none.
    """

    instance: InstanceId
    host: str
    address: str
    port: int
    password: str | None

    @property
    def is_local(self) -> bool:
        """Whether it can be reached from its own host only."""
        return self.address == "localhost" or _is(self.address, "is_loopback")

    @property
    def is_everywhere(self) -> bool:
        """Whether it listens on all addresses of its host."""
        return _is(self.address, "is_unspecified")


def _is(address: str, kind: str) -> bool:
    try:
        return bool(getattr(ip_address(address), kind))
    except ValueError:
        return False


@click.command()
@click.argument("instance", type=INSTANCE, metavar="ID")
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to FILE, which only you can read, instead of standard output.",
)
@pass_tools
def spice(tools: Tools, instance: InstanceId, file: Path | None) -> None:
    """Write a .vv file, with which remote-viewer opens the display of ID.

    `kvmsupervisor spice ID | remote-viewer -` opens the display at once. A file of `-o ID.vv` is for double-clicking;
    remote-viewer deletes it once it has read it. A display on a loopback address needs a tunnel from another machine:
    standard error has the command for that.
    """

    async def work(store: Store, settings: Settings) -> tuple[Instance, Cluster, Settings]:
        return *await read_instance(store, settings.layout, instance), settings

    found, cluster, settings = with_store(tools, work)
    if instance not in cluster.instances:
        raise Refused(f"there is no instance {instance}")
    display = display_of(found, cluster, settings)
    address, notes = way_to(display, cluster, here=settings.hostname)
    text = connection_file(display, address)
    if file is None:
        click.echo(text, nl=False)
    else:
        _write(file, text)
    for line in (*_doubts(found, cluster), *notes):
        note(line)


def display_of(instance: Instance, cluster: Cluster, settings: Settings) -> Display:
    """The instance's display, as its keys say.

    Raises:
        Refused: the instance has none, or a bad value in its keys.
    """
    port = _value(instance.keys, b"spice_port")
    if port is None:
        here = "`kvmsupervisor web` shows its display in a browser; " if _value(instance.keys, b"display") else ""
        raise Refused(
            f"{instance.id} has no SPICE display: its key spice_port is missing; {here}`console` is its serial one"
        )
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise Refused(f"{instance.id} has no display: spice_port is {printable(port)!r}, not a port from 1 to 65535")
    host = shown(instance, cluster).host
    if host is None:
        raise Refused(f"{instance.id} has a spice_port, but no host: no host runs it until `host` is set")
    address = _value(instance.keys, b"spice_addr") or settings.spice_addr
    if not address.isprintable() or " " in address:
        raise Refused(f"{instance.id} has no display that can be reached: spice_addr is {printable(address)!r}")
    password = _value(instance.keys, b"spice_password")
    if password is not None and ("\n" in password or "\0" in password):
        raise Refused(f"the spice_password of {instance.id} has a line break or a NUL, which no viewer's file can hold")
    return Display(instance=instance.id, host=host, address=address, port=int(port), password=password)


def _value(keys: Mapping[bytes, RawValue], name: bytes) -> str | None:
    """The text of a key; None when it is missing or empty."""
    raw = keys.get(name)
    return None if raw is None else raw.value.decode("utf-8", "replace").strip() or None


def way_to(display: Display, cluster: Cluster, *, here: str) -> tuple[str, list[str]]:
    """The address for the viewer, and a note for people about it.

    Args:
        display: of the instance.
        cluster: its sessions say how to reach a host.
        here: name of the host on which this command runs.
    """
    if display.is_local:
        if display.host == here:
            return display.address, []
        target = f"[{display.address}]" if ":" in display.address else display.address
        return "127.0.0.1", [
            f"its display listens on {display.address} of {display.host} only; on the machine of the viewer, first: "
            f"ssh -N -L {display.port}:{target}:{display.port} {_name_of(display.host, cluster)}"
        ]
    if not display.is_everywhere:
        return display.address, []
    return _name_of(display.host, cluster), []


def _name_of(host: str, cluster: Cluster) -> str:
    """The name or address of a host for others: the one in its supervisor's URL, or else its name."""
    session = cluster.sessions.get(host)
    try:
        name = urlsplit(session.url).hostname if session is not None else None
    except ValueError:
        name = None
    # The URL of a supervisor that serves on loopback does not tell its host's address.
    if name is None or not name.isprintable() or name == "localhost" or _is(name, "is_loopback"):
        return host
    return name


def _doubts(instance: Instance, cluster: Cluster) -> Iterable[str]:
    """Reasons why the display may not answer, or not as the file says."""
    status, view = instance.status, shown(instance, cluster)
    if view.phase != Phase.RUNNING:
        yield f"{instance.id} is {view.phase}: {view.reason}"
    pending = [] if status is None else [name for name in status.pending if name.startswith("spice_")]
    if pending:
        yield f"{', '.join(pending)} of {instance.id} changed: the file is right from its next restart on"


def connection_file(display: Display, address: str) -> str:
    """The content of the .vv file."""
    entries = {
        "type": "spice",
        "host": address,
        "port": str(display.port),
        **({"password": display.password} if display.password is not None else {}),
        "title": f"{display.instance} on {display.host} - %d",
        # The file may hold a password, and is soon out of date.
        "delete-this-file": "1",
        "toggle-fullscreen": "shift+f11",
        "release-cursor": "shift+f12",
        "secure-attention": "ctrl+alt+end",
    }
    return "\n".join(["[virt-viewer]", *(f"{name}={_escaped(value)}" for name, value in entries.items()), ""])


def _escaped(value: str) -> str:
    """A string for a key file: line breaks, and white space at its ends, are escaped."""
    text = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f"\\s{text[1:]}" if text.startswith(" ") else text


def _write(file: Path, text: str) -> None:
    """Write the file for its owner alone, whole or not at all, also over a file that others could read."""
    try:
        # mkstemp makes it 0600.
        descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:32]}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(text)
            Path(aside).replace(file)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as error:
        raise Refused(f"cannot write {file}: {error.strerror}") from error

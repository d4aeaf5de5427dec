"""`export`: prints instances as a file that `apply` reads."""

from __future__ import annotations

from collections.abc import Sequence

import click

from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.cli.choice import WORD, Word, chosen
from kvmsupervisor.cli.common import Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.filters import LABEL, Filters
from kvmsupervisor.cli.output import note, printable, printable_bytes
from kvmsupervisor.cli.wish_files.difference import in_order
from kvmsupervisor.cli.wish_files.reading import IMAGES, written
from kvmsupervisor.cluster.overview import Cluster, read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.keys import Layout
from kvmsupervisor.domain.parse_keys import SECRET_KEYS
from kvmsupervisor.domain.snapshots import KEY as SNAPSHOT_KEY

ORDERS = frozenset({"restart_request", "rollback_request"})
"""What was asked for once is no part of what an instance is. Nor are its snapshots: they lie on its disks."""


@click.command()
@click.argument("words", type=WORD, metavar="[ID]...", nargs=-1)
@click.option("-l", "--label", "labels", type=LABEL, multiple=True, help="Only those that are so, such as x-team=shop.")
@click.option("--secrets", is_flag=True, help="Write spice_password and user-data, too.")
@pass_tools
def export(tools: Tools, words: Sequence[Word], labels: Sequence[tuple[str, str]], secrets: bool) -> None:
    """Print instances as YAML, which `apply` reads: all of them, with the image library, or the named ones.

    Locks, placements and statuses are no part of it. Secrets are left out, and `apply` leaves them as they are.

    Example: kvmsupervisor export -l x-team=shop >shop.yaml
    """

    async def read(store: Store, settings: Settings) -> tuple[Cluster, Layout]:
        return await read_cluster(store, settings.layout), settings.layout

    cluster, layout = with_store(tools, read)
    there = cluster.instances.values()
    ids = chosen(words, there) if words else [one.id for one in there if one.keys]
    found = Filters(labels=labels).choose((cluster.instances[one] for one in ids), cluster)
    lost: list[str] = []
    if not words and not labels and cluster.images:
        prefix = layout.images_prefix
        images = [(kv.key.decode(errors="replace").removeprefix(prefix), kv.value) for kv in cluster.images]
        click.echo(written(IMAGES, _texts(IMAGES, images, lost)))
    for one in found:
        keys = [(name.decode(errors="replace"), raw.value) for name, raw in one.keys.items()]
        keys.sort(key=lambda pair: in_order(pair[0]))
        left = [name for name, _ in keys if _is_order(name) or (name in SECRET_KEYS and not secrets)]
        if hidden := [name for name in left if name in SECRET_KEYS]:
            note(f"{one.id}: {', '.join(hidden)} left out; --secrets writes it")
        click.echo(written(one.id, _texts(one.id, [pair for pair in keys if pair[0] not in left], lost)))
    if lost:
        raise Refused("not all could be written as text: " + ", ".join(lost))


def _is_order(name: str) -> bool:
    return name in ORDERS or name.startswith(SNAPSHOT_KEY)


def _texts(part: str, pairs: Sequence[tuple[str, bytes]], lost: list[str]) -> list[tuple[str, str]]:
    """The values as text; names of those that are none are added to `lost`."""
    found = []
    for name, value in pairs:
        try:
            found.append((name, value.decode().strip()))
        except UnicodeDecodeError:
            lost.append(printable(f"{part}/{name}: {printable_bytes(value[:40])}"))
    return found

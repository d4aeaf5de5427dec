"""`image`: the image library, `/kvm/.images/<name>`, and this host's copies of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvmsupervisor.adapters.etcd.api import Compare, Delete, Put, Store, Target
from kvmsupervisor.cli.common import Tools, complete, output_option, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import Cell, Column, echo_json, echo_table, note, printable
from kvmsupervisor.cli.unknown import TellingGroup
from kvmsupervisor.cluster.overview import read_cluster
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.images import Image, image_name, parse_image, users_of
from kvmsupervisor.domain.keys import Layout
from kvmsupervisor.domain.local_disk import DiskFormat
from kvmsupervisor.domain.media import shown_url
from kvmsupervisor.domain.storage import library_images_of
from kvmsupervisor.domain.values import Unfit, some

COLUMNS = (
    Column(title="NAME"),
    Column(title="FORMAT"),
    Column(title="SHA256", spare=True),
    Column(title="URL", long=True),
    Column(title="USED BY", long=True, label="used by"),
)

FORMATS = [one.value for one in DiskFormat]

NAMED = 20
"""Users of an image that a message names; the others are counted."""


class ImageType(click.ParamType):  # type: ignore[type-arg]
    """The name of an image of the library; completion asks etcd."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check that it can be one."""
        try:
            return image_name(str(value))
        except Unfit as unfit:
            self.fail(f"{str(value)!r} is no name: {unfit}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the images of the library."""

        async def work(store: Store, settings: Settings) -> list[str]:
            # Another name may hold what a shell expands.
            return [entry.name for entry in await _library(store, settings.layout) if entry.image is not None]

        return [CompletionItem(name) for name in complete(ctx, work) if name.startswith(incomplete)]


IMAGE = ImageType()


@frozen(kw_only=True)
class Entry:
    """One key of the library.

    Attributes:
        name: of the image.
        image: what it says; None where that cannot be used.
        problem: why not.
        users: the keys that name it, by instance.
        mod_revision: of the key.
    """

    name: str
    image: Image | None
    problem: str | None
    users: tuple[str, ...]
    mod_revision: int


async def _library(store: Store, layout: Layout) -> list[Entry]:
    """All entries, by name."""
    cluster = await read_cluster(store, layout)
    origins = {
        instance: library_images_of(one.wish.spec)
        for instance, one in cluster.instances.items()
        if one.wish.spec is not None
    }
    entries = []
    for kv in cluster.images:
        name = kv.key.decode(errors="replace").removeprefix(layout.images_prefix)
        users = users_of(name, origins)
        image, problem = None, None
        try:
            image = parse_image(image_name(name), kv.value.decode(errors="replace").strip())
        except Unfit as unfit:
            problem = str(unfit)
        entries.append(
            Entry(
                name=name,
                image=image,
                problem=problem,
                users=tuple(f"{instance} ({', '.join(keys)})" for instance, keys in users.items()),
                mod_revision=kv.mod_revision,
            )
        )
    return entries


async def _entry(store: Store, layout: Layout, name: str) -> Entry:
    """One entry.

    Raises:
        Refused: there is none.
    """
    found = {entry.name: entry for entry in await _library(store, layout)}
    if name not in found:
        raise Refused(f"there is no image {name} in the library; it has {some(sorted(found), NAMED) or 'none'}")
    return found[name]


@click.group(cls=TellingGroup)
def image() -> None:
    """Keep the image library: what `from=NAME` lets new disks begin with."""


@image.command()
@click.argument("name", type=IMAGE)
@click.argument("url")
@click.option("--sha256", required=True, help="The file's SHA-256, as `sha256sum` or the publisher tells it.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Format of the file, where its ending is neither .qcow2 nor .raw.",
)
@click.option("--force", is_flag=True, help="Change an image that is there already.")
@pass_tools
def add(tools: Tools, *, name: str, url: str, sha256: str, form: str | None, force: bool) -> None:
    """Add an image to the library. Hosts fetch it when a disk is first made of it.

    Example: kvmsupervisor image add debian-13 https://cloud.example/debian-13.qcow2 --sha256 4f0c…
    """
    value = " ".join([url, f"sha256={sha256.lower()}", *([] if form is None else [f"format={form}"])])
    try:
        parse_image(name, value)
    except Unfit as unfit:
        raise Refused(f"{name} was not added: {unfit}") from unfit

    async def work(store: Store, settings: Settings) -> None:
        key = settings.layout.image_key(name)
        there = await store.get(key)
        if there is not None and there.value == value.encode():
            note(f"image {name} is there already, and the same")
            return
        if there is not None and not force:
            raise Refused(
                f"image {name} is there already: {_shown(there.value)}; a new version is better added by a name of its "
                "own (debian-13.2), as disks that exist do not change; --force changes this one"
            )
        compare = Compare(key, Target.MOD_REVISION, 0 if there is None else there.mod_revision)
        if not (await store.txn([compare], [Put(key, value.encode())])).succeeded:
            raise Refused(f"{name} was not added: somebody else has just written it; look with `image list`")
        click.echo(f"image {name} {'added' if there is None else 'changed'}: from={name} names it in a disk's key")

    with_store(tools, work)


def _shown(value: bytes) -> str:
    url, *words = value.decode(errors="replace").split() or [""]
    return printable(" ".join([shown_url(url), *words]))


@image.command("list")
@output_option
@pass_tools
def list_images(tools: Tools, output: str) -> None:
    """List the images, and which disks name them."""
    entries = with_store(tools, lambda store, settings: _library(store, settings.layout))
    if output == "json":
        echo_json([_object(entry) for entry in entries])
        return
    wide = output == "wide"
    rows = []
    for entry in entries:
        found = entry.image
        what = ["", "", printable(entry.problem or "")]
        if found is not None:
            what = [found.format.value, found.sha256 if wide else found.sha256[:12], printable(shown_url(found.url))]
        cells = [printable(entry.name), *what, some(entry.users, NAMED if wide else 3)]
        rows.append([Cell(text) for text in cells])
    echo_table(COLUMNS, rows)


def _object(entry: Entry) -> dict[str, Any]:
    found = entry.image
    return {
        "name": entry.name,
        "url": None if found is None else shown_url(found.url),
        "sha256": None if found is None else found.sha256,
        "format": None if found is None else found.format.value,
        "problem": entry.problem,
        "users": list(entry.users),
    }


@image.command()
@click.argument("name", type=IMAGE)
@click.option("--pool", "pools", multiple=True, help="Remove it from this pool of Ceph, too; may be repeated.")
@click.option("--force", is_flag=True, help="Also where keys name it: disks that they are still to make will wait.")
@pass_tools
def remove(tools: Tools, *, name: str, pools: Sequence[str], force: bool) -> None:
    """Remove an image from the library, unless a key names it.

    Disks that were made of it stay as they are. Hosts drop their copies with the next image that they fetch. With
    --pool it is removed from that pool, too, with this host's way to Ceph, unless a disk is a clone of it.
    """

    async def work(store: Store, settings: Settings) -> None:
        layout = settings.layout
        entry = await _entry(store, layout, name)
        if entry.users and not force:
            raise Refused(
                f"image {name} was not removed: {some(entry.users, NAMED)} name it; take from= out of their keys "
                "(disks that exist do not need it), or --force"
            )
        for pool in pools:
            if entry.image is None:
                raise Refused(f"image {name} was not removed: its name in {pool} is not known ({entry.problem})")
            await _remove_from(settings, entry.image, pool)
        compare = Compare(layout.image_key(name), Target.MOD_REVISION, entry.mod_revision)
        if not (await store.txn([compare], [Delete(layout.image_key(name))])).succeeded:
            raise Refused(f"image {name} was not removed: somebody else has just written it; look with `image list`")
        if entry.users:
            users = some(entry.users, NAMED)
            note(f"still named by {users}: what of that is not made yet waits until {name} is there again")
        click.echo(f"image {name} removed")

    with_store(tools, work)


async def _remove_from(settings: Settings, entry: Image, pool: str) -> None:
    """Remove an image from a pool of Ceph.

    Raises:
        Refused: it has clones, or Ceph does not do it.
    """
    from kvmsupervisor.adapters.ceph import Ceph, CephError, CephImages, NoSuchImage, image_of  # noqa: PLC0415 - only this form
    from kvmsupervisor.domain.ceph import Trouble  # noqa: PLC0415 - likewise
    from kvmsupervisor.domain.images import parent_of  # noqa: PLC0415 - likewise
    from kvmsupervisor.machine.host import ceph_access  # noqa: PLC0415 - likewise

    ceph = CephImages(Ceph(ceph_access(settings)))
    # For disks in the pool itself, and for those in namespaces of it.
    for whole in (image_of(parent_of(entry, pool)), image_of(parent_of(entry, pool, apart=True))):
        try:
            await ceph.remove(whole)
        except NoSuchImage as error:
            if error.kind is Trouble.NO_POOL:
                raise Refused(f"image {entry.name} was not removed: {error}") from error
            if not whole.namespace:
                note(f"it is not in the pool {pool}")
        except CephError as error:
            raise Refused(f"image {entry.name} was not removed: {error}") from error
        else:
            click.echo(f"removed from the pool {whole.place}: {whole.image}")


@image.command()
@click.argument("name", type=IMAGE)
@click.option("--as", "form", type=click.Choice(FORMATS), help="Also have it ready for disks of this format.")
@pass_tools
def fetch(tools: Tools, name: str, form: str | None) -> None:
    """Fetch an image into this host's KVM_IMAGE_DIR, so that the first machine need not wait for it.

    Run it where the supervisor runs, with its settings. A fetch that was cut off goes on where it was.
    """

    async def work(store: Store, settings: Settings) -> None:
        entry = await _entry(store, settings.layout, name)
        if entry.image is None:
            raise Refused(f"image {name} cannot be used: {entry.problem}")
        await _fetch(store, settings, entry.image, form)

    with_store(tools, work)


async def _fetch(store: Store, settings: Settings, entry: Image, form: str | None) -> None:
    from kvmsupervisor.adapters.users import qemu_users  # noqa: PLC0415 - only this form pays for it
    from kvmsupervisor.cluster.image_keys import ImageKeys  # noqa: PLC0415 - likewise
    from kvmsupervisor.machine.images import DiskTrouble  # noqa: PLC0415 - likewise
    from kvmsupervisor.machine.jobs import Jobs  # noqa: PLC0415 - likewise
    from kvmsupervisor.machine.library import library_of  # noqa: PLC0415 - likewise

    try:
        user = qemu_users(settings.qemu_user, settings.qemu_uids).of_tools
    except ValueError as error:
        raise Refused(str(error)) from error
    jobs = Jobs()
    library = library_of(settings, jobs=jobs, user=user, kept=ImageKeys(store, settings.layout).sums)
    said = ""

    def say(words: str) -> None:
        nonlocal said
        if words != said:
            said = words
            note(words)

    try:
        for one in dict.fromkeys([entry.format, *([] if form is None else [DiskFormat(form)])]):
            stored = await library.get(entry, one, say)
            stored.close()
            click.echo(f"image {entry.name} is in {stored.path}")
    except DiskTrouble as error:
        raise Refused(printable(str(error))) from error
    finally:
        await asyncio.shield(jobs.close())

"""`confirm-identity`: an operator confirms that guests go on under the host's present name, prefix or LOCK (law 12)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import click

from kvmsupervisor.adapters.clock import boot_id
from kvmsupervisor.adapters.etcd.api import Store
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.cli.common import Tools, pass_tools, with_store
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import printable, printable_bytes
from kvmsupervisor.cli.write_commands import confirm, yes_option
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.identity import HostIdentity
from kvmsupervisor.domain.keys import InstanceId


@click.command("confirm-identity")
@yes_option
@pass_tools
def confirm_identity(tools: Tools, yes: bool) -> None:
    """Keep the guests of this host after its settings changed: another name, prefix or LOCK.

    When a supervisor finds guests that were started under another name, prefix or LOCK, it starts and stops nothing
    until the old settings are back, or this command was given. First write the host's present name into the key `host`
    of each of those instances; then run this command on the host itself. It shows the instances and asks; without a
    terminal, --yes is needed. The guests run on.
    """
    # Imported here: `--help` needs less.
    from kvmsupervisor.machine.system import REAL  # noqa: PLC0415
    from kvmsupervisor.supervisor.identity import Standing  # noqa: PLC0415

    settings = tools.settings()
    wanted = HostIdentity.of(settings.hostname, settings.layout)
    standing = Standing(REAL.processes, RunDir(settings.run_dir), wanted=wanted, boot_id=boot_id())
    note = standing.note()
    if note is None:
        raise Refused(
            f"nothing to confirm: no supervisor with the run directory {settings.run_dir} (KVM_RUN_DIR) has found "
            "guests that were started under other settings than its own"
        )
    former, present = note.recorded.unlike(note.wanted), note.wanted.unlike(note.recorded)
    names = [name for name, under in standing.living() if under == note.recorded]

    async def look(store: Store, settings: Settings) -> list[str]:
        return await _not_ready(store, note.wanted, names)

    missing = with_store(tools, look)
    if missing:
        raise Refused("\n".join(["first, or guests would be shut down:", *(f"  {one}" for one in missing)]))
    click.echo(printable(f"started under {former}: {', '.join(names) or 'no guest that runs'}"))
    click.echo(printable(f"to go on under {present}"))
    confirm("Is that so?", yes=yes)
    try:
        standing.confirm(note)
    except OSError as error:
        raise Refused(f"{error.filename}: {error.strerror}; run it as the user that the supervisor runs as") from error
    click.echo("confirmed: the supervisor uses its settings within seconds, or when it is started; guests run on")


async def _not_ready(store: Store, wanted: HostIdentity, names: Sequence[InstanceId]) -> list[str]:
    """The keys that have to be written first, one line each."""
    keys = [wanted.layout.wish_key(name, "host") for name in names]
    found = await asyncio.gather(*(store.get(key) for key in keys))
    return [
        printable(f"write {wanted.host} into {key}; found ")
        + ("nothing" if kv is None else printable_bytes(kv.value, limit=80))
        for key, kv in zip(keys, found, strict=True)
        if kv is None or kv.value.strip() != wanted.host.encode()
    ]

"""Under which identity this host's QEMUs go on: theirs, until a person has said otherwise (law 12).

Each record says under which settings its QEMU was started. A supervisor whose settings say something else works under
what is on record, where it starts and stops nothing, and asks: `_identity.json` in the run directory holds the question
until `kvmsupervisor confirm-identity` writes the word into it, or the old settings are back, or none of those QEMUs
lives any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import structlog

from kvmsupervisor.adapters.rundir import RunDir, write_whole
from kvmsupervisor.cluster.session import last_key
from kvmsupervisor.domain.identity import HostIdentity, IdentityNote, Mismatch, judge
from kvmsupervisor.domain.incarnation import Incarnation, Unreadable
from kvmsupervisor.domain.keys import HostName, InstanceId, default_facts, default_lock
from kvmsupervisor.machine import identity as process_identity
from kvmsupervisor.machine.system import Processes

log = structlog.get_logger(__name__)


class Standing:
    """What lives on this host, and under which identity.

    Args:
        processes: of this host.
        run_dir: whose records are read.
        wanted: what the settings say.
        boot_id: of this boot.
    """

    def __init__(self, processes: Processes, run_dir: RunDir, *, wanted: HostIdentity, boot_id: str) -> None:
        self._processes = processes
        self._run_dir = run_dir
        self._wanted = wanted
        self._boot_id = boot_id
        self._file = run_dir.path / "_identity.json"

    def settle(self) -> tuple[HostIdentity, Mismatch | None, Mapping[InstanceId, Incarnation]]:
        """Under which identity to work, whether that is another one than the settings say, and the records read for it.

        A person's word is heeded first: those QEMUs are put on record as the present identity's. Without a mismatch
        the question is taken away; with one it is asked.
        """
        records = self._records()
        note = self.note()
        if note is not None and note.confirmed and note.wanted == self._wanted:
            self._heed(note, records)
        identity, mismatch = judge(self._wanted, self._living(records))
        if mismatch is None:
            self._file.unlink(missing_ok=True)
        else:
            asked = IdentityNote(boot_id=self._boot_id, recorded=mismatch.recorded, wanted=mismatch.wanted)
            self._write(asked)
        return identity, mismatch, {name: record for name, record in records.items() if record is not None}

    def judge(self) -> tuple[HostIdentity, Mismatch | None]:
        """The same, without doing anything about it."""
        return judge(self._wanted, self.living())

    def living(self) -> list[tuple[InstanceId, HostIdentity]]:
        """Each QEMU on record here, readable or not, and what it was started under.

        One that has ended on this boot counts until its exit is recorded, which is done under its identity:
        under another name its lock would look like one to go on with, and a second name would start it.
        """
        return self._living(self._records())

    def _records(self) -> dict[InstanceId, Incarnation | None]:
        """The records of this run directory; None for one that cannot be read."""
        found: dict[InstanceId, Incarnation | None] = {}
        for name in self._run_dir.instances():
            try:
                record = self._run_dir.instance(name).read_incarnation()
            except Unreadable:
                found[name] = None
            else:
                if record is not None:
                    found[name] = record
        return found

    def _living(self, records: Mapping[InstanceId, Incarnation | None]) -> list[tuple[InstanceId, HostIdentity]]:
        found = []
        for name, record in records.items():
            if record is not None:
                under = self._known(record)
            else:
                hidden = process_identity.seek(self._processes, self._run_dir.instance(name).path)
                under = None if hidden is None else self._derived(hidden[0])
            if under is not None:
                found.append((name, under))
        return found

    def _known(self, record: Incarnation) -> HostIdentity | None:
        """What a QEMU of this boot was started under; None where that is not known of one that has ended."""
        pid = self.pid_of(record)
        if pid is not None:
            return self.under(record, pid)
        return record.under if record.boot_id == self._boot_id else None

    def under(self, record: Incarnation, pid: int) -> HostIdentity:
        """What a living QEMU was started under; what its record does not say is told by what is known otherwise."""
        return record.under or self._derived(pid)

    def objection(self, identity: HostIdentity) -> Callable[[Incarnation], str | None]:
        """What tells a supervisor that works under `identity` why a QEMU on record is not its own to touch.

        It is when it lives, and was started under another identity.
        """

        def object_to(record: Incarnation) -> str | None:
            if record.under == identity:
                return None  # also when it has ended: nobody needs to look
            pid = self.pid_of(record)
            under = identity if pid is None else self.under(record, pid)
            if under == identity:
                return None
            return (
                f"QEMU {pid} of this instance was started under {under.unlike(identity)}, and this supervisor works "
                f"under {identity.unlike(under)}: it is left alone; a supervisor under its own settings takes it over"
            )

        return object_to

    def note(self) -> IdentityNote | None:
        """The question, or the word on it; None when there is none, or it is of an earlier boot."""
        try:
            note = IdentityNote.from_json(self._file.read_bytes())
        except OSError:
            return None
        return note if note is not None and note.boot_id == self._boot_id else None

    def confirm(self, note: IdentityNote) -> None:
        """Put a person's word down: what lives goes on under what the settings of its supervisor say.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(self._file, replace(note, confirmed=True).to_json())

    def _heed(self, note: IdentityNote, records: dict[InstanceId, Incarnation | None]) -> None:
        for name, record in records.items():
            if record is not None and self._known(record) == note.recorded:
                records[name] = confirmed = replace(record, under=note.wanted)
                self._run_dir.instance(name).write_incarnation(confirmed)
        log.warning(
            "identity.confirmed",
            former=note.recorded.unlike(note.wanted),
            present=note.wanted.unlike(note.recorded),
        )

    def _write(self, note: IdentityNote) -> None:
        try:
            write_whole(self._file, note.to_json())
        except OSError as error:
            # Without it nobody can answer, which is told; all else goes on.
            log.error("identity.not_asked", file=str(self._file), reason=str(error))  # noqa: TRY400 - no bug of ours

    def pid_of(self, record: Incarnation) -> int | None:
        """Of the living QEMU of a record; None when it is gone."""
        if record.boot_id != self._boot_id:
            return None
        name, pid = record.instance, record.pid
        return process_identity.pid_of(self._processes, name, record.incarnation, pid=pid, starttime=record.starttime)

    def _derived(self, pid: int) -> HostIdentity:
        """What a record does not say: its process knows the prefix, the session's file the host and where facts lie.

        The lock's template is nowhere: it is the present one, or what it is by default below that prefix.
        """
        wanted = self._wanted
        prefix = process_identity.prefix_of(self._processes, pid) or wanted.prefix
        facts, found, host = (last_key(self._run_dir.path, boot_id=self._boot_id) or "").rpartition("/hosts/")
        lock = default_lock(prefix) if wanted.lock == default_lock(wanted.prefix) else wanted.lock
        if not found:
            facts, host = (wanted.facts if prefix == wanted.prefix else default_facts(prefix)), wanted.host
        return HostIdentity(host=HostName(host), prefix=prefix, facts=facts, lock=lock)

"""What releases wrote, as `tools/record-release` recorded it, laid out on this machine as they would have left it.

A recorded QEMU is started by its recorded command line; records and values get this machine's boot, pids and paths, and
nothing else of them is changed.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvmsupervisor.adapters.clock import boot_id, machine_id
from kvmsupervisor.domain.keys import HostName, InstanceId
from tests.support.cluster import Host, Keys, Qemu

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RELEASES = sorted(path.name for path in FIXTURES.glob("release-*"))
FOLDER, MACHINE = "/folder-of-the-release", "machine-of-the-release"
CHANNELS = ("qmp.sock", "qmp-spare.sock", "console.sock", "agent.sock")
"""In the order of their descriptors on the command line."""

HALTS = b"\xf4" * 65536
"""The recorded machines' firmware."""


def recorded(release: str, place: str) -> bytes:
    """One file of a release's, byte by byte."""
    return (FIXTURES / release / place).read_bytes()


def places(release: str, name: str) -> list[str]:
    """All files of that name that a release has."""
    folder = FIXTURES / release
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(name))


def wishes(release: str, instance: str) -> dict[str, str]:
    """The keys of an instance, but its lock."""
    found: dict[str, str] = json.loads(recorded(release, f"{instance}/wishes.json"))
    return found


class Release:
    """Lays out what one release has left on one host.

    Args:
        release: its folder's name.
        host: whose folders are used; its supervisor is not started.
        run_dir: where records lie; that of a container in single mode is below the host's.
        newer: the one record whose version shall be one that no release before the next has.
    """

    def __init__(self, release: str, host: Host, *, run_dir: Path | None = None, newer: str = "") -> None:
        self._release, self._host, self._newer = release, host, newer
        self._keys: Keys = host.keys
        self._run_dir = run_dir or host.run_dir
        (host.folder / "halts.bin").write_bytes(HALTS)

    def local(self, data: bytes) -> bytes:
        """As this machine's own."""
        told = data.replace(FOLDER.encode(), str(self._host.folder).encode())
        return told.replace(MACHINE.encode(), machine_id().encode())

    def value(self, place: str, **fields: object) -> bytes:
        """A record or a value, as it would be if it had been written on this machine."""
        found = json.loads(self.local(recorded(self._release, place)))
        local = found | ({"boot_id": boot_id()} if "boot_id" in found else {}) | fields
        return json.dumps(local | ({"version": 2} if place == self._newer else {})).encode()

    def write(self, place: str, **fields: object) -> None:
        """Put a record into the run directory. `place` names it in the fixture; the last two parts, here."""
        path = self._run_dir.joinpath(*Path(place).parts[-2:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.value(place, **fields))

    def put(self, instance: str, **changed: str) -> int:
        """Write its wishes, `host` last, as people do; return the revision of that."""
        told = {k: self.local(v.encode()).decode() for k, v in wishes(self._release, instance).items()} | changed
        if len(told) > 1:
            self._keys.put(instance, **{name: value for name, value in told.items() if name != "host"})
        return self._keys.put(instance, host=told["host"])

    def say(self, instance: str, **fields: object) -> bytes:
        """Write its lock and its status, with these fields; return the lock."""
        layout, name = self._keys.layout, InstanceId(instance)
        lock = self.value(f"{instance}/lock.json", **fields)
        self._keys.write(layout.lock_key(name), lock.decode())
        told = {key: value for key, value in fields.items() if key in {"host", "pid"}}
        self._keys.write(layout.status_key(name), self.value(f"{instance}/status.json", **told).decode())
        return lock

    def session(self) -> None:
        """Write the host's session, with a lease that lives."""
        lease = self._keys.etcd.ctl("lease", "grant", self._host.settings["KVM_SESSION_TTL"]).split()[1]
        key = self._keys.layout.session_key(HostName(self._host.name))
        self._keys.etcd.ctl("put", f"--lease={lease}", key, self.value("session.json").decode())
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "_session.json").write_bytes(self.value("_session.json", key=key, lease=int(lease, 16)))

    def spawn(
        self,
        instance: str,
        *,
        taps: Sequence[int] = (),
        marks: str = "",
        wrap: Callable[[Sequence[str]], Sequence[str]] = list,
    ) -> tuple[subprocess.Popen[bytes], tuple[str, ...]]:
        """Start its QEMU by the recorded command line; return it and the command line that it got.

        Args:
            instance: whose.
            taps: descriptors of its NICs' taps.
            marks: folder of the recorded marks; the instance's own if it has them.
            wrap: makes the command line that is run of QEMU's.
        """
        folder = self._run_dir / instance
        folder.mkdir(parents=True, exist_ok=True)
        record = json.loads(self.local(recorded(self._release, f"{instance}/incarnation.json")))
        told = json.loads(recorded(self._release, f"{marks}environment.json"))
        told |= {"KVMSUPERVISOR_PREFIX": self._keys.layout.prefix}
        argv = [str(word) for word in record["argv"]]
        with ExitStack() as stack:
            sockets = []
            for name in CHANNELS:
                one = stack.enter_context(socket.socket(socket.AF_UNIX))
                one.bind(str(folder / name))
                one.listen(4)
                sockets.append(one.fileno())
            argv = _with_descriptors(argv, {"socket,": sockets, "tap,": list(taps)})
            log = stack.enter_context((folder / "qemu.log").open("ab"))
            process = subprocess.Popen(
                wrap(argv),
                env={"PATH": self._host.environment["PATH"], **told},
                pass_fds=[*sockets, *taps],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return process, tuple(argv)

    def on_record(self, instance: str, argv: Sequence[str], qemu: Qemu) -> None:
        """Put a QEMU that lives on record."""
        self.write(f"{instance}/incarnation.json", argv=list(argv), **process_fields(qemu))
        self.write(f"{instance}/memory.json")

    def copy(self, instance: str, *names: str) -> None:
        """Put files beside the records, byte by byte."""
        for name in names:
            shutil.copy(FIXTURES / self._release / instance / name, self._run_dir / instance / name)


def process_fields(qemu: Qemu) -> dict[str, int]:
    """What tells a process in a record and in a lock."""
    return {"pid": qemu.pid, "starttime": qemu.starttime}


def _with_descriptors(argv: Sequence[str], descriptors: Mapping[str, Sequence[int]]) -> list[str]:
    """The command line with other numbers of descriptors, in the order of their options."""
    left: dict[str, list[Any]] = {kind: list(numbers) for kind, numbers in descriptors.items()}
    told = []
    for word in argv:
        kind = next((kind for kind in left if word.startswith(kind) and "fd=" in word), None)
        if kind is None:
            told.append(word)
            continue
        before, _, rest = word.partition("fd=")
        _, comma, after = rest.partition(",")
        told.append(f"{before}fd={left[kind].pop(0)}{comma}{after}")
    assert not any(left.values()), left
    return told

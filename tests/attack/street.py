"""Real QEMUs with `doors.c` inside, started as the supervisor starts them, and what is around them.

Only the environment of such a QEMU and its descriptors have more than usual. What measures there are is an argument.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import pty
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from kvmsupervisor.adapters import descriptors, handed, process
from kvmsupervisor.adapters.apart import HostView, Walls, raise_walls
from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.adapters.log_buffer import LogBuffer
from kvmsupervisor.adapters.rundir import InstanceDir
from kvmsupervisor.adapters.users import QemuUser, qemu_users
from kvmsupervisor.domain.argv import SANDBOX, Channels, Provision
from kvmsupervisor.domain.sight import Sight
from kvmsupervisor.machine.guest_logs import GuestLogs
from kvmsupervisor.machine.spawn import Quarters, SpawnRequest, spawn
from kvmsupervisor.machine.system import Processes, QemuProcess
from tests.attack.doors import ALL, Door, Measure
from tests.machine.test_machine import record
from tests.support.cluster import eventually

LIMIT_S = 90.0
NOGROUP = 65534
OFFLINE = Sight(needs_network=False, listens=(), connects=False)

THREADS, FILES = 300, 400
"""Limits in place of the usual ones, which take longer to reach. That QEMUs have the usual ones: test_budget.py."""

IPC_CREAT, IPC_RMID = 0o1000, 0
KEYCTL, ADD_KEY, JOIN_SESSION_KEYRING, SESSION_KEYRING = 250, 248, 1, -3

ADD_USER_KEY = f"import ctypes, sys; ctypes.CDLL(None).syscall({ADD_KEY}, b'user', sys.argv[1].encode(), b'x', 1, -4)"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Neighbourhood:
    """What is around the attacker: another guest's QEMU, the supervisor, and things of the host.

    Attributes:
        pid: of the other QEMU.
        address: in its memory.
        heap: in memory that it writes to.
        parent: pid of this process, in the supervisor's place.
        name: of objects that have one: a queue, a key.
        folder: everybody may look into it.
        home: a folder of the other QEMU's user, as its run directory was once.
        own: a file in it.
        everybody: a folder in which everybody may make files.
        secret: a file of the other QEMU's user.
        handle: of that file, or of another one where that has none that root can open, with its type.
        shared: a file that everybody may read and write, as some of the host's are.
        terminal: a person's terminal, of the other QEMU's user.
        cgroup: a file by which processes are moved.
        qmp: a socket of the other QEMU's user.
        bus: a socket that everybody may connect to, as D-Bus's is.
        consoles: where a supervisor hands out consoles to a group.
        abstract: the name of an abstract one.
        etcd: the port of a server on the loopback, as etcd may be.
        dns: the port of a server that answers, likewise.
        display: a port on which the other QEMU's user listens.
        free: a port on which nobody listens.
        key: of memory, semaphores and a queue that everybody may use.
    """

    pid: int
    address: int
    heap: int
    parent: int
    name: str
    folder: str
    home: str
    own: str
    everybody: str
    secret: str
    handle: str
    shared: str
    terminal: str
    cgroup: str
    qmp: str
    bus: str
    consoles: str
    abstract: str
    etcd: int
    dns: int
    display: int
    free: int
    key: int


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    """The doors, compiled."""
    assert shutil.which("gcc") is not None, "gcc is missing: tools/install-system dev"
    folder = Path(tempfile.mkdtemp(prefix="kva"))
    folder.chmod(0o755)
    source, made = Path(__file__).with_name("doors.c"), folder / "doors.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", made, source], check=True)
    try:
        yield made
    finally:
        shutil.rmtree(folder)


class Preloaded:
    """Processes of this host, with doors in the next one that is started, and limits of its own."""

    def __init__(self, environment: Mapping[str, str], fds: Collection[int], prefix: Sequence[str]) -> None:
        self._environment, self._fds, self._prefix = environment, fds, prefix

    def spawn(
        self, argv: Sequence[str], *, environment: Mapping[str, str], pass_fds: Sequence[int], **more: Any
    ) -> QemuProcess:
        everything = {**environment, **self._environment}
        return process.spawn([*self._prefix, *argv], environment=everything, pass_fds=[*pass_fds, *self._fds], **more)


class Street:
    """Starts QEMUs for one test, and ends them."""

    def __init__(self, stack: ExitStack, library: Path) -> None:
        users = qemu_users(None, None)
        self._neighbour, self._stranger = users.with_id(79990), users.with_id(79991)
        self._stack, self._library = stack, library
        self._logs = GuestLogs(clock=Clock())
        stack.callback(self._logs.close)
        self.path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kva")))
        self.path.chmod(0o755)
        self._walls = raise_walls(HostView(seen=(str(library),)))
        assert self._walls.lacking == {}
        self._started = 0
        self.where = self._furnish()

    # --- what is around -----------------------------------------------------------------------------------------

    def _furnish(self) -> Neighbourhood:
        stack, path = self._stack, self.path
        other = self._start(Quarters(user=self._neighbour), filtered=True)
        name = f"kva-{other.pid}"
        home, everybody = path / "home", path / "everybody"
        home.mkdir(mode=0o755)
        everybody.mkdir()
        everybody.chmod(0o777)
        secret, shared = path / "secret", path / "shared"
        shared.write_bytes(b"shared")
        shared.chmod(0o666)
        primary, terminal = pty.openpty()
        stack.callback(os.close, primary)
        stack.callback(os.close, terminal)
        self._give(os.ttyname(terminal))
        qmp, bus = self._listening(str(path / "qmp")), self._listening(str(path / "bus"))
        self._give(qmp, 0o600)
        Path(bus).chmod(0o666)
        consoles = descriptors.Door(path / "run", "sock", gid=NOGROUP, limit=1, on_call=descriptors.Carrier.close)
        consoles.open()
        stack.callback(consoles.close)
        display = stack.enter_context(socket.socket())
        display.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        display.bind(("127.0.0.1", 0))
        display.listen()
        os.fchown(display.fileno(), self._neighbour.uid, -1)
        etcd = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        with socket.create_server(("127.0.0.1", 0)) as unused:
            free = unused.getsockname()[1]
        self._objects(name, other.pid)
        eventually("its QEMU", lambda: Path(f"/proc/{other.pid}/comm").read_text().startswith("qemu-system"))
        maps = eventually("its heap", lambda: _heap_in(Path(f"/proc/{other.pid}/maps").read_text()))
        found = Neighbourhood(
            pid=other.pid,
            address=maps[0],
            heap=maps[1],
            parent=os.getpid(),
            name=name,
            folder=str(path),
            home=str(home),
            own=str(home / "own"),
            everybody=str(everybody),
            secret=str(secret),
            handle="",
            shared=str(shared),
            terminal=os.ttyname(terminal),
            cgroup=next(
                map(str, sorted(Path("/sys/fs/cgroup").glob("**/cgroup.procs"), key=lambda one: len(str(one))))
            ),
            qmp=qmp,
            bus=bus,
            consoles=str(consoles.path),
            abstract=self._listening(f"\0{name}")[1:],
            etcd=etcd.getsockname()[1],
            dns=self._answering(),
            display=display.getsockname()[1],
            free=free,
            key=other.pid,
        )
        self._tidy(found)
        return replace(found, handle=(openable_handle(str(secret)) or _handle_of(str(secret)) or "0 00"))

    def _tidy(self, where: Neighbourhood) -> None:
        """Have things as they were, whatever the doors before have done."""
        self._give(where.home)
        for file in (where.secret, where.own):
            Path(file).touch()
            Path(file).write_bytes(b"secret")
            self._give(file, 0o600)

    def _give(self, path: str, mode: int | None = None) -> None:
        os.chown(path, self._neighbour.uid, self._neighbour.gid)
        if mode is not None:
            Path(path).chmod(mode)

    def _listening(self, address: str) -> str:
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen(64)
        return address

    def _answering(self) -> int:
        """The port of a server that answers datagrams."""
        server = self._stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        server.bind(("127.0.0.1", 0))

        def answer() -> None:
            while True:
                asked, whom = server.recvfrom(16)
                if asked == b"end":
                    return
                server.sendto(b"!", whom)

        thread = threading.Thread(target=answer)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(server.sendto, b"end", server.getsockname())
        return int(server.getsockname()[1])

    def _objects(self, name: str, key: int) -> None:
        """Objects of the kernel that everybody may use, and keys of the neighbour and of this process."""
        memory = _libc.shmget(key, 4096, IPC_CREAT | 0o666)
        self._stack.callback(_libc.shmctl, memory, IPC_RMID, None)
        semaphores, messages = _libc.semget(key, 1, IPC_CREAT | 0o666), _libc.msgget(key, IPC_CREAT | 0o666)
        self._stack.callback(_libc.semctl, semaphores, 0, IPC_RMID)
        self._stack.callback(_libc.msgctl, messages, IPC_RMID, None)
        mask = os.umask(0)
        queue = _libc.mq_open(f"/{name}".encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
        os.umask(mask)
        self._stack.callback(_libc.mq_unlink, f"/{name}".encode())
        assert min(memory, semaphores, messages, queue) >= 0
        _libc.mq_close(queue)
        python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or "python3"
        subprocess.run([*self._neighbour.become(), python, "-c", ADD_USER_KEY, name], check=True)
        assert _libc.syscall(KEYCTL, JOIN_SESSION_KEYRING, None) >= 0
        assert _libc.syscall(ADD_KEY, b"user", name.encode(), b"x", 1, SESSION_KEYRING) >= 0
        self._stack.callback(_libc.syscall, KEYCTL, JOIN_SESSION_KEYRING, None)

    # --- QEMUs --------------------------------------------------------------------------------------------------

    def _start(
        self,
        quarters: Quarters,
        *,
        filtered: bool,
        environment: Mapping[str, str] | None = None,
        fds: Collection[int] = (),
        prefix: Sequence[str] = (),
    ) -> QemuProcess:
        self._started += 1
        directory = InstanceDir(self.path / f"run{self._started}" / "1")
        logs = self._logs.of(directory)

        def build(channels: Channels) -> Provision:
            return Provision(run_dir=str(directory.path), channels=channels)

        def argv(provision: Provision) -> list[str]:
            main = provision.channels.qmp
            return [
                *("qemu-system-x86_64", "-S", "-machine", "none", "-nodefaults", "-display", "none"),
                *(("-sandbox", SANDBOX) if filtered else ()),
                *("-chardev", f"socket,id=q0,fd={main},server=on,wait=off", "-mon", "chardev=q0,mode=control"),
            ]

        preloaded = Preloaded(environment or {}, fds, prefix)
        started = spawn(
            SpawnRequest(
                directory=directory,
                record=record(),
                build=build,
                argv=argv,
                quarters=quarters,
                processes=cast("Processes", preloaded),
                prefix="/kvm",
                logs=logs,
                on_record=lambda one: None,
                on_end=lambda: None,
            )
        )
        self._stack.callback(logs.close)
        self._stack.callback(_end, started)
        return started

    def _user(self, measures: Set[Measure]) -> QemuUser | None:
        if Measure.UNPRIVILEGED not in measures:
            return None
        return self._stranger if Measure.USER in measures else self._neighbour

    def _quarters(self, measures: Set[Measure]) -> Quarters:
        walls = Walls(
            base=self._walls.base if Measure.VIEW in measures else None,
            landlock=self._walls.landlock if Measure.LANDLOCK in measures else 0,
            view=self._walls.view,
        )
        return Quarters(user=self._user(measures), entry=walls.entry(OFFLINE))

    async def opened(self, doors: Iterable[Door], measures: Set[Measure] = ALL) -> set[Door]:
        """Those of the doors that open for a QEMU with these measures."""
        wanted = list(doors)
        kills = [one for one in wanted if one.ends_it and Measure.FILTER in measures]
        batches = [[one for one in wanted if one not in kills], *([one] for one in kills)]
        found = set[Door]()
        for batch in filter(None, batches):
            found |= await self._opened(batch, measures)
        return found

    async def _opened(self, doors: Sequence[Door], measures: Set[Measure]) -> set[Door]:
        """The same, of one QEMU."""
        self._tidy(self.where)
        with ExitStack() as stack:
            fds = _handed(self.path, stack, well=Measure.HANDED in measures)
            around = {**vars(self.where), **fds, "threads": THREADS, "files": FILES}
            lines = {f"{door.name} {door.argument.format(**around)}": door for door in doors}
            reader, writer = os.pipe()
            stack.callback(os.close, writer)
            environment = {"LD_PRELOAD": str(self._library), "DOORS": "\n".join(lines), "REPORT": str(writer)}
            filtered = Measure.FILTER in measures
            if not filtered:
                environment["UNFILTERED"] = "1"
            quarters = self._quarters(measures)
            if quarters.entry is not None:
                stack.callback(quarters.entry.close)
            bounds = (f"--nproc={THREADS}", f"--nofile={FILES}", "--core=0", "--")
            prefix = ("/usr/bin/prlimit", *bounds) if Measure.LIMITS in measures else ()
            self._start(
                quarters, filtered=filtered, environment=environment, fds=(writer, *fds.values()), prefix=prefix
            )
        with os.fdopen(reader, "rb") as pipe:
            async with asyncio.timeout(LIMIT_S):
                told = (await asyncio.to_thread(pipe.read)).decode()
        answers = dict(line.rsplit(" ", 1) for line in told.splitlines())
        assert answers.keys() >= {line for line, door in lines.items() if not (filtered and door.ends_it)}, answers
        return {door for line, door in lines.items() if answers.get(line) == "0"}


def _handed(folder: Path, stack: ExitStack, *, well: bool) -> dict[str, int]:
    """Descriptors as the supervisor hands them over; otherwise with more rights than QEMU needs."""
    path = folder / "medium"
    path.write_bytes(bytes(4096))
    path.chmod(0o600 if well else 0o666)

    def keep(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    if well:
        log = LogBuffer.make("console.log")
        stack.callback(log.close)
        return {
            "file": keep(handed.open_own(path, writable=False)),
            "sealed": keep(handed.sealed("ceph-key", b"secret")),
            "log": log.fd,
        }
    memory = keep(os.memfd_create("any", os.MFD_CLOEXEC))
    os.fchmod(memory, 0o666)
    return {
        "file": keep(os.open(path, os.O_RDWR | os.O_CLOEXEC)),
        "sealed": keep(os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)),
        "log": keep(os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)),
    }


def _end(started: QemuProcess) -> None:
    started.signal(signal.SIGKILL)
    started.close()
    # One that its own filter has ended was reaped.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(started.pid, 0)


def _heap_in(maps: str) -> tuple[int, int] | None:
    """Where the memory of a process begins, and where its heap does."""
    lines = maps.splitlines()
    heap = next((line for line in lines if line.endswith("[heap]")), None)
    return None if heap is None else (int(lines[0].split("-", 1)[0], 16), int(heap.split("-", 1)[0], 16))


def openable_handle(*paths: str) -> str | None:
    """A handle that root opens through the file system of `/usr/bin`, as the door does; None where there is none.

    A folder for temporary files may be on another file system, and an overlay has none unless mounted so (`nfs_export`
    in the kernel's overlayfs.rst). That is asked of the kernel by this process itself, before which no wall stands.
    """
    for path in (*paths, "/etc/shadow", os.path.realpath("/usr/bin/env")):
        if (told := _handle_of(path)) is None:
            continue
        kind, inner = told.split()
        handle = (len(inner) // 2).to_bytes(4, "little") + int(kind).to_bytes(4, "little") + bytes.fromhex(inner)
        at = os.open("/usr/bin", os.O_RDONLY | os.O_DIRECTORY)
        try:
            opened = _libc.open_by_handle_at(at, handle, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(at)
        if opened >= 0:
            os.close(opened)
            return told
    return None


def _handle_of(path: str) -> str | None:
    """Type and bytes of a file's handle (name_to_handle_at(2)); None where it has none."""
    handle, mount = ctypes.create_string_buffer(8 + 128), ctypes.c_int()
    ctypes.memmove(handle, (128).to_bytes(4, "little"), 4)
    if _libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount), 0) != 0:
        return None
    length, kind = (int.from_bytes(handle.raw[at : at + 4], "little", signed=True) for at in (0, 4))
    return f"{kind} {handle.raw[8 : 8 + length].hex()}"

"""The demo's course, step by step: start, show, end.

It uses the program like a user: it writes keys, reads status keys and calls `list`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click

from kvmsupervisor.adapters.etcd.api import Put, Store, Unavailable
from kvmsupervisor.cli.common import connect
from kvmsupervisor.cli.demo.guest import MINIMUM_RAM_MIB, Guest
from kvmsupervisor.cli.demo.keys import (
    all_stopped,
    changes_below,
    follow_statuses,
    hosted,
    running,
)
from kvmsupervisor.cli.demo.ssh import Ssh
from kvmsupervisor.cli.demo.stage import (
    LOOK_S,
    Child,
    ChildEnded,
    DemoError,
    clean_environment,
    follow_lines,
    free_ports,
    while_alive,
)
from kvmsupervisor.cli.output import printable
from kvmsupervisor.config.load import load_settings
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout
from kvmsupervisor.domain.status import Phase, Status

T = TypeVar("T")

INSTANCE = InstanceId("hello")
HOST = HostName("demo")
HELLO = f"HELLO from {INSTANCE}"
RAM_MIB = MINIMUM_RAM_MIB + 32
"""The SSH server is kept in memory twice while the kernel unpacks it, and people want to try something in there."""

SSH_READY = "SSH at port 22"
"""What `demo/online` says in the guest."""

# Deadlines, in seconds. Arbitrary: each is far above what a slow, busy machine needs, and short enough for a person who
# waits.
GUEST_DEADLINE_S = 900.0
ETCD_DEADLINE_S = 30.0
SUPERVISOR_DEADLINE_S = 30.0
HELLO_DEADLINE_S = 180.0
SSH_DEADLINE_S = 180.0
LIST_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0

RETRY_S = 0.05
"""How often etcd is asked whether it has started."""

SHUTDOWN_TIMEOUT_S = 30
"""The guest shuts down in 0.2 s, but a person may have told it to hang: do not wait for the usual 120 s."""

MARGIN = 12
"""Columns for the words on the left, and a space."""

TO_TRY: dict[str, tuple[tuple[str, str], ...]] = {
    "Log in": (("{program} console {id}", "as root, without a password; Ctrl-] q leaves"),),
    "Write a key": (
        ("etcdctl put {key}restart_request 1", "one graceful restart"),
        ("etcdctl put {key}ram 160", "pending until it restarts"),
        ("etcdctl put {key}power off", 'shuts it down; "on" starts it'),
    ),
    "Look": (
        ("{program} list", ""),
        ("{program} show {id}", ""),
        ("etcdctl get --prefix {facts}/", "what is observed"),
        ("curl http://{http}/metrics", "what Prometheus scrapes"),
    ),
    "Kill": (
        ("kill -9 {supervisor}", "the supervisor: the guest runs on, a new one adopts it"),
        ("kill -9 {pid}", "its QEMU: another one starts at once"),
    ),
}
"""Commands, and what they do."""

NEXT = 'Next: "A first machine" in README.md, with a cloud image and a disk, for as long as you like.'


class Play:
    """The demo: `begin`, `end`, `stop`, `kill`, in this order; each may be cut off anywhere."""

    def __init__(self, *, folder: Path, environ: Mapping[str, str], supervisor: Sequence[str]) -> None:
        """Prepare the demo, without starting anything.

        Args:
            folder: of all files; every process has its name in its command line or environment.
            environ: the environment; variables for other supervisors are left out.
            supervisor: the command that runs the supervisor.
        """
        self.said_hello = False
        self._folder = folder
        self._supervisor_command = supervisor
        etcd_port, peer_port, http_port, self._ssh_port = free_ports(4)
        self._endpoint = f"http://127.0.0.1:{etcd_port}"
        self._peers = f"http://127.0.0.1:{peer_port}"
        self._http = f"127.0.0.1:{http_port}"
        # An empty file in place of /etc/kvmsupervisor/kvmsupervisor.toml, which is this machine's supervisor's.
        config = folder / "empty.toml"
        config.touch()
        self._environ = clean_environment(environ) | {
            "ETCD_ENDPOINTS": self._endpoint,
            "KVM_ACCEL": "tcg",
            "KVM_CGROUP": "none",
            # The guest's kernel may lie where only this user can read it.
            "KVM_QEMU_USER": "",
            "KVM_EXTRA_FLAGS": "any",
            "KVM_CONFIG": str(config),
            "KVM_HOSTNAME": HOST,
            "KVM_LISTEN": self._http,
            "KVM_RUN_DIR": str(folder / "run"),
            "KVM_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),
        }
        self._settings = load_settings(self._environ)
        self._layout = self._settings.layout
        self._run_dir = self._settings.run_dir / INSTANCE
        self._etcd: Child | None = None
        self._supervisor: Child | None = None
        self._store: Store | None = None
        self._console: asyncio.Task[None] | None = None
        self._hello = asyncio.Event()
        self._ssh: Ssh | None = None
        self._ssh_ready = asyncio.Event()

    async def begin(self, cache: Path, *, stay: bool) -> None:
        """Start everything and show it; with `stay`, go on showing what changes until cancelled.

        Raises:
            DemoError: a step failed; the programs that were started by then run on.
            EtcdError: etcd failed.
        """
        click.secho("etcd, a supervisor and a virtual machine on this machine. Ctrl-C ends it.\n", bold=True)
        guest = await self._prepare_ssh(cache, await self._prepare_guest(cache))
        self._store = store = await self._start_etcd()
        await self._start_supervisor(store)
        await self._write_keys(store, guest)
        status = await self._wait_for_hello(store)
        # First what takes the guest a while: by then its console is quiet, and does not write into the table.
        await self._show_ssh()
        await self._show_list()
        if stay:
            self._show_what_to_try(status)
            await self._stay(store)

    async def end(self) -> None:
        """Shut all guests down, through their keys.

        Raises:
            DemoError: the guests did not end, or not gracefully.
            EtcdError: etcd did not answer.
        """
        if self._store is None or not self._all_alive():
            return
        wished = await hosted(self._store, self._layout)
        if not wished:
            return
        keys = [self._layout.wish_key(instance, "power") for instance in wished]
        click.echo()
        say("shut down", *(f"{key}  off" for key in keys))
        written = await self._store.txn([], [Put(key, b"off") for key in keys])
        last = await self._while_alive(
            all_stopped(self._store, self._layout, wished, written.revision),
            doing="waiting for the guests to shut down",
            deadline_s=SHUTDOWN_TIMEOUT_S + STOP_DEADLINE_S,
        )
        # The guest's last output may not have been shown yet.
        await asyncio.sleep(2 * LOOK_S)
        say("stopped", *(f"{instance}: {status.last_exit or 'never ran'}" for instance, status in last.items()))
        how = last[INSTANCE].last_exit if INSTANCE in last else None
        if how != "guest-shutdown" and (self.said_hello or how is not None):
            raise DemoError(f"the guest was not shut down gracefully: {how}")

    async def stop(self) -> None:
        """Stop the programs, the last first."""
        if self._store is not None:
            await self._store.close()
        for child in (self._supervisor, self._etcd):
            if child is not None:
                await child.stop(deadline_s=STOP_DEADLINE_S)

    async def kill(self) -> None:
        """End all programs that still run, at once."""
        if self._console is not None:
            self._console.cancel()
            await asyncio.gather(self._console, return_exceptions=True)
        for child in (self._supervisor, self._etcd):
            if child is not None:
                await child.stop(deadline_s=0)

    # --- steps -------------------------------------------------------------------------------------------------

    async def _prepare_guest(self, cache: Path) -> Guest:
        say("guest", f"Debian's kernel and busybox, kept in {_short(cache)}")
        return Guest.at(Path(await self._build("guest", "kvmsupervisor.cli.demo.guest", cache)))

    async def _prepare_ssh(self, cache: Path, guest: Guest) -> Guest:
        """The guest with SSH in it; where something for that is missing, say what, and go on without."""
        say("ssh", f"Debian's dropbear, kept in {_short(cache)}")
        try:
            ssh = await Ssh.prepare(self._folder, port=self._ssh_port, qemu=self._settings.qemu, environ=self._environ)
            built = await self._build("ssh", "kvmsupervisor.cli.demo.ssh_layer", cache, guest.initramfs)
        except ChildEnded as ended:
            say("", f"without SSH: {''.join(ended.child.output.splitlines()[-1:])}")
            return guest
        except DemoError as error:
            say("", f"without SSH: {str(error).splitlines()[0]}")
            return guest
        self._ssh = ssh
        return replace(guest, initramfs=Path(built))

    async def _build(self, name: str, module: str, *paths: Path) -> str:
        """Let a module build something; return the last line that it prints."""
        # A process, so that Ctrl-C can end it in the middle of a download.
        builder = await self._start(name, [sys.executable, "-m", module, *map(str, paths)])
        try:
            async with asyncio.timeout(GUEST_DEADLINE_S):
                code = await builder.wait()
        except TimeoutError as error:
            raise DemoError(builder.with_log(f"was not built within {GUEST_DEADLINE_S:g} s")) from error
        finally:
            # As Ctrl-C would do: it deletes what is half fetched.
            await builder.stop(deadline_s=STOP_DEADLINE_S, by=signal.SIGINT)
        if code != 0:
            raise ChildEnded(builder, code, f"building the {name}")
        return builder.output.splitlines()[-1]

    async def _start_etcd(self) -> Store:
        say("etcd", self._endpoint)
        program = shutil.which("etcd", path=f"{self._environ.get('PATH', '')}{os.pathsep}/usr/bin")
        if program is None:
            raise DemoError("no program named etcd in PATH; on Debian it is in the package etcd-server")
        self._etcd = await self._start(
            "etcd",
            [
                program,
                f"--name={HOST}",
                f"--data-dir={self._folder / 'etcd'}",
                f"--listen-client-urls={self._endpoint}",
                f"--advertise-client-urls={self._endpoint}",
                f"--listen-peer-urls={self._peers}",
                f"--initial-advertise-peer-urls={self._peers}",
                f"--initial-cluster={HOST}={self._peers}",
                # A single member elects itself: waiting a second for others is of no use.
                *("--heartbeat-interval=10", "--election-timeout=100", "--logger=zap"),
            ],
        )
        store = connect(self._settings)

        async def answers() -> None:
            while True:
                try:
                    await store.get(self._layout.session_key(HOST))
                except Unavailable:
                    await asyncio.sleep(RETRY_S)
                else:
                    return

        await self._while_alive(answers(), doing="waiting for its first answer", deadline_s=ETCD_DEADLINE_S)
        return store

    async def _start_supervisor(self, store: Store) -> None:
        say("supervisor", f"host {HOST}, http://{self._http}")
        self._supervisor = await self._start("supervisor", self._supervisor_command)

        async def has_session() -> None:
            key = self._layout.session_key(HOST)
            async with aclosing(changes_below(store, self._layout.hosts_prefix)) as changes:
                async for _ in changes:
                    if await store.get(key) is not None:
                        return

        await self._while_alive(
            has_session(), doing="waiting for its session in etcd", deadline_s=SUPERVISOR_DEADLINE_S
        )

    async def _write_keys(self, store: Store, guest: Guest) -> None:
        flags = guest.extra_flags(tag=INSTANCE, quiet=False, login=True, dhcp=self._ssh is not None)
        wishes = {"ram": str(RAM_MIB), "extra_flags": flags}
        wishes |= self._ssh.wishes if self._ssh is not None else {}
        keys = {self._layout.wish_key(INSTANCE, name): value for name, value in (wishes | {"host": HOST}).items()}
        width = max(map(len, keys))
        # A value of several lines stands in one column.
        between = "\n" + " " * (width + 2)
        lines = [f"{key:{width}}  {between.join(value.splitlines())}" for key, value in keys.items()]
        say("keys", *"\n".join(lines).splitlines())
        await store.txn([], [Put(key, value.encode()) for key, value in keys.items()])

    async def _wait_for_hello(self, store: Store) -> Status:
        say("console", "what the guest says on its serial port:")
        self._console = asyncio.create_task(self._show_console())

        async def hello() -> Status:
            status = await running(store, self._layout, INSTANCE)
            await self._hello.wait()
            return status

        status = await self._while_alive(hello(), doing="waiting for the guest's hello", deadline_s=HELLO_DEADLINE_S)
        self.said_hello = True
        return status

    async def _show_console(self) -> None:
        """Print the console's lines as they come; cancelled at the end."""
        async for line in follow_lines(self._run_dir / "console.log"):
            say("", f"│ {line}", fold=False)
            if line == HELLO:
                self._hello.set()
            elif line == SSH_READY:
                self._ssh_ready.set()

    async def _show_list(self) -> None:
        click.echo()
        say("list", f"{_program()} list")
        click.echo()
        # It writes to this terminal, so that it shows what it would show there.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvmsupervisor", "list"), env=self._environ, start_new_session=True
        )
        try:
            async with asyncio.timeout(LIST_DEADLINE_S):
                code = await process.wait()
        except TimeoutError as error:
            raise DemoError(f"`list` took longer than {LIST_DEADLINE_S:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if code != 0:
            raise DemoError(f"`list` ended with exit code {code}")

    async def _show_ssh(self) -> None:
        """Run a command in the guest, so that it is known whether people can log in."""
        if self._ssh is None:
            return
        try:
            async with asyncio.timeout(SSH_DEADLINE_S):
                await self._ssh_ready.wait()
                answer = await self._ssh.ask("uname -a; uptime", self._environ)
        except (TimeoutError, DemoError) as error:
            say("ssh", f"no answer: {error or f'the guest was not ready for it within {SSH_DEADLINE_S:g} s'}")
            self._ssh = None
        else:
            click.echo()
            say("ssh", f"{self._ssh.line} 'uname -a; uptime'")
            say("", *answer.splitlines())

    def _show_what_to_try(self, status: Status) -> None:
        assert self._supervisor is not None
        words = {
            "key": self._layout.instance_prefix(INSTANCE),
            "facts": self._layout.facts,
            "program": _program(),
            "id": INSTANCE,
            "http": self._http,
            "pid": str(status.pid),
            "supervisor": str(self._supervisor.pid),
        }
        click.secho("\nIt runs. To try in another terminal:\n", bold=True)
        click.echo(f"  export ETCDCTL_API=3 ETCDCTL_ENDPOINTS={self._endpoint}")
        click.echo(f"  export ETCD_ENDPOINTS={self._endpoint} KVM_RUN_DIR={self._settings.run_dir}")
        commands = {
            title: [(template.format(**words), meaning) for template, meaning in lines]
            for title, lines in TO_TRY.items()
        }
        width = max(len(command) for lines in commands.values() for command, _ in lines)
        for title, lines in commands.items():
            click.echo(f"\n{title}")
            for command, meaning in lines:
                comment = click.style(f"# {meaning}", dim=True) if meaning else ""
                click.echo(f"  {command:{width}}  {comment}".rstrip())
            if title == "Log in" and self._ssh is not None:
                click.echo(f"  {self._ssh.line}")
        click.secho(f"\n{NEXT}", bold=True)
        click.secho("Changes are shown below. Ctrl-C shuts the guest down and removes everything.\n", bold=True)

    async def _stay(self, store: Store) -> None:
        """Show what changes, until cancelled; a supervisor that was told to end gets a successor."""
        while True:
            try:
                await self._while_alive(show_changes(store, self._layout), doing="watching its guests")
            except ChildEnded as ended:
                # Ended by a signal, or in order: the person wants to see what happens to the guests.
                if ended.child is not self._supervisor or ended.code > 0:
                    raise
                await self._start_supervisor(store)

    # --- what the steps share ----------------------------------------------------------------------------------

    async def _start(self, name: str, command: Sequence[str]) -> Child:
        return await Child.start(name, command, environ=self._environ, folder=self._folder)

    async def _while_alive(self, work: Awaitable[T], *, doing: str, deadline_s: float | None = None) -> T:
        children = [child for child in (self._etcd, self._supervisor) if child is not None]
        return await while_alive(children, work, doing=doing, deadline_s=deadline_s)

    def _all_alive(self) -> bool:
        return all(child is not None and child.alive for child in (self._etcd, self._supervisor))


async def show_changes(store: Store, layout: Layout) -> None:
    """Print every change of a phase or its reason, for ever."""
    shown: dict[InstanceId, tuple[Phase, str]] = {}
    async with aclosing(follow_statuses(store, layout)) as changes:
        async for statuses in changes:
            for instance, status in statuses.items():
                if shown.get(instance) != (status.phase, status.reason):
                    say(status.phase.value, f"{instance}: {status.reason}")
            for instance in shown.keys() - statuses.keys():
                say("removed", instance)
            shown = {instance: (status.phase, status.reason) for instance, status in statuses.items()}


def say(name: str, *lines: str, fold: bool = True) -> None:
    """Print a word, and lines beside it, which a terminal folds or cuts to its width."""
    width = shutil.get_terminal_size().columns - MARGIN if sys.stdout.isatty() else None
    word = name
    for line in map(printable, lines):
        parts = [line] if width is None else textwrap.wrap(line, width) if fold else [line[:width]]
        for part in parts:
            click.echo(f"{click.style(f'{word:{MARGIN - 1}}', fg='cyan', bold=True)} {part}")
            word = ""


def _program() -> str:
    """How a person calls this program from here."""
    called = Path(sys.argv[0])
    return called.name if shutil.which(called.name) else _short(called.absolute())


def _short(path: Path) -> str:
    """A path, as seen from here when it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

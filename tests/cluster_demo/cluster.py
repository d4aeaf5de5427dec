"""What the demo shows: three members of etcd, Ceph, three hosts, an operator's desk, each in a network of its own.

All of it is real but the hosts' walls: they share one kernel. A host's processes are in a PID namespace of their own,
whose end is that of all of them at one instant, as a power failure is. Everything here blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvmsupervisor.adapters.etcd import Etcd, EtcdConfig
from kvmsupervisor.cli.demo.guest import MINIMUM_RAM_MIB, Guest, build_guest, cpio
from tests.chaos.fabric import SUBNET, Fabric, Node
from tests.cluster_demo.apart import write_desk
from tests.cluster_demo.picture import Picture, Said
from tests.cluster_demo.pings import Pinger, Pings, pinging
from tests.cluster_demo.terms import GUESTS, HOSTS, TTL_S, WATCH_S, GuestPlan
from tests.support.ceph import CLIENT_CAPS, Ceph
from tests.support.checkout import ROOT
from tests.support.etcd import EtcdCluster

ROOM_MIB = 1024
"""Of a host, for its guests. All hosts are this one machine: without a bound each would have all of its memory."""

COMMAND_S = 330.0
"""How long one command may take: longer than `--timeout` of those that wait, by default."""

KEYS = "/kvm"
"""Prefix of all keys, wishes and facts."""

RECONNECT_S = 0.5
"""Before etcd is asked again, when it did not answer."""

INIT = """#!/bin/sh
# Beside the guest's own init: an address, and a counter on its first disk, which knows how often it has booted.
mount -t devtmpfs dev /dev # the shell wants /dev/null for what runs in the background
{
    until ifconfig eth0 "$addr" netmask 255.255.255.0 up; do sleep 0.1; done 2>/dev/null
    until [ -b /dev/vda ]; do sleep 0.1; done
    set -- $(dd if=/dev/vda bs=512 count=1 2>/dev/null)
    boot=$((${1:-0} + 1)) written=${2:-0}
    while :; do
        written=$((written + 1))
        printf '%-511s\\n' "$boot $written" | dd of=/dev/vda bs=512 count=1 conv=notrunc,fsync 2>/dev/null
        read -r uptime idle </proc/uptime
        echo "DISK boot $boot up ${uptime%.*} written $written" >/dev/ttyS0
        sleep 2
    done
} &
exec /init
"""

_SAYS = re.compile(r"DISK boot (\d+) up (\d+) written (\d+)")

_POWER_ON = (
    'mount -t proc proc /proc && mount --bind "$0" /proc/sys/kernel/random/boot_id && cd "$1" && shift && exec "$@"'
)
"""The first process of a host: its own processes, and another boot than the last. `$0` is the file with its id."""


class PluggedHost:
    """A host that can lose its power.

    Args:
        node: its network.
        folder: of its files; made here.
        settings: of its supervisor.
    """

    def __init__(self, node: Node, folder: Path, settings: dict[str, str]) -> None:
        self.node = node
        self.run_dir = folder / "run"
        self.log = folder / "log"
        folder.mkdir()
        self._boot_id = folder / "boot_id"
        self._settings = {
            **settings,
            "KVM_HOSTNAME": node.name,
            "KVM_RUN_DIR": str(self.run_dir),
            "KVM_STATE_DIR": str(folder / "state"),
            "KVM_LISTEN": f"{node.address}:9746",
            "KVM_MIGRATION_LISTEN": f"{node.address}:9747",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._make_bridge()

    def _make_bridge(self) -> None:
        """Put its card into a bridge, as a host for virtual machines has it; the bridge has the address."""
        last = int(self.node.address.rpartition(".")[2])
        for words in (
            "ip address flush dev lan0",
            # An address of its own: otherwise it would have that of the last tap that was plugged in.
            f"ip link add br0 address 02:97:00:00:00:{last:02x} type bridge",
            "ip link set lan0 master br0",
            f"ip address add {self.node.address}/24 dev br0",
            "ip link set br0 up",
        ):
            self.node.inside.run(*words.split())

    @property
    def ended(self) -> bool:
        """Whether its supervisor has ended, without its plug being pulled."""
        return self._process is not None and self._process.poll() is not None

    def power_on(self) -> None:
        """Boot: nothing in /run, another boot id, a supervisor that starts; does not wait for it."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        self.node.inside.run("ip", "link", "set", "lan0", "up")
        words = [
            *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation=private"),
            *("sh", "-c", _POWER_ON, str(self._boot_id), str(ROOT)),
            *(sys.executable, "-m", "kvmsupervisor", "run"),
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.node.inside.command(*words),
                env=environment(self._settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def pull_plug(self) -> None:
        """SIGKILL for all its processes in one instant, its link down."""
        self.node.inside.run("ip", "link", "set", "lan0", "down")
        if self._process is not None:
            # The kernel ends its child, the first process of the host, with it; and with that one all others.
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def console(self, guest: str) -> str:
        """The last kilobytes that a guest has said there."""
        with contextlib.suppress(OSError), (self.run_dir / guest / "console.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return file.read().decode(errors="replace")
        return ""


class Follower:
    """The keys, kept in step with etcd by one watch, in a thread of its own."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self.keys: dict[str, bytes] = {}
        self._endpoints = tuple(endpoints)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._follow()), daemon=True)
        self._thread.start()

    async def _follow(self) -> None:
        etcd = Etcd(EtcdConfig(endpoints=self._endpoints))
        async with etcd.watch(KEYS, 1) as watch:
            async for batch in watch:
                keys = dict(self.keys)
                for event in batch.events:
                    key = event.kv.key.decode(errors="replace")
                    if event.deleted:
                        keys.pop(key, None)
                    else:
                        keys[key] = event.kv.value
                # Put in place as a whole: others read it meanwhile.
                self.keys = keys


class Cluster:
    """The real cluster, made part after part.

    Args:
        stack: ends what is made here.
        folder: for all files, in memory and with a short path.
    """

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._etcd: EtcdCluster | None = None
        self._ceph: Ceph | None = None
        self._follower: Follower | None = None
        self._pinger: Pinger | None = None
        self._hosts: dict[str, PluggedHost] = {}
        self._desk: dict[str, str] = {}
        self._newest: dict[str, Said] = {}
        self._guest: Guest | None = None

    # --- time and sight ---------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds of a clock that only goes on."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def look(self) -> Picture:
        """What the keys say now."""
        keys = {} if self._follower is None else self._follower.keys
        return Picture.of(keys, HOSTS, tuple(plan.name for plan in GUESTS))

    @property
    def pings(self) -> Pings:
        """Of the first guest."""
        return Pings() if self._pinger is None else self._pinger.pings

    def says(self, guest: str, host: str) -> Said | None:
        """What a guest last said on that host; None while that is older than what it has said elsewhere since."""
        found = _SAYS.findall(self._hosts[host].console(guest)) if host in self._hosts else ()
        if not found:
            return None
        said = Said(*map(int, found[-1]))
        newest = self._newest.setdefault(guest, said)
        if said.written < newest.written:
            return None
        self._newest[guest] = said
        return said

    def trouble(self) -> str | None:
        """What should run and does not; None where all does."""
        ended = [name for name, host in self._hosts.items() if host.ended]
        if ended:
            return f"the supervisor of {ended[0]} ended by itself: {self._hosts[ended[0]].log}"
        if self._pinger is not None and self._pinger.ended:
            return "`ping` ended by itself"
        return None

    def blocklist(self) -> set[str]:
        """The clients that Ceph serves no more."""
        assert self._ceph is not None
        return self._ceph.blocklist()

    # --- what is done -----------------------------------------------------------------------------------------

    def prepare_guest(self) -> None:
        """Build the guest, or take the one that an earlier run, or the tests, have built."""
        built = build_guest(ROOT / ".cache" / "guest")
        here = self._folder / "guest"
        here.mkdir()
        shutil.copy(built.kernel, here / "vmlinuz")
        # The kernel unpacks one archive after the other.
        (here / "initramfs").write_bytes(built.initramfs.read_bytes() + cpio({"cluster-init": INIT.encode()}, {}))
        self._guest = Guest.at(here)

    def start_etcd(self) -> None:
        """Networks, and three members of etcd; this thread, and what it starts, is at the operator's desk from here."""
        self._fabric = Fabric(self._stack)
        desk = self._fabric.node("desk")
        # Not left again: the world ends with this process.
        self._stack.enter_context(desk.inside.entered())
        members = [self._fabric.node(name) for name in ("etcd1", "etcd2", "etcd3")]
        self._etcd = self._stack.enter_context(EtcdCluster(3, places=[one.place for one in members], heartbeat_ms=100))
        self._desk = {"ETCD_ENDPOINTS": ",".join(self._etcd.endpoints), "KVM_CONFIG": "/dev/null"}
        write_desk(self._folder, {"PATH": os.environ["PATH"], **self._desk})
        self._follower = Follower(self._etcd.endpoints)

    def start_ceph(self) -> None:
        """A monitor, and an OSD in memory."""
        conf = f"osd client watch timeout = {WATCH_S}"
        self._ceph = self._stack.enter_context(Ceph(self._fabric.node("ceph").place, conf=conf))
        self._ceph.new_client("vm", CLIENT_CAPS)

    def start_host(self, name: str) -> None:
        """A host with its supervisor; does not wait for it."""
        assert self._ceph is not None
        total_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        settings = {
            **self._desk,
            "BRIDGE_IF": "br0",
            "CEPH_CONF": str(self._ceph.conf),
            "CEPH_ID": "vm",
            "KVM_ACCEL": "tcg",
            "KVM_CGROUP": "none",
            "KVM_ETCD_WALL": "off",
            "KVM_EXTRA_FLAGS": "any",
            "KVM_MEMORY_RESERVE": f"{max(0, total_mib - ROOM_MIB)}M",
            "KVM_QEMU_USER": "",
            "KVM_SESSION_TTL": f"{TTL_S}",
        }
        host = PluggedHost(self._fabric.node(name), self._folder / name, settings)
        self._hosts[name] = host
        self._stack.callback(host.pull_plug)
        host.power_on()

    def write_guests(self, file: str) -> None:
        """Write the file from which `apply` makes the guests."""
        assert self._guest is not None
        (self._folder / file).write_text("\n".join(guest_lines(plan, self._guest) for plan in GUESTS))

    def begin_pings(self) -> None:
        """Ping the first guest from the desk."""
        self._pinger = self._stack.enter_context(pinging(GUESTS[0].address))

    def pull_plug(self, host: str) -> None:
        """End all of a host at one instant."""
        self._hosts[host].pull_plug()

    def power_on(self, host: str) -> None:
        """Boot it again; does not wait for it."""
        self._hosts[host].power_on()

    def command(self, words: Sequence[str], on_line: Callable[[str], None]) -> int:
        """Run a command of `kvmsupervisor` at the desk; return its exit status.

        Args:
            words: behind the program's name.
            on_line: is told each line that it prints.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmsupervisor", *words],
            cwd=self._folder,
            env=environment({**self._desk, "PYTHONPATH": str(ROOT)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        limit = threading.Timer(COMMAND_S, process.kill)
        limit.daemon = True
        limit.start()
        try:
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    on_line(line.rstrip())
        except BaseException:
            process.kill()
            raise
        finally:
            limit.cancel()
        return process.returncode

    def keep_logs(self, folder: Path) -> None:
        """Copy what is needed to see what went wrong."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, host in self._hosts.items():
            with contextlib.suppress(OSError):
                shutil.copy(host.log, folder / f"{name}.log")
            for console in host.run_dir.glob("*/console.log"):
                shutil.copy(console, folder / f"{name}-{console.parent.name}-console.log")
        for log in self._ceph.logs if self._ceph is not None else ():
            shutil.copy(log, folder / f"ceph-{log.name}")


def environment(settings: dict[str, str]) -> dict[str, str]:
    """Of a program of the demo: nothing of this process's own settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return kept | settings


def guest_lines(plan: GuestPlan, guest: Guest) -> str:
    """A guest as `apply` reads it."""
    *options, words = guest.options(tag=plan.name, heartbeat_s=3600)
    flags = [*options, f"'{words} addr={plan.address} rdinit=/cluster-init'"]
    keys = {
        "host": plan.host,
        "hosts": " ".join(plan.hosts),
        "ram": f"{MINIMUM_RAM_MIB}",
        "rbd": f"rbd/{plan.name} size=16M",
        "mac": plan.mac,
        "bridge": "br0",
        "extra_flags": " ".join(flags),
    }
    return "\n".join([f"{plan.name}:", *(f"  {name}: {value}" for name, value in keys.items())]) + "\n"


assert all(plan.address.startswith(f"{SUBNET}.") for plan in GUESTS)

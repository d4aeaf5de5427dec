"""A real Ceph cluster for tests, in a folder of its own: a monitor, and an OSD or several in memory.

It starts in some seconds, so one serves all tests of a worker: make images and clients of your own names
(`Ceph.image`), harm nothing. Everything here blocks: call it from fixtures, or through `asyncio.to_thread`.
Fixtures, to be imported by a conftest:

- `ceph`: the cluster of this worker, its monitor running.
- `ceph_image`: the name of an image that no other test has, 8 MiB in the pool `rbd`, with `exclusive-lock`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.again import start_again
from tests.support.ceph_monitor import Monitor, Silent, ask_daemon
from tests.support.etcd import _reaper, free_port
from tests.support.place import HERE, Place
from tests.support.processes import freeze

READY_S = 60.0
"""How long monitor or OSD may take to serve: generous, for a machine that does other things too."""

COMMAND_S = 30.0
"""How long one call of a tool may take."""

POOL = "rbd"
FEATURES = "layering,exclusive-lock"

CLIENT_CAPS = {
    "mon": 'profile rbd, allow command "osd blocklist" with blocklistop=rm',
    "osd": f"profile rbd pool={POOL}",
}
"""What docs/ceph.md tells operators to give: a test holds that this is what stands there, and that it is enough."""

_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:{address}:{v2},v1:{address}:{v1}]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/$name.keyring
ms bind ipv4 = true
ms bind ipv6 = false
log file = {folder}/$name.log
log to stderr = false
err to stderr = true
mon cluster log file = {folder}/cluster.log
pid file =
run dir = {folder}
crash dir = {folder}
# One name for all would make each new client wait for the socket of another, for 10 s.
admin socket = {folder}/$name.$pid.$cctid.asok
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = {folder}/mon
mon data avail warn = 0
mon data avail crit = 0
# How long changes wait for others to join them; one second and a twentieth by default.
paxos propose interval = 0.05
paxos min wait = 0.01
mon osd full ratio = 0.99
osd data = {folder}/osd.$id
osd objectstore = memstore
# An OSD that is alone and was frozen for longer than its lease on reads serves nobody ever again: what would renew the
# lease is an answer of other OSDs (Ceph's tracker, 80404; ceph-container #1682). In share of the heartbeat's 20 s.
osd pool default read lease ratio = 100
# Otherwise it ends at once, and what it has in memory is gone (`lose_power`).
osd fast shutdown = false
memstore device bytes = 1073741824
osd erasure code plugins =
# Since Ceph 18, of a plugin in a package of its own; OSDs in memory have no block devices.
osd extblkdev plugins =
{classes}
{more}
"""

_OSD_CONF = """\
[osd.{osd}]
public addr = {address}
cluster addr = {address}
"""


class CephError(Exception):
    """A daemon ended or did not serve in time, or a tool failed; the message holds its words."""


class Ceph:
    """The cluster. As a context manager it starts, and leaves nothing behind.

    Args:
        place: where its daemons listen, and its tools run.
        osds: how many. The first has the monitor's address, each other one the next address.
        conf: more lines of `[global]`.
    """

    def __init__(self, place: Place = HERE, *, osds: int = 1, conf: str = "") -> None:
        self.place = place
        self.folder = Path()
        self._osds = range(osds)
        self._more = conf
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._monitor: Monitor | None = None

    def __enter__(self) -> Self:
        start_again(
            prepare=self._make_folder,
            start=self._start,
            close=self.close,
            lost=lambda error: isinstance(error, CephError) and "unable to bind" in str(error),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_folder(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvs"))

    # --- where things are -------------------------------------------------------------------------------------

    @property
    def conf(self) -> Path:
        """Its `ceph.conf`."""
        return self.folder / "ceph.conf"

    @property
    def admin_keyring(self) -> Path:
        """The keyring of `client.admin`."""
        return self.folder / "client.admin.keyring"

    @property
    def logs(self) -> list[Path]:
        """What its daemons wrote, and said."""
        return sorted((*self.folder.glob("*.log"), *self.folder.glob("*.out")))

    # --- its tools --------------------------------------------------------------------------------------------

    def ceph(self, *args: str) -> str:
        """What `ceph` would print as `client.admin`; see `ceph_monitor`."""
        if args[0] == "tell" or "--id" in args:
            return self._run("ceph", "--conf", str(self.conf), *args)
        words, more = args, dict[str, str]()
        if args[-2:-1] == ("--format",):
            words, more = args[:-2], {"format": args[-1]}
        self._monitor = self._monitor or Monitor(self.conf, self.place, _environment())
        try:
            status, out, said = self._monitor.ask(words, more, COMMAND_S)
        except Silent as error:
            self._check_daemons()
            raise CephError(f"ceph {' '.join(args)}: no answer after {COMMAND_S} s\n{self._log_end()}") from error
        if status != 0:
            self._check_daemons()
            raise CephError(f"ceph {' '.join(args)}: {status}: {said}")
        return out

    def rbd(self, *args: str, name: str = "admin") -> str:
        """Run `rbd`; return what it printed."""
        return self._run("rbd", "--conf", str(self.conf), "--id", name, *args)

    def rbd_create(self, spec: str, size: str = "8M", features: str = FEATURES) -> None:
        """Create an image, `POOL/IMAGE`."""
        self.rbd("create", spec, "--size", size, "--image-feature", features)

    def new_client(self, name: str, caps: Mapping[str, str]) -> Path:
        """Make `client.NAME` with these capabilities; return its keyring, where tools that know `conf` find it."""
        keyring = self.folder / f"client.{name}.keyring"
        pairs = [word for pair in caps.items() for word in pair]
        keyring.write_text(self.ceph("auth", "get-or-create", f"client.{name}", *pairs))
        return keyring

    def watchers(self, spec: str) -> set[str]:
        """The addresses of those that have an image open, as `rbd status` names them."""
        found = json.loads(self.rbd("status", spec, "--format", "json"))
        return {watcher["address"] for watcher in found.get("watchers", ())}

    def blocklist(self) -> set[str]:
        """The addresses that are shut out now."""
        return {line.split()[0] for line in self.ceph("osd", "blocklist", "ls").splitlines()}

    def osd_address(self, osd: int) -> str:
        """Where an OSD listens, and whence it connects."""
        return str(ipaddress.ip_address(self.place.address) + osd)

    def osd_epoch(self, osd: int) -> int:
        """The newest map that an OSD has, by itself: asking tells it nothing."""
        return int(self._ask_osd(osd, "status")["newest_map"])

    def osd_requests(self, osd: int) -> int:
        """How many requests an OSD has not answered yet."""
        return int(self._ask_osd(osd, "dump_ops_in_flight")["num_ops"])

    def whereabouts(self, pool: str, thing: str) -> tuple[str, int]:
        """The placement group of an object, and the OSD that serves it."""
        found = json.loads(self.ceph("osd", "map", pool, thing, "--format", "json"))
        return found["pgid"], found["acting_primary"]

    # --- outages ----------------------------------------------------------------------------------------------

    def stop_mon(self) -> None:
        """Freeze the monitor: its sockets stay, and nothing answers."""
        self._forget_monitor()
        freeze(self._daemons["mon"].pid)

    def cont_mon(self) -> None:
        """End `stop_mon`; returns when the monitor answers."""
        self._continue("mon")
        self.ceph("mon", "stat")

    def stop_osd(self) -> None:
        """Freeze the (first) OSD."""
        freeze(self._daemons["osd.0"].pid)

    def freeze(self) -> None:
        """Freeze both."""
        self.stop_mon()
        self.stop_osd()

    def thaw(self) -> None:
        """End `freeze`; does not wait."""
        self._continue("osd.0")
        self._continue("mon")

    def lose_power(self) -> None:
        """Kill the monitor, and end the OSD so that it writes down what it has in memory, as a disk would have it."""
        self._forget_monitor()
        self._end("mon", signal.SIGKILL)
        for osd in self._osds:
            self._end(f"osd.{osd}", signal.SIGTERM)

    def get_power(self) -> None:
        """End `lose_power`; does not wait."""
        self._spawn_daemons()

    def close(self) -> None:
        """End the daemons and delete their data."""
        self._forget_monitor()
        for name in list(self._daemons):
            self._end(name, signal.SIGKILL)
        shutil.rmtree(self.folder)

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        daemon.send_signal(signal.SIGCONT)
        daemon.wait(timeout=READY_S)
        _reaper().forget(daemon.pid)

    def _spawn_daemons(self) -> None:
        self._spawn("mon", "ceph-mon", "-i", "a")
        for osd in self._osds:
            self._spawn_osd(osd)

    # --- inside -----------------------------------------------------------------------------------------------

    def _ask_osd(self, osd: int, command: str) -> dict[str, Any]:
        (path,) = self.folder.glob(f"osd.{osd}.*.asok")
        return ask_daemon(path, command, COMMAND_S)

    def _forget_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.drop()
        # Another folder, when it is started again.
        self._monitor = None

    def _continue(self, name: str) -> None:
        self._daemons[name].send_signal(signal.SIGCONT)

    def _start(self) -> None:
        v2, v1 = free_port(), free_port()
        fsid = str(uuid.uuid4())
        # Where tools/install-system unpacks them; a package has them where the OSD looks by itself.
        program = shutil.which("ceph-osd")
        classes = Path(program or "").parent / "rados-classes"
        found = f"osd class dir = {classes}" if classes.is_dir() else ""
        address = self.place.address
        conf = _CONF.format(
            folder=self.folder, fsid=fsid, address=address, v1=v1, v2=v2, classes=found, more=self._more
        )
        sections = (_OSD_CONF.format(osd=osd, address=self.osd_address(osd)) for osd in self._osds)
        # The general section is the last one: tests add lines to it.
        self.conf.write_text("".join((*sections, conf)))
        self._make_monitor(fsid, f"[v2:{address}:{v2},v1:{address}:{v1}]")
        self._spawn("mon", "ceph-mon", "-i", "a")
        for osd in self._osds:
            self._make_osd(osd, str(uuid.uuid4()))
            self._spawn_osd(osd)
        self.ceph("osd", "pool", "create", POOL, "8", "8")
        self._await_osds()
        self.rbd("pool", "init", POOL)

    def _make_monitor(self, fsid: str, addresses: str) -> None:
        keys = self.folder / "mon.keyring"
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        self._run("ceph-authtool", "-C", str(keys), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", "-C", str(self.admin_keyring), "--gen-key", "-n", "client.admin", *everything)
        self._run("ceph-authtool", str(keys), "--import-keyring", str(self.admin_keyring))
        self._run("monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, str(self.folder / "monmap"))
        self._run(
            *("ceph-mon", "--conf", str(self.conf), "--mkfs", "-i", "a"),
            *("--monmap", str(self.folder / "monmap"), "--keyring", str(keys)),
        )
        shutil.copy(keys, self.folder / "mon" / "keyring")

    def _make_osd(self, osd: int, osd_uuid: str) -> None:
        keyring = self.folder / f"osd.{osd}.keyring"
        (self.folder / f"osd.{osd}").mkdir()
        # Without the same uuid here and there the OSD would boot for ever.
        self.ceph("osd", "new", osd_uuid)
        caps = ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd")
        keyring.write_text(self.ceph("auth", "get-or-create", f"osd.{osd}", *caps))
        self._run(
            *("ceph-osd", "--conf", str(self.conf), "-i", str(osd), "--mkfs", "--no-mon-config"),
            *("--osd-uuid", osd_uuid, "--keyring", str(keyring)),
        )

    def _spawn_osd(self, osd: int) -> None:
        self._spawn(f"osd.{osd}", "ceph-osd", "-i", str(osd))

    def _spawn(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            daemon = subprocess.Popen(
                self.place.around(program, "--conf", str(self.conf), "--foreground", *args),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=_environment(),
                start_new_session=True,
            )
        self._daemons[name] = daemon
        _reaper().watch(daemon.pid)

    def _await_osds(self) -> None:
        deadline = time.monotonic() + READY_S
        while json.loads(self.ceph("osd", "stat", "--format", "json"))["num_up_osds"] < len(self._osds):
            self._check_daemons()
            if time.monotonic() > deadline:
                raise CephError(f"an OSD is not up after {READY_S} s:\n{self._log_end()}")
            time.sleep(0.05)

    def _check_daemons(self) -> None:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise CephError(f"ceph-{name} ended with {daemon.returncode}:\n{self._log_end()}")

    def _log_end(self) -> str:
        texts = []
        for path in self.logs:
            with contextlib.suppress(OSError):
                texts += [f"{path.name}: {line}" for line in path.read_text(errors="replace").splitlines()[-10:]]
        return "\n".join(texts)

    def _run(self, *argv: str) -> str:
        try:
            done = subprocess.run(
                self.place.around(*argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                env=_environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            self._check_daemons()
            raise CephError(f"{' '.join(argv)}: no answer after {COMMAND_S} s\n{self._log_end()}") from error
        if done.returncode != 0:
            self._check_daemons()
            raise CephError(f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr}")
        return done.stdout


def _environment() -> dict[str, str]:
    """Without `CEPH_ARGS` and `CEPH_CONF` of a person's shell."""
    return {"PATH": os.environ["PATH"]}


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """The cluster of this worker; see the module."""
    with Ceph() as cluster:
        yield cluster


@pytest.fixture
def ceph_image(ceph: Ceph) -> str:
    """The name of an image in the pool `rbd` that no other test has."""
    name = f"t{uuid.uuid4().hex[:8]}"
    ceph.rbd_create(f"{POOL}/{name}")
    return name

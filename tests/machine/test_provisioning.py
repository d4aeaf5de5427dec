"""What is made ready on a host for a QEMU, and what is missing there: real files, ports and web servers."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from kvmsupervisor.adapters.apart import NO_WALLS
from kvmsupervisor.adapters.cgroup import CgroupFailed
from kvmsupervisor.adapters.cgroup.manager import Cgroup, NoCgroups, SameCgroup
from kvmsupervisor.adapters.network import Tap
from kvmsupervisor.adapters.rundir import InstanceDir, RunDir
from kvmsupervisor.adapters.users import QemuUsers
from kvmsupervisor.domain.argv import Channels, HostSide
from kvmsupervisor.domain.hardware import Ovmf, TapFds
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.limits import Limits
from kvmsupervisor.domain.spec import Firmware, Nic, Secret, Spec
from kvmsupervisor.domain.uids import UidRange
from kvmsupervisor.domain.user_network import forwards
from kvmsupervisor.machine.cdrom import Media
from kvmsupervisor.machine.handover import HostFiles, Prepared
from kvmsupervisor.machine.provisioning import HOST_RETRY_S, MEDIA_RETRY_S, NotReady, Opened, Provisioner
from kvmsupervisor.machine.system import REAL
from tests.fakes.clock import settle
from tests.fakes.images import Stock
from tests.fakes.network import FakeNetwork
from tests.fakes.storage import FakeDisks, local_disks
from tests.support import web
from tests.support.host import KnownTypes

ONE, TWO = InstanceId("one"), InstanceId("two")
UUID_OF_ONE = UUID(int=1)
TINY = Spec(ram_mib=64)
NOBODY = pwd.getpwnam("nobody")
CHANNELS = Channels(qmp=1, spare=2, console=3, agent=4, console_log=5)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


UNCONFINED = QemuUsers()


class NotedCgroups(NoCgroups):
    """Cgroups that note how they were asked for, and may fail.

    Attributes:
        closed: how many were closed.
    """

    def __init__(self) -> None:
        super().__init__(survives_container=True)
        self.trouble: str | None = None
        self.closed = 0

    async def prepare(self, instance: InstanceId, incarnation: str, limits: Limits) -> Cgroup:
        if self.trouble is not None:
            raise CgroupFailed(self.trouble)
        cgroups = self

        class Noted(SameCgroup):
            def close(self) -> None:
                cgroups.closed += 1

        return Noted()


class Bench:
    """A provisioner, with folders of its own.

    Attributes:
        network: where its taps come from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self.cgroups = NotedCgroups()
        self.network = FakeNetwork()
        (path / "code.fd").write_bytes(b"code")
        (path / "vars.fd").write_bytes(b"variables")
        self.host = HostSide(
            qemu="qemu",
            accel="tcg",
            bridge_if="br0",
            ovmf=Ovmf(code=str(path / "code.fd"), variables=str(path / "vars.fd")),
        )
        self.provisioner = self.make()

    def make(self, users: QemuUsers = UNCONFINED) -> Provisioner:
        files, contents = local_disks(self.path / "disks"), Stock(self.path).contents
        self.provisioner = Provisioner(
            system=replace(REAL, network=self.network, ensure_device=lambda device: False),
            host=self.host,
            files=HostFiles(state_dir=self.state, bridge_owner="of-a", media_root=self.path),
            users=users,
            walls=NO_WALLS,
            types=KnownTypes(),
            cgroups=self.cgroups,
            disks=FakeDisks(),
            local_disks=files,
            contents=contents,
            media=Media(files, contents),
        )
        return self.provisioner

    def directory(self, instance: InstanceId = ONE) -> InstanceDir:
        return RunDir(self.path).instance(instance)

    async def prepare(self, spec: Spec, *, is_first: bool = True) -> Prepared:
        return await self.provisioner.prepare(
            ONE, uuid=UUID_OF_ONE, spec=spec, directory=self.directory(), files={}, images=(), is_first=is_first
        )

    async def open(self, spec: Spec, instance: InstanceId = ONE, machine: str | None = None) -> Opened:
        ready = Prepared(spec=spec)
        directory = self.directory(instance)
        return await self.provisioner.open(instance, "incarnation", ready=ready, machine=machine, directory=directory)

    async def start_of(self, ready: Prepared) -> Opened:
        directory = self.directory()
        return await self.provisioner.open(ONE, "incarnation", ready=ready, machine="pc-q35-7.2", directory=directory)

    async def refused(self, spec: Spec, instance: InstanceId = ONE) -> NotReady:
        with pytest.raises(NotReady) as caught:
            await self.open(spec, instance)
        return caught.value


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Its own folders, and taps that are no taps. At the end no descriptor may be left."""
    before = descriptors()
    path = Path(tempfile.mkdtemp(prefix="kvs"))
    # QEMU's user looks into it, too.
    path.chmod(0o755)
    made = Bench(path)
    yield made
    shutil.rmtree(path)
    assert not any(is_open(tap) for tap in made.network.taps)
    assert descriptors() <= before


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}  # noqa: PTH110, PTH208


def is_open(tap: Tap) -> bool:
    assert tap.vhost_fd is not None
    return any(os.path.exists(f"/proc/self/fd/{fd}") for fd in (tap.fd, tap.vhost_fd))  # noqa: PTH110


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, mode_of(path)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- what takes its time --------------------------------------------------------------------------------------


def test_what_takes_its_time() -> None:
    """Law: user data and UEFI variables are made ready beforehand; a machine without either waits for nothing."""
    assert not Provisioner.needs_time(replace(TINY, mac="52:54:00:00:00:01", spice_port=5900))
    assert Provisioner.needs_time(replace(TINY, cloud_config="http://h/x"))
    assert Provisioner.needs_time(replace(TINY, firmware=Firmware.UEFI))


async def test_media(bench: Bench) -> None:
    """Law: user data becomes media in the run directory, Ignition a file; the command line gets their paths."""
    async with web.site(cloud=web.ok(b"#cloud-config\n"), ignition=web.ok(b'{"ignition":{"version":"3.4.0"}}')) as site:
        cloud = await bench.prepare(replace(TINY, cloud_config=site.url("/cloud")))
        ignition = await bench.prepare(replace(TINY, cloud_config=site.url("/ignition")))
    assert len(cloud.media) == 2
    assert all(Path(path).parent == bench.directory().path for path in cloud.media)
    assert (cloud.ignition, cloud.notice) == (None, None)
    assert ignition.media == ()
    assert ignition.ignition is not None
    assert read(ignition.ignition) == b'{"ignition":{"version":"3.4.0"}}'


async def test_user_data_that_cannot_be_had(bench: Bench) -> None:
    """Law: it is waited for, the server is not asked often, and the reason names the URL without its password."""
    async with web.site() as site:
        url = site.url("/nothing", user="user:secret@")
        with pytest.raises(NotReady, match=r"cloud-config http://.*/nothing") as caught:
            await bench.prepare(replace(TINY, cloud_config=url))
    assert caught.value.retry_s == MEDIA_RETRY_S
    assert "secret" not in str(caught.value)


async def test_a_copy_of_the_user_data_comes_with_a_notice(bench: Bench) -> None:
    """Law: a machine that started before starts again without its server, and a person is told."""
    async with web.site(cloud=web.ok(b"#cloud-config\n")) as site:
        spec = replace(TINY, cloud_config=site.url("/cloud"))
        first = await bench.prepare(spec)
        del site.answers["/cloud"]
        second = await bench.prepare(spec)
    assert second.media == first.media
    assert second.notice is not None
    assert "the copy that the last start had is used" in second.notice


UEFI = replace(TINY, firmware=Firmware.UEFI)


async def test_uefi_variables_are_made_once(bench: Bench) -> None:
    """Law: a machine begins with the firmware's own variables; those that its guest wrote are kept ever after."""
    ready = await bench.prepare(UEFI)
    file = bench.state / ONE / "nvram.fd"
    assert (ready.variables, ready.variables_image) == (str(file), None)
    assert (file.read_bytes(), mode_of(file)) == (b"variables", 0o600)
    file.write_bytes(b"the guest's")
    (bench.path / "vars.fd").write_bytes(b"of a newer package")
    assert (await bench.prepare(UEFI)).variables == ready.variables
    assert file.read_bytes() == b"the guest's"


async def test_uefi_variables_are_made_whole_or_not_at_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: cut off in the middle, there are no variables rather than half of them; the next time makes them whole."""
    copyfile = shutil.copyfile

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:4])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(NotReady, match=r"UEFI variables cannot be made.*No space left") as caught:
        await bench.prepare(UEFI)
    assert caught.value.retry_s == HOST_RETRY_S
    file = bench.state / ONE / "nvram.fd"
    assert not file.exists()
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    await bench.prepare(UEFI)
    assert file.read_bytes() == b"variables"
    assert [path.name for path in file.parent.iterdir()] == ["nvram.fd"]


async def test_firmware_that_went_away(bench: Bench) -> None:
    """Law: variables that cannot be read are waited for, and named."""
    (bench.path / "vars.fd").unlink()
    with pytest.raises(NotReady, match=r"vars\.fd"):
        await bench.prepare(UEFI)


@as_root
async def test_uefi_variables_are_ours_alone(bench: Bench) -> None:
    """Law: QEMU gets its variables open, and no user of a guest owns them; one of an earlier release is taken back."""
    ready = await bench.prepare(UEFI)
    file = bench.state / ONE / "nvram.fd"
    os.chown(file, NOBODY.pw_uid, NOBODY.pw_gid)
    file.chmod(0o640)
    opened = await bench.start_of(ready)
    with opened.closing:
        nvram = opened.provision(bench.directory(), CHANNELS).nvram
        assert nvram is not None
        assert nvram.file is not None
        assert nvram.file.path == str(file)
        os.write(nvram.file.fd, b"of the guest")
    assert owner_and_mode(file) == (0, 0, 0o600)
    assert file.read_bytes() == b"of the guest"


async def test_no_pipe_is_waited_for_and_no_link_followed(bench: Bench) -> None:
    """Law: what an earlier release's QEMU may have put in the place of its file holds nobody up, and leads nowhere."""
    ready = await bench.prepare(UEFI)
    file = bench.state / ONE / "nvram.fd"
    for kind in ("pipe", "link"):
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to(bench.path / "code.fd")
        with pytest.raises(NotReady, match=r"a file for QEMU cannot be opened: .*nvram\.fd"):
            await bench.start_of(ready)


# --- SPICE ----------------------------------------------------------------------------------------------------


async def test_a_port_that_is_another_instances(bench: Bench) -> None:
    """Law: of two machines with one port the second waits, and is told whose it is; once that is gone it goes on."""
    spec = replace(TINY, spice_port=free_port())
    bench.provisioner.arrived(TWO, spec, None)
    refusal = await bench.refused(spec)
    assert f"port {spec.spice_port} on 127.0.0.1 belongs to instance two" in str(refusal)
    assert refusal.retry_s == HOST_RETRY_S
    await bench.provisioner.left(TWO)
    (await bench.open(spec)).closing.close()


@pytest.mark.parametrize(
    ("mine", "theirs", "conflict"),
    [
        (None, None, True),
        (None, "127.0.0.1", True),
        ("0.0.0.0", None, True),
        (None, "::", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
    ],
)
async def test_addresses_that_overlap(bench: Bench, mine: str | None, theirs: str | None, conflict: bool) -> None:
    """Law: a port is shared by machines on different addresses, unless one of the two listens on all of them."""
    port = free_port()
    bench.provisioner.arrived(TWO, replace(TINY, spice_port=port, spice_addr=theirs), None)
    spec = replace(TINY, spice_port=port, spice_addr=mine)
    if conflict:
        assert "instance two" in str(await bench.refused(spec))
    else:
        (await bench.open(spec)).closing.close()


async def test_a_forwarded_port_is_a_port_like_a_displays(bench: Bench) -> None:
    """Law: of whatever kind two servers are, both instances and both keys are named; UDP and TCP do not meet."""
    port = free_port()
    bench.provisioner.arrived(TWO, replace(TINY, spice_port=port), None)
    taken = replace(TINY, forward=forwards(f"tcp:0.0.0.0:{port}:22"))
    said = str(await bench.refused(taken))
    assert (
        f"forward: TCP port {port} on 0.0.0.0 belongs to instance two (its spice_port), and one wants it, too" in said
    )
    (await bench.open(replace(TINY, forward=forwards(f"udp:{port}:22")))).closing.close()
    both = replace(taken, spice_port=port)
    await bench.provisioner.left(TWO)
    assert "is that of its spice_port, too" in str(await bench.refused(both))


async def test_a_forwarded_port_that_is_another_programs(bench: Bench) -> None:
    """Law: TCP or UDP, it is waited for; an address that is not the host's is told as that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        said = str(await bench.refused(replace(TINY, forward=forwards(f"udp:{port}:53"))))
    assert f"forward: UDP port {port} on 127.0.0.1 cannot be used: another program listens there" in said
    said = str(await bench.refused(replace(TINY, forward=forwards(f"tcp:192.0.2.1:{port}:53"))))
    assert said.startswith("forward: 192.0.2.1 cannot be listened on")


async def test_its_own_port_and_other_ports_are_no_conflict(bench: Bench) -> None:
    """Law: a machine that starts again has its port, machines without display have none."""
    first, second = replace(TINY, spice_port=free_port()), replace(TINY, spice_port=free_port())
    bench.provisioner.arrived(ONE, first, None)
    bench.provisioner.arrived(TWO, TINY, None)
    for spec in (first, second, TINY):
        (await bench.open(spec)).closing.close()
    await bench.provisioner.left(TWO)
    await bench.provisioner.left(TWO)


async def test_a_port_that_is_another_programs(bench: Bench) -> None:
    """Law: a port that some other program has is waited for, and told with its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        refusal = await bench.refused(replace(TINY, spice_port=port))
    assert f"port {port} on 127.0.0.1 cannot be used: another program listens there" in str(refusal)
    (await bench.open(replace(TINY, spice_port=port))).closing.close()


async def test_an_address_that_is_not_the_hosts(bench: Bench) -> None:
    """Law: QEMU is not started to fail at an address that is not there."""
    said = str(await bench.refused(replace(TINY, spice_port=free_port(), spice_addr="192.0.2.1")))
    assert said.startswith("spice_addr: 192.0.2.1 cannot be listened on")
    assert "another port" not in said


SECRET = Secret.of("hunter2 é")


async def test_the_password_is_in_memory(bench: Bench) -> None:
    """Law: QEMU inherits the password in a file without a name, which nobody can change."""
    opened = await bench.open(replace(TINY, spice_port=free_port(), spice_password=SECRET))
    with opened.closing:
        fd = opened.provision(bench.directory(), CHANNELS).spice_password
        assert fd is not None
        assert os.pread(fd, 100, 0) == "hunter2 é".encode()
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{fd}", 0)
    assert not (bench.directory().path / "spice-password").exists()


@pytest.mark.parametrize("changes", [{"spice_port": None}, {"spice_password": None}])
async def test_no_password_without_use(bench: Bench, changes: dict[str, None]) -> None:
    """Law: without a display, or a password, there is no file."""
    spec = replace(replace(TINY, spice_port=free_port(), spice_password=SECRET), **changes)  # type: ignore[arg-type]
    opened = await bench.open(spec)
    opened.closing.close()
    assert opened.provision(bench.directory(), CHANNELS).spice_password is None


# --- taps and cgroups -----------------------------------------------------------------------------------------

NICS = replace(
    TINY,
    mac="52:54:00:00:00:01",
    nics=(Nic(2, "52:54:00:00:00:02", "br1"), Nic(5, "52:54:00:00:00:03", "br2")),
)


async def test_a_tap_for_each_nic(bench: Bench) -> None:
    """Law: one tap a NIC, in their order, each on its bridge, the host's where none is named; all allowed before."""
    opened = await bench.open(NICS)
    assert (bench.network.allowed, bench.network.owner) == (["br0", "br1", "br2"], "of-a")
    assert opened.taps == tuple(bench.network.taps)
    assert opened.bridges == ("br0", "br1", "br2")
    with opened.closing:
        provision = opened.provision(bench.directory(), CHANNELS)
        assert provision.taps == tuple(TapFds(fd=tap.fd, vhost_fd=tap.vhost_fd) for tap in bench.network.taps)
        assert all(is_open(tap) for tap in bench.network.taps)
    assert not any(is_open(tap) for tap in bench.network.taps)
    assert bench.cgroups.closed == 1


@pytest.mark.parametrize(("missing", "opened_before"), [("br0", 0), ("br1", 1), ("br2", 2)])
async def test_taps_are_closed_when_a_later_one_fails(bench: Bench, missing: str, opened_before: int) -> None:
    """Law: what was opened for a start that does not follow is closed."""
    bench.network.bridges = {"br0", "br1", "br2"} - {missing}
    refusal = await bench.refused(NICS)
    assert str(refusal) == f"there is no bridge {missing}"
    assert refusal.retry_s == HOST_RETRY_S
    assert len(bench.network.taps) == opened_before
    assert not any(is_open(tap) for tap in bench.network.taps)


async def test_taps_are_closed_when_the_home_fails(bench: Bench) -> None:
    """Law: the same when there is no cgroup for it."""
    bench.cgroups.trouble = "no cgroup"
    assert str(await bench.refused(NICS)) == "no cgroup"
    assert len(bench.network.taps) == 3
    assert not any(is_open(tap) for tap in bench.network.taps)


async def test_taps_are_closed_when_the_start_is_cut_off(bench: Bench) -> None:
    """Law: the same when it is cancelled while the next one is being opened."""
    bench.network.hung.add("br1")
    opening = asyncio.create_task(bench.open(NICS))
    await settle()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert len(bench.network.taps) == 1
    assert not is_open(bench.network.taps[0])


async def test_a_file_that_cannot_be_opened(bench: Bench) -> None:
    """Law: what was prepared and is gone is waited for, and named."""
    with pytest.raises(NotReady, match=r"a file for QEMU cannot be opened: /nonexistent/seed\.iso"):
        await bench.start_of(Prepared(spec=TINY, media=("/nonexistent/seed.iso",)))


# --- users ----------------------------------------------------------------------------------------------------

OWN = QemuUsers(uids=UidRange(70000, 70017), setpriv="setpriv", groups=(36,))


async def test_each_has_a_user_of_its_own(bench: Bench) -> None:
    """Law: no two have the same one, until the first is gone; a start again has the one that it had."""
    bench.make(OWN)
    one, again, two = [await bench.open(TINY, instance) for instance in (ONE, ONE, TWO)]
    for opened in (one, again, two):
        opened.closing.close()
    assert one.quarters.user is not None
    assert two.quarters.user is not None
    assert again.quarters.user == one.quarters.user
    assert one.quarters.user.uid != two.quarters.user.uid
    assert (one.quarters.user.gid, one.quarters.user.groups) == (one.quarters.user.uid, (one.quarters.user.uid, 36))
    bench.make(OWN).arrived(TWO, TINY, one.quarters.user.uid)
    other = await bench.open(TINY, ONE)
    other.closing.close()
    assert other.quarters.user is not None
    assert other.quarters.user.uid != one.quarters.user.uid


# --- the machine type -----------------------------------------------------------------------------------------


async def test_the_machine_type(bench: Bench) -> None:
    """Law: the type on record is kept; without one it is looked up."""
    first, second = await bench.open(TINY), await bench.open(TINY, machine="pc-q35-5.2")
    for opened in (first, second):
        opened.closing.close()
    assert (first.machine, second.machine) == ("pc-q35-7.2", "pc-q35-5.2")


async def test_everything_reaches_the_command_line(bench: Bench) -> None:
    """Law: what was prepared and opened is what the command line is made of."""
    for name in ("m", "i"):
        (bench.path / name).write_bytes(name.encode())
    medium = str(bench.path / "m")
    ready = Prepared(
        spec=UEFI,
        media=(medium,),
        ignition=str(bench.path / "i"),
        variables=str(bench.path / "vars.fd"),
        ceph_key=Secret.of("key"),
        notice="note",
    )
    opened = await bench.provisioner.open(ONE, "i", ready=ready, machine="pc-q35-5.2", directory=bench.directory())
    provision = opened.provision(bench.directory(), CHANNELS)
    assert (provision.run_dir, provision.channels, provision.machine) == (
        str(bench.directory().path),
        CHANNELS,
        "pc-q35-5.2",
    )
    assert (provision.taps, provision.spice_password) == ((), None)
    assert provision.nvram is not None
    assert provision.nvram.file is not None
    assert provision.ignition is not None
    assert provision.ceph_key is not None
    assert [one.path for one in provision.media] == [medium]
    fds = (provision.media[0].fd, provision.nvram.file.fd, provision.ignition, provision.ceph_key)
    assert set(fds) < set(provision.descriptors)
    assert [os.pread(fd, 100, 0) for fd in fds] == [b"m", b"variables", b"i", b"key"]
    opened.closing.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

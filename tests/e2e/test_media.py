"""User data by the key `cloud-config`, from a real web server to what the guest finds; and a server that is away."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.status import Phase, Status
from tests.support.cluster import Host, Hosts, Keys, Qemu
from tests.support.etcd import free_port

CLOUD_CONFIG = b"#cloud-config\nhostname: from-the-medium\n"
IGNITION = b'{"ignition": {"version": "3.4.0"}}\n'
PASSWORD = "pass-word-of-the-server"  # noqa: S105 - nobody's

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start QEMU as another user")


class Shop:
    """A web server on loopback, with a port of its own, that can be closed and opened again.

    Attributes:
        files: what it serves, by path.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.files: dict[str, bytes] = {}
        self._server: ThreadingHTTPServer | None = None

    def url(self, path: str, *, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.port}{path}"

    def open(self) -> None:
        files = self.files

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = files.get(self.path)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,)).start()

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


@pytest.fixture
def shop() -> Iterator[Shop]:
    """A web server, not open yet."""
    shop = Shop()
    try:
        yield shop
    finally:
        shop.close()


def instance_id(host: Host, instance: str) -> str:
    """What stands on the medium that the instance's QEMU has."""
    argv = ["isoinfo", "-R", "-i", str(host.run_dir / instance / "seed.iso"), "-x", "/meta-data"]
    meta_data = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^instance-id: (\S+)$", meta_data, re.MULTILINE)
    assert found is not None, meta_data
    return found[1]


def restart(keys: Keys, host: Host, instance: str, before: Qemu) -> Status:
    """Have it restarted; return its status once another QEMU runs."""
    keys.put(instance, restart_request=f"after {before.pid}")
    return host.wait_for(instance, lambda s: s.phase is Phase.RUNNING and s.pid not in {None, before.pid})


def seeds(host: Host, instance: str) -> list[str]:
    """What the guest finds of its media, line by line."""
    host.hears(instance, "HELLO")
    host.say(instance, "seed")
    host.hears(instance, "SEED end")
    return re.findall(r"SEED (.*?: .*?)\r?\n", host.console(instance))


# --- what the guest sees --------------------------------------------------------------------------------------


@needs_root
@pytest.mark.guest
def test_a_guest_finds_its_user_data(keys: Keys, hosts: Hosts, shop: Shop, guest: Guest) -> None:
    """Law: from URL to guest: both media by their labels, its host name is its id; and QEMU is root nowhere."""
    shop.files["/web1.yaml"] = CLOUD_CONFIG
    shop.open()
    host = hosts(KVM_QEMU_USER="nobody").start()
    flags = guest.extra_flags(tag="web1")
    keys.put("web1", ram=96, extra_flags=flags, **{"cloud-config": shop.url("/web1.yaml")}, host=host.name)
    host.wait_running("web1")
    name = instance_id(host, "web1")
    assert seeds(host, "web1") == [
        f"cidata meta-data: instance-id: {name}",
        'cidata meta-data: local-hostname: "web1"',
        "cidata user-data: #cloud-config",
        "cidata user-data: hostname: from-the-medium",
        f'config-2 openstack/latest/meta_data.json: {{"uuid": "{name}", "hostname": "web1", "name": "web1"}}',
        "config-2 openstack/latest/user_data: #cloud-config",
        "config-2 openstack/latest/user_data: hostname: from-the-medium",
    ]


@needs_root
@pytest.mark.guest
def test_a_guest_finds_its_ignition(keys: Keys, hosts: Hosts, shop: Shop, guest: Guest) -> None:
    """Law: Ignition JSON arrives by fw_cfg, where Ignition looks for it, and there is no medium."""
    shop.files["/web1.ign"] = IGNITION
    shop.open()
    host = hosts(KVM_QEMU_USER="nobody").start()
    flags = guest.extra_flags(tag="web1")
    keys.put("web1", ram=96, extra_flags=flags, **{"cloud-config": shop.url("/web1.ign")}, host=host.name)
    host.wait_running("web1")
    assert seeds(host, "web1") == [f"fw_cfg opt/com.coreos/config: {IGNITION.decode().strip()}"]


# --- who may read it ------------------------------------------------------------------------------------------


@needs_root
def test_qemu_reads_its_media_and_others_do_not(keys: Keys, hosts: Hosts, shop: Shop) -> None:
    """Law: QEMU gets its media open, and nobody but root opens them by name."""
    shop.files["/a"], shop.files["/b"] = CLOUD_CONFIG, IGNITION
    shop.open()
    host = hosts().start()
    # QEMU's user reads it, so it lies where everybody may look.
    firmware = host.folder / "hlt.bin"
    firmware.write_bytes(b"\xf4" * 65536)
    for one in ("a", "b"):
        url = {"cloud-config": shop.url(f"/{one}")}
        keys.put(one, ram=16, extra_flags=f"-bios {firmware}", **url, host=host.name)
    # QEMU ends when it cannot open one.
    host.wait_running("a", "b")
    for_qemu = [host.run_dir / "a" / "seed.iso", host.run_dir / "a" / "config-2.iso", host.run_dir / "b/ignition.json"]
    copies = [host.run_dir / one / "user-data" for one in ("a", "b")]
    for path, mode in dict.fromkeys([*for_qemu, *copies], 0o600).items():
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, 0), path
        stranger = ["setpriv", "--reuid=12001", "--regid=12001", "--clear-groups", "cat", str(path)]
        done = subprocess.run(stranger, capture_output=True, text=True, check=False)
        assert "Permission denied" in done.stderr, path


def test_files_only_below_their_folder(keys: Keys, hosts: Hosts, tiny: str) -> None:
    """Law: `file:` reads below KVM_MEDIA_ROOT; not beside it, not through a link or `..`, not without the setting."""
    host, other = hosts(), hosts("beta")
    root = host.folder / "media"
    root.mkdir()
    (root / "inside").write_bytes(CLOUD_CONFIG)
    (host.folder / "outside").write_bytes(CLOUD_CONFIG)
    (root / "link").symlink_to(host.folder / "outside")
    host.settings["KVM_MEDIA_ROOT"] = str(root)
    host.start()
    other.start()
    urls = {
        "inside": f"file://{root}/inside",
        "beside": f"file://{host.folder}/outside",
        "dots": f"file://{root}/../outside",
        "link": f"file://{root}/link",
    }
    for one, url in urls.items():
        keys.machines(host.name, one, ram=16, extra_flags=tiny, **{"cloud-config": url})
    keys.machines(other.name, "unset", ram=16, extra_flags=tiny, **{"cloud-config": urls["inside"]})
    host.wait_running("inside")
    for one in ("beside", "dots", "link"):
        status = host.wait_for(one, lambda s: s.phase is Phase.WAITING and "cloud-config" in s.reason)
        assert f"outside of {root}" in status.reason, one
    status = other.wait_for("unset", lambda s: s.phase is Phase.WAITING and "cloud-config" in s.reason)
    assert "set KVM_MEDIA_ROOT" in status.reason
    assert {qemu.instance for qemu in host.qemus()} == {"inside"}


# --- a server that is away ------------------------------------------------------------------------------------


def test_a_first_start_waits_for_its_server(keys: Keys, hosts: Hosts, shop: Shop, tiny: str) -> None:
    """Law: without user data no first start; the reason names the URL, not its password; then it starts."""
    host = hosts().start()
    url = shop.url("/web1.yaml?token=hidden-too", user=f"admin:{PASSWORD}@")
    shop.files["/web1.yaml?token=hidden-too"] = CLOUD_CONFIG
    keys.machines(host.name, "web1", ram=16, extra_flags=tiny, **{"cloud-config": url})
    status = host.wait_for("web1", lambda s: s.phase is Phase.WAITING and "cannot connect" in s.reason)
    assert shop.url("/web1.yaml?…", user="…@") in status.reason
    assert host.qemus() == []
    keys.wait_status("web1", lambda s: s.reason == status.reason)
    shop.open()
    host.wait_running("web1")
    assert host.instances()["web1"].notice is None
    said = [host.log, host.metrics(), str(host.instances()), str(keys.status("web1"))]
    # The supervisor's own records, which a successor compares with the keys, are root's.
    files = [path for path in (host.run_dir / "web1").iterdir() if path.is_file()]
    shown = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    said += [path.read_bytes().decode(errors="replace") for path in shown]
    said.append(host.cli("argv", "web1").stdout)
    for secret in (PASSWORD, "hidden-too"):
        assert not [text for text in said if secret in text]


def test_a_later_start_uses_the_copy(keys: Keys, hosts: Hosts, shop: Shop, tiny: str) -> None:
    """Law: with a copy the server may be away, and the status says so as long as that QEMU lives, adopted or not."""
    shop.files["/web1.yaml"] = CLOUD_CONFIG
    shop.open()
    host = hosts().start()
    wishes = {"cloud-config": shop.url("/web1.yaml", user=f"admin:{PASSWORD}@")}
    keys.machines(host.name, "web1", ram=16, extra_flags=tiny, shutdown_timeout=0, **wishes)
    qemu = host.wait_running("web1")["web1"]
    before = instance_id(host, "web1")
    shop.close()
    status = restart(keys, host, "web1", qemu)
    assert instance_id(host, "web1") == before
    assert status.notice is not None
    assert shop.url("/web1.yaml", user="…@") in status.notice
    assert "the copy that the last start had is used" in status.notice
    assert PASSWORD not in status.notice
    keys.wait_status("web1", lambda s: s.notice == status.notice)
    assert host.events("instance.notice", reason=status.notice)

    host.kill9()
    host.start()
    assert host.wait_running("web1")["web1"].pid == status.pid
    assert host.instances()["web1"].notice == status.notice

    shop.open()
    qemu = host.qemu("web1")
    assert restart(keys, host, "web1", qemu).notice is None


def test_changed_user_data_is_a_new_instance_id(keys: Keys, hosts: Hosts, shop: Shop, tiny: str) -> None:
    """Law: other user data, another instance id at the next restart, and not before; the same data, the same id."""
    shop.files["/web1.yaml"] = CLOUD_CONFIG
    shop.open()
    host = hosts().start()
    wishes = {"cloud-config": shop.url("/web1.yaml")}
    keys.machines(host.name, "web1", ram=16, extra_flags=tiny, shutdown_timeout=0, **wishes)
    qemu = host.wait_running("web1")["web1"]
    first, made = instance_id(host, "web1"), (host.run_dir / "web1" / "seed.iso").stat()

    restart(keys, host, "web1", qemu)
    assert instance_id(host, "web1") == first
    # Not even written again.
    assert os.path.samestat(made, (host.run_dir / "web1" / "seed.iso").stat())

    shop.files["/web1.yaml"] = CLOUD_CONFIG + b"packages: [nginx]\n"
    qemu = host.qemu("web1")
    assert instance_id(host, "web1") == first
    restart(keys, host, "web1", qemu)
    second = instance_id(host, "web1")
    assert second != first

    shop.files["/web1.yaml"] = CLOUD_CONFIG
    restart(keys, host, "web1", host.qemu("web1"))
    assert instance_id(host, "web1") == first

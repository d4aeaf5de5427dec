"""The first machine of README.md, by its own commands as they are printed: from a bare Debian 13 to a shell by SSH.

What leads out of the machine is played: the publisher's server, on loopback with a certificate that the root trusts.
The commands that install run in a bare root with the network; the host that is booted from it then has none.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import checkout
from tests.support.bare_root import in_bare_root
from tests.support.certificates import Authority
from tests.support.cloud_image import cloud_image
from tests.support.cluster import eventually
from tests.support.nspawn import BootedHost, debian_root
from tests.support.pages import commands

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

SECTION = "A first machine"
SERVER = "cloud-images.ubuntu.com"
INSTALLS = re.compile(r"apt-get|make deb")

SERVE = """
import http.server, ssl
server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/srv/server.pem", "/srv/server.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""

KEEP = """
set -eux
cd /given
{commands}
rm -rf /var/cache/apt/archives/*.deb
tar -C / --one-file-system --exclude=./given --exclude=./made -cf /made/root.tar .
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BootedHost]:
    """A booted Debian 13 on which the section's packages were installed, and a publisher's server."""
    source, made = tmp_path / "source", tmp_path / "made"
    made.mkdir()
    checkout.copy_to(source)
    told = "\n".join(one for one in commands("README.md", SECTION) if INSTALLS.search(one))
    debian = debian_root("trixie", "trixie-first", "systemd,systemd-sysv,dbus,python3,make,git,ca-certificates,procps")
    with tempfile.TemporaryDirectory(prefix="kvf") as folder:
        done = in_bare_root(debian, Path(folder), KEEP.format(commands=told), given=source, made=made)
    assert done.returncode == 0, done.stdout + done.stderr
    image, authority = cloud_image(), Authority.make(tmp_path / "authority")
    certificate, key = authority.issue("server", [f"DNS:{SERVER}"])

    def prepare(root: Path) -> None:
        shutil.unpack_archive(made / "root.tar", root, filter="fully_trusted")
        # A machine without real KVM may have /dev/kvm all the same.
        (root / "etc/kvmsupervisor/kvmsupervisor.env").write_text("KVM_ACCEL=tcg\n")
        served = root / "srv/noble/current"
        served.mkdir(parents=True)
        shutil.copy(image, served / "noble-server-cloudimg-amd64.img")
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        (served / "SHA256SUMS").write_text(f"{digest} *noble-server-cloudimg-amd64.img\n")
        shutil.copy(certificate, root / "srv/server.pem")
        shutil.copy(key, root / "srv/server.key")
        with (root / "etc/hosts").open("a") as hosts:
            hosts.write(f"127.0.0.1 localhost {SERVER}\n")
        with (root / "etc/ssl/certs/ca-certificates.crt").open("ab") as trusted:
            trusted.write(authority.certificate.read_bytes())

    with BootedHost(prepare=prepare, debian=debian) as booted:
        booted.run("systemd-run", "--unit=publisher", "--working-directory=/srv", "python3", "-c", SERVE)
        asked = ("curl", "-fsS", f"https://{SERVER}/")
        eventually("the publisher", lambda: booted.run(*asked, check=False).returncode == 0)
        yield booted


def test_the_commands_as_printed_end_in_a_shell_of_the_guest(host: BootedHost) -> None:
    """Law: a newcomer types what is there, and is in the guest; it runs on while the supervisor is killed."""
    *typed, last = [one for one in commands("README.md", SECTION) if not INSTALLS.search(one)]
    told = ""
    for command in typed:
        # Under TCG, on a busy machine.
        done = host.run("sh", "-c", f"cd /root && {command} 2>&1", timeout_s=1200, environment={"HOME": "/root"})
        told = done.stdout
    assert last.split()[0] == "ssh"
    assert "2222" in told, told
    options = "-o StrictHostKeyChecking=accept-new -o ConnectTimeout=30 -o ConnectionAttempts=60"
    said = host.run(
        "sh",
        "-c",
        f"for _ in $(seq 90); do {last} {options} 'echo in $(hostname) as $(id -un)' && exit; sleep 5; done; exit 1",
        timeout_s=1200,
        environment={"HOME": "/root"},
    )
    assert said.stdout == "in web1 as ubuntu\n"
    host.run("systemctl", "kill", "--signal=KILL", "kvmsupervisor")
    again = host.run("sh", "-c", f"{last} {options} uptime", timeout_s=300, environment={"HOME": "/root"})
    assert "up" in again.stdout

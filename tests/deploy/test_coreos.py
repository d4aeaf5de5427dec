"""What lies in deploy/coreos: units for systemd, Ignition as Butane says it, certificates for etcd."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvmsupervisor.config.settings import SETTINGS
from tests.support.etcd import EtcdServer, Tls
from tests.support.pages import documented

ROOT = Path(__file__).resolve().parents[2]
COREOS = ROOT / "deploy" / "coreos"
UNITS = sorted(COREOS.glob("*.service"))
OUTLIVES = ("/run/kvmsupervisor", "/sys/fs/cgroup", "/run/dbus/system_bus_socket", "/run/systemd")
BUTANES = sorted(COREOS.glob("*.bu"))


def ignition(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "ignition", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    """Law: `systemd-analyze verify` has nothing to say. Programs that only the hosts have are played by another."""
    for other in UNITS:
        text = other.read_text()
        for program in set(re.findall(r"/usr/(?:s?bin)/(?:docker|modprobe|mkdir)\b", text)):
            text = text.replace(program, "/bin/true")
        (tmp_path / other.name.replace("@.", "@1.")).write_text(text)
    for name in ("docker", "containerd"):
        (tmp_path / f"{name}.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name.replace("@.", "@1.")],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_guests_go_before_what_they_need() -> None:
    """Law: at shutdown the guests' unit is stopped before the supervisor, Docker, the network and etcd."""
    text = (COREOS / "kvmsupervisor-guests.service").read_text()
    after = " ".join(re.findall(r"^After=(.*)$", text, re.MULTILINE)).split()
    assert {"kvmsupervisor.service", "docker.service", "network-online.target", "etcd-member.service"} <= set(after)
    (limit,) = re.findall(r"^Environment=LIMIT=(\d+)$", text, re.MULTILINE)
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert int(limit) + 30 <= int(stop)


def test_the_guests_unit_goes_down_with_the_host_only() -> None:
    """Law: no other unit's stop or restart is passed on to it; a start that failed is tried again until it is up."""
    text = (COREOS / "kvmsupervisor-guests.service").read_text()
    assert not re.search(r"^(Requires|Requisite|BindsTo|PartOf|StopPropagatedFrom)=", text, re.MULTILINE)
    assert re.search(r"^Restart=on-failure$", text, re.MULTILINE)


def test_the_supervisor_gets_what_its_guests_need_to_outlive_it() -> None:
    """Law: the unit gives the host's PIDs, cgroups, D-Bus, devices and folders (decision 0010).

    Both folders: what a successor adopts by, and what outlives a boot (UEFI variables).
    """
    text = (COREOS / "kvmsupervisor.service").read_text()
    for option in ("--privileged", "--net=host", "--pid=host", "--ipc=host", "--cgroupns=host"):
        assert option in text
    folders = [str(one.default) for one in SETTINGS if one.env in {"KVM_RUN_DIR", "KVM_STATE_DIR"}]
    assert len(folders) == 2
    for path in (*folders, "/sys/fs/cgroup", "/run/dbus/system_bus_socket", "/run/systemd", "/dev"):
        assert re.search(rf"--volume {path}:{path}(?![\w/])", text), path


def test_the_page_on_the_container_says_what_the_unit_does() -> None:
    """Law: the command of docs/container.md is the unit's, as far as it goes."""
    page = (ROOT / "docs" / "container.md").read_text()
    commands = re.findall(r"docker run --detach --name kvmsupervisor (.*?)```", page, re.DOTALL)
    (command,) = (one for one in commands if "--privileged" in one)
    unit = (COREOS / "kvmsupervisor.service").read_text().replace("--net=host", "--network=host")
    told = set(re.findall(r"--(?:privileged|[a-z]+=\S+|volume \S+)", command))
    assert len(told) > 8
    assert told <= set(re.findall(r"--(?:privileged|[a-z]+=\S+|volume \S+)", unit))


@pytest.mark.parametrize("name", ["kvmsupervisor.service", "kvm@.service"])
def test_ceph_is_the_hosts(name: str) -> None:
    """Law: ceph.conf and keyring are the host's, in the folder where Ceph looks by itself, and only read."""
    text = (COREOS / name).read_text()
    assert re.search(r"--volume /etc/ceph:/etc/ceph:ro(?![\w/])", text)


def test_the_least_is_what_the_page_says() -> None:
    """Law: the drop-in has no option that docs/container.md has not, but for the host's D-Bus and the unit's own files.

    With it systemd takes the unit, and nothing of the privileged command line is left.
    """
    text = (COREOS / "least.conf").read_text()
    words = shlex.split(text.split("ExecStart=\nExecStart=")[1].replace("\\\n", " "))
    found = words[words.index("run") + 1 : words.index("${IMAGE}")]
    page = documented("container.md", "The least that it needs")
    assert {word for word in page if word.startswith("--") and "=" in word} <= set(found)
    assert {word for word in found if word.startswith(("--cap-", "--device", "--security", "--privileged"))} <= set(
        page
    )
    for path in ("/var/lib/kvmsupervisor", *OUTLIVES):
        assert f"{path}:{path}" in found


def test_systemd_takes_the_drop_in(tmp_path: Path) -> None:
    """Law: verified with it, the unit starts Docker once, by the drop-in's command line."""
    for unit in UNITS:
        text = re.sub(r"/usr/(?:s?bin)/(?:docker|modprobe|mkdir)\b", "/bin/true", unit.read_text())
        (tmp_path / unit.name.replace("@.", "@1.")).write_text(text)
    for name in ("docker", "containerd"):
        (tmp_path / f"{name}.service").write_text("[Service]\nExecStart=/bin/true\n")
    (tmp_path / "kvmsupervisor.service.d").mkdir()
    dropped = (COREOS / "least.conf").read_text().replace("/usr/bin/docker", "/bin/true")
    (tmp_path / "kvmsupervisor.service.d" / "least.conf").write_text(dropped)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "kvmsupervisor.service"],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("butane", BUTANES, ids=lambda path: path.name)
def test_ignition_is_what_butane_says(butane: Path) -> None:
    """Law: the generated file is up to date (`make ignition`), and every file and unit is in it, byte by byte."""
    generated = butane.with_suffix(".ign").read_text()
    assert generated == ignition(butane)
    source, made = yaml.safe_load(butane.read_text()), json.loads(generated)
    files: dict[str, Any] = {one["path"]: one for one in made["storage"]["files"]}
    for one in source["storage"]["files"]:
        held = base64.b64decode(files[one["path"]]["contents"]["source"].removeprefix("data:;base64,"))
        local = one["contents"].get("local")
        assert held == ((COREOS / local).read_bytes() if local else one["contents"]["inline"].encode())
        assert files[one["path"]]["mode"] == one["mode"]
    units = {one["name"]: one for one in made["systemd"]["units"]}
    for unit in UNITS:
        assert units[unit.name]["contents"] == unit.read_text()
    secret = [one for path, one in files.items() if path.endswith(".pem")]
    assert not secret


@pytest.mark.parametrize("butane", BUTANES, ids=lambda path: path.name)
def test_ignitions_own_tool_takes_the_file(butane: Path, tmp_path: Path) -> None:
    """Law: `ignition-validate` has nothing to say. It is not silent about what is wrong: a mode that is none.

    Debian's is of version 2.14, in which 3.4.0, released with 2.15, was still called experimental.
    """
    text = butane.with_suffix(".ign").read_text()
    path = tmp_path / "config.ign"

    def validate(config: str) -> subprocess.CompletedProcess[str]:
        path.write_text(config)
        return subprocess.run(["ignition-validate", path], capture_output=True, text=True, check=False)

    done = validate(text)
    if "unsupported config version" in done.stderr:
        text = text.replace('"3.4.0"', '"3.4.0-experimental"', 1)
        done = validate(text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert validate(text.replace('"mode": 384', '"mode": 99999')).returncode != 0


def test_networkmanager_understands_its_files(tmp_path: Path) -> None:
    """Law: `nmcli` reads each connection of Fedora CoreOS, and finds every word of it: a wrong one is left out."""
    files = yaml.safe_load((COREOS / "fcos.bu").read_text())["storage"]["files"]
    connections = [one["contents"]["inline"] for one in files if one["path"].endswith(".nmconnection")]
    assert len(connections) == 2
    for text in connections:
        done = subprocess.run(
            ["nmcli", "--offline", "connection", "modify", "connection.autoconnect", "yes"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # Newer versions have other words for these two, and know the old ones.
        said = done.stdout.replace("controller=", "master=").replace("port-type=", "slave-type=")
        for line in filter(None, text.splitlines()):
            assert line in [word.rstrip(";") for word in said.splitlines()], said


def test_butane_that_the_script_does_not_know_is_refused(tmp_path: Path) -> None:
    """Law: nothing is left out in silence."""
    path = tmp_path / "x.bu"
    path.write_text("variant: fcos\nversion: 1.5.0\npasswd: {users: []}\n")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "ignition", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "passwd" in done.stderr


def test_the_environment_file_holds_settings_that_there_are() -> None:
    """Law: an unknown KVM_ variable stops the supervisor, so the example names none; values have no quotes."""
    names = {setting.env for setting in SETTINGS}
    for line in (COREOS / "kvmsupervisor.env").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            assert name in names
            assert '"' not in value


def test_etcd_takes_the_certificates(tmp_path: Path) -> None:
    """Law: server, peers and clients accept one another with what make-certificates makes; without, nobody gets in."""
    folder = tmp_path / "tls"
    subprocess.run([COREOS / "make-certificates", folder, "node1=10.0.0.11"], check=True)
    before = (folder / "ca.pem").read_bytes()
    subprocess.run([COREOS / "make-certificates", folder, "node1=10.0.0.11", "node2=10.0.0.12"], check=True)
    assert (folder / "ca.pem").read_bytes() == before
    assert (folder / "node2.pem").exists()
    tls = Tls(
        ca=folder / "ca.pem",
        cert=folder / "node1.pem",
        key=folder / "node1-key.pem",
        client_cert=folder / "supervisor.pem",
        client_key=folder / "supervisor-key.pem",
        client_cert_auth=True,
    )
    with EtcdServer(tls=tls) as etcd:
        etcd.ctl("put", "/kvm/1/ram", "1G")
        assert etcd.ctl("get", "--print-value-only", "/kvm/1/ram") == "1G\n"
        alone = subprocess.run(
            [
                "etcdctl",
                "--endpoints",
                etcd.endpoint,
                "--cacert",
                folder / "ca.pem",
                "--command-timeout=2s",
                "get",
                "x",
            ],
            env={"PATH": os.environ["PATH"], "ETCDCTL_API": "3"},
            capture_output=True,
            check=False,
        )
    assert alone.returncode != 0

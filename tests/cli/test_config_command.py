"""`check-config`: every setting, where it comes from, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmsupervisor.config.load import load_settings
from kvmsupervisor.config.settings import SETTINGS
from tests.cli.conftest import World


def settings(world: World) -> dict[str, tuple[Any, str]]:
    """Each setting's value and origin."""
    return {one["setting"]: (one["value"], one["from"]) for one in world.json("check-config")}


def test_every_setting_is_there_with_its_origin(world: World, tmp_path: Path) -> None:
    """The environment wins over the file, which wins over the default; an empty optional variable is none."""
    file = tmp_path / "k.toml"
    file.write_text('prefix = "/vms"\nqemu = "qemu-kvm"\nbridge_if = "br0"\n')
    world.environ |= {"KVM_CONFIG": str(file), "KVM_QEMU": "/opt/qemu", "ETCD_ENDPOINTS": "a:1,b:2", "LOCK": ""}
    found = settings(world)
    assert list(found) == [setting.env for setting in SETTINGS]
    assert found["KVM_PREFIX"] == ("/vms", str(file))
    assert found["BRIDGE_IF"] == ("br0", str(file))
    assert found["KVM_QEMU"] == ("/opt/qemu", "environment")
    assert found["ETCD_ENDPOINTS"] == ("http://a:1,http://b:2", "environment")
    assert found["LOCK"] == ("/vms/%i/lock", "default")
    assert found["KVM_SESSION_TTL"] == ("15", "default")
    assert found["ETCD_CACERT"] == (None, "default")


def test_wide_explains_each_setting(world: World) -> None:
    """`-o wide` has the default and the meaning."""
    out = world.run("check-config", "-o", "wide").stdout
    assert all(setting.help in out for setting in SETTINGS)


def test_problems_are_all_named(world: World) -> None:
    """Bad settings: exit code 1, every problem."""
    world.environ |= {"KVM_ACCEL": "fast", "KVM_LISTEN": "everywhere"}
    result = world.run("check-config")
    assert result.exit_code == 1
    assert "KVM_ACCEL: found 'fast'" in result.stderr
    assert "KVM_LISTEN: found 'everywhere'" in result.stderr


def test_what_the_settings_name_is_looked_for(world: World, tmp_path: Path) -> None:
    """A program, a user, a bridge, a folder that this host does not have: each with what was found and what is right.

    The settings are printed all the same; the exit code is 1.
    """
    file = tmp_path / "file"
    file.write_text("")
    world.environ |= {
        "KVM_QEMU": "/nowhere/qemu",
        "KVM_QEMU_USER": "nobody-of-that-name",
        "KVM_BRIDGE_HELPER": str(file),
        "BRIDGE_IF": "br-none",
        "KVM_STATE_DIR": f"{file}/state",
        "KVM_MEDIA_ROOT": f"{tmp_path}/none",
        "CEPH_CONF": f"{tmp_path}/ceph.conf",
    }
    result = world.run("check-config")
    assert result.exit_code == 1
    assert "/nowhere/qemu" in result.stdout
    assert "KVM_QEMU: found '/nowhere/qemu', no such program; install QEMU" in result.stderr
    assert "KVM_QEMU_USER: found 'nobody-of-that-name', and there is no such user; create it" in result.stderr
    assert f"KVM_BRIDGE_HELPER: found '{file}', a file that is not executable; " in result.stderr
    assert "BRIDGE_IF: found 'br-none', no such interface; a bridge of this host" in result.stderr
    assert f"KVM_STATE_DIR: found '{file}/state', and {file} is no folder; " in result.stderr
    assert f"KVM_MEDIA_ROOT: found '{tmp_path}/none', which does not exist; " in result.stderr
    assert f"CEPH_CONF: found '{tmp_path}/ceph.conf', which is no file; " in result.stderr


def test_what_this_host_has_is_no_problem(world: World, tmp_path: Path) -> None:
    """Programs by name and by path, a user that exists, folders that can be made."""
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    world.environ |= {"KVM_QEMU": str(program), "KVM_QEMU_USER": "root", "KVM_STATE_DIR": f"{tmp_path}/a/b"}
    result = world.run("check-config")
    assert (result.exit_code, result.stderr) == (0, "")
    assert not (tmp_path / "a").exists()
    world.environ["KVM_QEMU"] = "sh"
    assert world.run("check-config").exit_code == 0


def test_files_of_the_page_are_read(world: World, tmp_path: Path) -> None:
    """Every problem in them, as `web` would name it; a supervisor does not look at them."""
    (tmp_path / "web.yml").write_text("basic_auth_user: {}\n")
    world.environ |= {"KVM_CONFIG": "/dev/null", "KVM_WEB_CONFIG": str(tmp_path / "web.yml")}
    done = world.run("check-config")
    assert done.exit_code == 1
    assert "the file has no 'basic_auth_user'; did you mean basic_auth_users?" in done.stderr
    world.environ["KVM_WEB_CONFIG"] = str(tmp_path / "gone.yml")
    assert "gone.yml: it cannot be read" in world.run("check-config").stderr
    assert load_settings(world.environ).web_config == tmp_path / "gone.yml"

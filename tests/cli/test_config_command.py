"""`check-config`: every setting, where it comes from, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmsupervisor.settings import describe
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
    assert list(found) == [setting.env for setting in describe()]
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
    assert all(setting.help in out for setting in describe())


def test_problems_are_all_named(world: World) -> None:
    """Bad settings: exit code 1, every problem."""
    world.environ |= {"KVM_ACCEL": "fast", "KVM_LISTEN": "everywhere"}
    result = world.run("check-config")
    assert result.exit_code == 1
    assert "KVM_ACCEL: found 'fast'" in result.stderr
    assert "KVM_LISTEN: found 'everywhere'" in result.stderr

"""Media in a real guest: a Linux kernel finds them by label, or by fw_cfg, and reads what was given."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID

import pytest

from kvmsupervisor.cli.demo.guest import Guest
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.media import IGNITION_FW_CFG, instance_id
from kvmsupervisor.machine.boot_media import Media, furnish
from tests.cli.test_demo_guest import LIMIT_S, Machine, machine

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

MACHINE = UUID("0c8b3f0e-9a3c-4ef4-a1f2-0d3f6f2f7a55")


async def made(folder: Path, data: bytes) -> Media:
    (folder / "given").write_bytes(data)
    url = f"file://{folder}/given"
    return await furnish(
        url, directory=folder, instance=InstanceId("web1"), uuid=MACHINE, file_root=folder, gid=None
    )  # fmt: skip


async def seen(vm: Machine) -> list[str]:
    """What the guest finds, from `<medium> <file>: <line>`."""
    await vm.line("HELLO")
    vm.type("seed")
    found: list[str] = []
    async with asyncio.timeout(LIMIT_S):
        while found[-1:] != ["end"]:
            found.append((await vm.line("SEED ")).removeprefix("SEED "))
    return found[:-1]


async def test_a_guest_reads_both_media(guest: Guest, tmp_path: Path) -> None:
    """Law: attached as read-only virtio disks, both are found by label, with the files under their own names."""
    data = b"#cloud-config\nhostname: from-the-medium\n"
    media = await made(tmp_path, data)
    options: list[str] = []
    for number, medium in enumerate(media.cdroms):
        options += ["-drive", f"file={medium},format=raw,if=none,id=medium{number},readonly=on"]
        options += ["-device", f"virtio-blk-pci,drive=medium{number}"]
    async with machine(guest, options=options) as vm:
        found = await seen(vm)
    name = instance_id(MACHINE, data)
    assert found == [
        f"cidata meta-data: instance-id: {name}",
        'cidata meta-data: local-hostname: "web1"',
        "cidata user-data: #cloud-config",
        "cidata user-data: hostname: from-the-medium",
        f'config-2 openstack/latest/meta_data.json: {{"uuid": "{name}", "hostname": "web1", "name": "web1"}}',
        "config-2 openstack/latest/user_data: #cloud-config",
        "config-2 openstack/latest/user_data: hostname: from-the-medium",
    ]


async def test_a_guest_reads_ignition(guest: Guest, tmp_path: Path) -> None:
    """Law: Ignition JSON arrives by fw_cfg, without a disk."""
    media = await made(tmp_path, b'{"ignition": {"version": "3.4.0"}}\n')
    async with machine(guest, options=["-fw_cfg", f"name={IGNITION_FW_CFG},file={media.ignition}"]) as vm:
        assert await seen(vm) == ['fw_cfg opt/com.coreos/config: {"ignition": {"version": "3.4.0"}}']

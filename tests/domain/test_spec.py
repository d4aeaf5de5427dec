"""The machine as plain data: what of it is pending, and what belongs to a running machine's record."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from kvmsupervisor.domain.cdrom import Cdrom
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.pending import pending
from kvmsupervisor.domain.spec import (
    Disk,
    Display,
    Firmware,
    Nic,
    RbdDisk,
    Secret,
    Spec,
    spec_from_object,
    spec_to_object,
)
from kvmsupervisor.domain.user_network import Forward
from tests.support.spec import FULL


def test_nics_and_disks_count_from_the_first() -> None:
    """Law: the keys without a number are number 0; without them there is no number 0."""
    assert [(nic.number, nic.key) for nic in FULL.all_nics] == [(0, ""), (2, "nic/2/"), (7, "nic/7/")]
    assert [(disk.number, disk.key) for disk in FULL.all_disks] == [(0, "rbd"), (1, "disk/1"), (15, "disk/15")]
    without = replace(FULL, mac=None, rbd=None)
    assert (without.all_nics, without.all_disks) == (FULL.nics, FULL.disks)


def test_a_disk_reads_as_people_write_it() -> None:
    """Law: the text of a disk is the value of its key."""
    assert str(RbdDisk("p", "i")) == "p/i"
    assert str(RbdDisk("p", "i", ro=True, discard=True, iops=5)) == "p/i ro discard iops=5"


def test_secrets_are_equal_when_their_texts_are() -> None:
    """Law: a secret that was read back from a record is the one that was written, and no other; none is shown."""
    secret = Secret.of("hunter2")
    assert secret == replace(secret, text=None)
    assert secret != Secret.of("hunter3")
    assert "hunter2" not in repr(secret) + str(secret)


def test_pending_names_keys_as_people_write_them() -> None:
    """Law: what differs is named by its key, each field of the machine alone and all of them together."""
    plain = {one.name for one in fields(Spec) if one.compare} - {"nics", "disks"}
    changed = {name: CHANGES[name] for name in plain}
    alone = {name: pending(FULL, replace(FULL, **{name: value})) for name, value in changed.items()}  # type: ignore[arg-type]
    assert all(len(keys) == 1 for keys in alone.values())
    keys = {key for keys in alone.values() for key in keys}
    assert keys < set(WISH_KEYS)
    assert len(keys) == len(plain)
    assert pending(FULL, FULL) == ()
    together = pending(FULL, replace(FULL, **changed))  # type: ignore[arg-type]
    assert set(together) == keys
    assert len(together) == len(keys)
    assert pending(FULL, replace(FULL, ram_mib=1, cpu=None)) == ("ram", "cpu")


CHANGES: dict[str, object] = {
    "ram_mib": 1,
    "mac": "52:54:00:00:00:01",
    "bridge": "br7",
    "rbd": RbdDisk(pool="rbd", image="vm1"),
    "cdrom": Cdrom("file:a.iso"),
    "display": Display.STD,
    "spice_port": None,
    "spice_addr": None,
    "spice_password": Secret.of("other"),
    "extra_flags": (),
    "cloud_config": None,
    "user_data": Secret.of("#!/bin/sh"),
    "forward": (Forward("tcp", "127.0.0.1", 2222, 22),),
    "cpus": 1,
    "cpu": "host",
    "machine": "pc",
    "firmware": Firmware.BIOS,
    "hugepages": None,
    "cpu_shares": None,
    "memory_limit_mib": None,
    "ram_max_mib": 8192,
    "cpus_max": 8,
    "link_down": True,
}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"nics": (Nic(2, "52:54:00:12:34:59", "br1"), Nic(7, "52:54:00:12:34:58"))}, ("nic/2/mac",)),
        ({"nics": (Nic(2, "52:54:00:12:34:57"), Nic(7, "52:54:00:12:34:58", "b"))}, ("nic/2/bridge", "nic/7/bridge")),
        ({"nics": ()}, ("nic/2/mac", "nic/2/bridge", "nic/7/mac")),
        ({"nics": (*FULL.nics, Nic(3, "52:54:00:12:34:60"))}, ("nic/3/mac",)),
        ({"disks": FULL.disks[:1]}, ("disk/15",)),
        ({"disks": (FULL.disks[0], Disk(15, RbdDisk("p", "i", discard=True)))}, ("disk/15",)),
        ({"disks": (Disk(2, FULL.disks[0].rbd), FULL.disks[1])}, ("disk/1", "disk/2")),
    ],
)
def test_pending_names_numbered_keys(changes: dict[str, object], keys: tuple[str, ...]) -> None:
    """Law: of NICs and disks those keys are named that differ, those that came and went too, and no others."""
    changed = replace(FULL, **changes)  # type: ignore[arg-type]
    assert pending(FULL, changed) == keys
    assert pending(changed, FULL) == keys


ON_ITS_OWN = Spec(ram_mib=64, bridge=":user", forward=(Forward("udp", "0.0.0.0", 5353, 53),), user_data=Secret.of("#!"))


@pytest.mark.parametrize("spec", [FULL, ON_ITS_OWN, Spec(ram_mib=64)])
def test_record_round_trip(spec: Spec) -> None:
    """Law: a machine survives JSON, and fields of a newer release are left out."""
    found = json.loads(json.dumps(spec_to_object(spec)))
    assert spec_from_object(found) == spec
    assert spec_from_object(found | {"of_a_newer_release": 1}) == spec


def test_a_record_of_the_first_release() -> None:
    """Law: what an earlier release wrote of its machine is still read; what it did not know has its default."""
    found: dict[str, object] = {"ram_mib": 64, "mac": None, "bridge": None, "spice_port": 1}
    found |= {"rbd": {"pool": "p", "image": "i"}}
    found |= {"extra_flags": ["-S"], "cpus": 2, "cpu": None, "machine": "q35"}
    assert spec_from_object(found) == Spec(ram_mib=64, rbd=RbdDisk("p", "i"), spice_port=1, extra_flags=("-S",), cpus=2)


def test_a_record_holds_no_secret() -> None:
    """Law: a record has the digest alone of a password and of user data, which tells whether another one is wished."""
    data = json.dumps(spec_to_object(Spec(ram_mib=64, user_data=Secret.of("#!/bin/sh hush"))))
    written = json.dumps(spec_to_object(FULL))
    assert "hush" not in written + data
    read = spec_from_object(json.loads(written))
    assert read is not None
    assert read.spice_password is not None
    assert read.spice_password.text is None
    assert pending(read, replace(FULL, spice_password=Secret.of("other"))) == ("spice_password",)


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {"ram_mib": "64"},
        {"ram_mib": True},
        {"ram_mib": None},
        {"ram_mib": 64, "rbd": "nothing"},
        {"ram_mib": 64, "rbd": {"pool": "p"}},
        {"ram_mib": 64, "extra_flags": "-S"},
        {"ram_mib": 64, "extra_flags": [1]},
        {"ram_mib": 64, "cpus": None},
        {"ram_mib": 64, "machine": None},
        {"ram_mib": 64, "mac": 7},
        {"ram_mib": 64, "firmware": "coreboot"},
        {"ram_mib": 64, "hugepages": 2},
        {"ram_mib": 64, "nics": [{"number": 1}]},
        {"ram_mib": 64, "disks": [{"number": 1, "rbd": None}]},
        {"ram_mib": 64, "disks": [{"number": 1, "rbd": {"pool": "p", "image": "i"}, "file": {"name": "a.raw"}}]},
        {"ram_mib": 64, "spice_password": "hunter2"},
    ],
)
def test_what_is_no_record(found: object) -> None:
    """Law: anything else read back is None, never an exception."""
    assert spec_from_object(found) is None

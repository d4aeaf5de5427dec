"""A machine's configuration in Proxmox VE: `/etc/pve/qemu-server/<vmid>.conf`.

Lines `OPTION: VALUE`; values are lists with commas, whose first word may stand without a name. What stands behind
`[NAME]` is a snapshot. Source: qm.conf(5) of Proxmox VE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from shlex import quote
from urllib.parse import unquote

from kvmsupervisor.cli.imports.found import Machine, NotThat

_LINE = re.compile(r"([a-z][a-z_]*[0-9]*):\s*(.*)")
_DISK = re.compile(r"(?:scsi|virtio|sata|ide)[0-9]+")
_NIC = re.compile(r"net[0-9]+")
_BUSES = ("virtio", "scsi", "sata", "ide")

# Of no meaning to the guest, or here by itself.
_SILENT = frozenset(
    {"acpi", "agent", "balloon", "bios", "boot", "bootdisk", "cores", "cpu", "description", "digest", "hotplug", "kvm"}
    | {"machine", "memory", "meta", "name", "numa", "onboot", "ostype", "parent", "protection", "runningcpu"}
    | {"runningmachine", "scsihw", "snaptime", "sockets", "tablet", "tags", "vcpus", "vmstate"}
)

_REASONS = {
    "args": "options of QEMU; look whether extra_flags should have them",
    "ciuser": "write user-data",
    "cipassword": "write user-data",
    "cicustom": "write user-data, or cloud-config with a URL",
    "sshkeys": "write user-data",
    "ipconfig": "write user-data",
    "nameserver": "write user-data",
    "searchdomain": "write user-data",
    "citype": "user data is of one kind, cloud-config",
    "ciupgrade": "write user-data",
    "cpulimit": "there is no such key; cpu_shares is a weight",
    "cpuunits": "a weight among the host's machines; cpu_shares has 1024 as its default",
    "efidisk": "UEFI variables are made anew; the boot entries of the guest in them are lost",
    "hookscript": "nothing runs scripts here",
    "hostpci": "devices of a host are not passed through by a key; extra_flags may, and pin the machine",
    "keyboard": "a viewer's keyboard is told by the guest",
    "lock": "it is locked there: see that nothing goes on with it",
    "rng": "extra_flags may have -device virtio-rng-pci",
    "serial": "the first serial port is always there, see `console`",
    "shares": "a weight for ballooning, which does not happen here",
    "smbios": "the guest gets another uuid: cloud-init and licences may take it for a new machine",
    "spice_enhancements": "there is no such key",
    "startdate": "the clock is the host's",
    "localtime": "the clock is UTC; tell the guest",
    "startup": "an order and pauses; priority is the order in which machines start",
    "template": "it is a template there; image add makes an image of its disk",
    "tpmstate": "there is no TPM: a guest that keeps keys in one has to be prepared",
    "unused": "a disk that the machine does not use",
    "usb": "devices of a host are not passed through by a key; extra_flags may",
    "vga": "display=std, virtio or qxl is one for browsers; spice_port adds a server",
    "vmgenid": "the guest gets none",
    "watchdog": "extra_flags may have one",
    "audio": "extra_flags may have one",
    "ivshmem": "extra_flags may have one",
    "hugepages": "hugepages=2M or 1G, where the host keeps such pages",
    "affinity": "processors are not pinned by a key",
    "amd_sev": "there is no such key",
    "arch": "machines are x86_64",
    "archive": "it is of a backup",
    "virtiofs": "extra_flags may have one",
}


def read(text: str, *, ceph: Mapping[str, str], vmid: str) -> Machine:
    """Read a configuration.

    Args:
        text: of the file.
        ceph: storage → pool, of storages that are pools of Ceph.
        vmid: names the machine where the file does not.

    Raises:
        NotThat: no line of it is one of a configuration.
    """
    machine, options, notes = Machine(), dict[str, str](), []
    for line in text.splitlines():
        if line.startswith("["):
            machine.leave(f"snapshot {line.strip()[1:-1]}", "snapshots stay with the disks there")
            break
        if line.startswith("#"):
            notes.append(unquote(line[1:]).strip())
        elif found := _LINE.fullmatch(line.strip()):
            options[found[1]] = found[2].strip()
        elif line.strip():
            machine.leave(line.strip(), "no OPTION: VALUE")
    if not options:
        raise NotThat("it has no line OPTION: VALUE, as /etc/pve/qemu-server/<vmid>.conf has")
    machine.name(options.get("name") or f"vm{vmid}")
    _computer(machine, options)
    for name in sorted(filter(_DISK.fullmatch, options), key=lambda name: (_rank(name, options), _number(name))):
        _disk(machine, name, options[name], ceph)
    for name in sorted(filter(_NIC.fullmatch, options), key=_number):
        _nic(machine, name, options[name])
    if said := unquote(options.get("description", "")).strip() or "\n".join(notes).strip():
        machine.keys["description"] = said
    if tags := options.get("tags"):
        machine.keys["x-tags"] = tags
    _leave_the_rest(machine, options)
    return machine


def _computer(machine: Machine, options: Mapping[str, str]) -> None:
    said = options.get("memory", "512")
    # What has no number in it is brought over as it is, and the key's own problem is told.
    machine.keys["ram"] = _properties(said, "current").get("current", said)
    cpus = options.get("vcpus") or str(_count(options.get("sockets")) * _count(options.get("cores")))
    if cpus != "1":
        machine.keys["cpus"] = cpus
    cpu = _properties(options.get("cpu", "kvm64"), "cputype")
    model = cpu.get("cputype", "kvm64")
    if model not in {"host", "max"}:
        if model.startswith(("custom-", "x86-64-v")):
            machine.leave(f"cpu {model}", "not QEMU's own name of a model; without the key cpu it is the host's")
        else:
            machine.keys["cpu"] = model
    if flags := cpu.get("flags"):
        machine.leave(f"cpu flags={flags}", "cpu takes them as MODEL,+FLAG")
    kind = _properties(options.get("machine", "pc"), "type").get("type", "pc")
    # i440fx is the default there, q35 here.
    machine.keys["machine"] = {"i440fx": "pc", "pc": "pc"}.get(kind, kind).partition("+")[0]
    if machine.keys["machine"] == "q35":
        del machine.keys["machine"]
    # A guest that powers itself off stays off there.
    machine.keys["restart"] = "on-failure"
    if options.get("bios") == "ovmf":
        machine.keys["firmware"] = "uefi"
    if options.get("ostype", "l26").startswith("w"):
        machine.leave(f"ostype {options['ostype']}", "disks and NICs are virtio here: install the virtio drivers first")


def _disk(machine: Machine, name: str, value: str, ceph: Mapping[str, str]) -> None:
    found = _properties(value, "file")
    volume = found.get("file", "none")
    if found.get("media") == "cdrom":
        _medium(machine, name, volume)
        return
    options = [f"size={size}"] if (size := _size(found.get("size"))) else []
    options += ["discard"] if found.get("discard") == "on" else []
    options += [f"iops={iops}"] if (iops := found.get("iops", "")).isdigit() and iops != "0" else []
    if found.get("ro") in {"1", "on"}:
        options = ["ro", *(one for one in options if not one.startswith("size="))]
    if not name.startswith("virtio"):
        machine.leave(name, "it is a virtio disk here: the guest needs the driver, and sees another name (vda)")
    storage, _, image = volume.partition(":")
    if storage in ceph and image:
        machine.add_disk(f"{ceph[storage]}/{image.rpartition('/')[2]}", options, name)
        return
    form = "qcow2" if volume.endswith((".qcow2", ".vmdk")) else "raw"
    machine.add_file(_path(volume), form, options, name)


def _medium(machine: Machine, name: str, volume: str) -> None:
    if "cloudinit" in volume:
        machine.leave(name, "a medium of cloud-init: write user-data")
    elif "cdrom" in machine.keys:
        machine.leave(name, "a machine has one CD-ROM drive")
    elif volume in {"none", "cdrom"}:
        machine.keys["cdrom"] = "empty"
    else:
        machine.add_medium(_path(volume), volume, name)


def _nic(machine: Machine, name: str, value: str) -> None:
    found = _properties(value, "model")
    model = found.get("model", "")
    mac = found.get("macaddr")
    for kind, address in found.items():
        if re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", address) and kind != "macaddr":
            model, mac = kind, address
    machine.add_nic(mac, found.get("bridge", ":user"), name)
    if model not in {"virtio", ""}:
        machine.leave(f"{name} {model}", "NICs are virtio here: the guest needs the driver")
    for option, why in (
        ("tag", "a VLAN: give it a bridge of its own"),
        ("trunks", "VLANs: give each a bridge of its own"),
        ("firewall", "nothing filters on the bridge"),
        ("rate", "there is no such key"),
        ("mtu", "the bridge's is used"),
        ("queues", "there is no such key"),
        ("link_down", "its link is up here"),
    ):
        if found.get(option, "0") != "0":
            machine.leave(f"{name} {option}={found[option]}", why)


def _leave_the_rest(machine: Machine, options: Mapping[str, str]) -> None:
    for name, value in options.items():
        kind = name.rstrip("0123456789")
        if name in _SILENT or kind in _SILENT or _DISK.fullmatch(name) or _NIC.fullmatch(name):
            continue
        # Keys and passwords are not repeated.
        shown = name if kind in {"cipassword", "sshkeys", "args"} else f"{name} {value}"
        machine.leave(shown, _REASONS.get(kind, "there is no such key"))


# --- words ----------------------------------------------------------------------------------------------------


def _properties(value: str, first: str) -> dict[str, str]:
    """`a,b=c` as a mapping; the word without a name gets that of the first."""
    found = dict[str, str]()
    for word in value.split(","):
        name, equals, text = word.partition("=")
        found.setdefault(*((name.strip(), text.strip()) if equals else (first, name.strip())))
    return found


def _rank(name: str, options: Mapping[str, str]) -> tuple[bool, int]:
    """The disk that is booted first comes first, then by bus."""
    order = re.findall(r"[a-z]+[0-9]+", _properties(options.get("boot", ""), "legacy").get("order", ""))
    booted = order or [options.get("bootdisk", "")]
    first = next((one for one in booted if _DISK.fullmatch(one) and "media=cdrom" not in options.get(one, "")), None)
    return name != first, _BUSES.index(name.rstrip("0123456789"))


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _path(volume: str) -> str:
    """A volume as a word of a shell's command, which is to be pasted."""
    return f"$(pvesm path {quote(volume)})" if ":" in volume else quote(volume)


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 1


def _size(text: str | None) -> str | None:
    """`32G` as it is; other units have no word here."""
    return text if text is not None and re.fullmatch(r"[0-9]+[MGT]", text) else None

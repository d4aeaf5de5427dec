"""A domain of libvirt, as `virsh dumpxml` prints it. Source: https://libvirt.org/formatdomain.html."""

from __future__ import annotations

import re
from shlex import quote
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from kvmsupervisor.cli.imports.found import Machine, NotThat

_DECLARATION = re.compile(r"<\?xml[^>]*\?>")

_BYTES = {"b": 1, "bytes": 1, "kb": 1000, "k": 1 << 10, "kib": 1 << 10, "mb": 10**6, "m": 1 << 20, "mib": 1 << 20,
          "gb": 10**9, "g": 1 << 30, "gib": 1 << 30, "tb": 10**12, "t": 1 << 40, "tib": 1 << 40}  # fmt: skip

# Of no meaning to the guest, or here by itself.
_SILENT = frozenset(
    {"name", "memory", "currentMemory", "vcpu", "os", "cpu", "devices", "title", "description", "resource", "seclabel"}
    | {"on_poweroff", "on_reboot", "on_crash", "pm", "memoryBacking", "cputune", "memtune", "genid", "maxMemory"}
)
_SILENT_DEVICES = frozenset({"emulator", "controller", "input", "serial", "console", "memballoon", "channel", "panic"})

_REASONS = {
    "uuid": "the guest gets another one: cloud-init and licences may take it for a new machine",
    "genid": "the guest gets none",
    "metadata": "notes of other programs",
    "features": "see whether the guest needs more than ACPI and APIC",
    "clock": "the clock is UTC; tell a guest that expects local time",
    "sysinfo": "strings of the firmware; extra_flags may have -smbios",
    "iothreads": "there is no such key",
    "numatune": "memory is not bound to nodes by a key",
    "blkiotune": "iops= is an option of each disk",
    "vcpus": "vCPUs are not told apart",
    "idmap": "it is of containers",
    "launchSecurity": "there is no such key",
    "commandline": "options of QEMU; look whether extra_flags should have them",
}
_DEVICE_REASONS = {
    "video": "display=std, virtio or qxl is one for browsers; spice_port adds a server",
    "sound": "extra_flags may have one",
    "audio": "extra_flags may have one",
    "hostdev": "devices of a host are not passed through by a key; extra_flags may, and pin the machine",
    "redirdev": "USB of a viewer: extra_flags may have it",
    "tpm": "there is no TPM: a guest that keeps keys in one has to be prepared",
    "watchdog": "extra_flags may have one",
    "rng": "extra_flags may have -device virtio-rng-pci",
    "filesystem": "folders of the host are not shared by a key; extra_flags may",
    "parallel": "there is no such key",
    "smartcard": "there is no such key",
    "shmem": "extra_flags may have one",
    "memory": "memory is not plugged in by a key",
    "iommu": "extra_flags may have one",
    "vsock": "extra_flags may have one",
    "hub": "there is no such key",
    "nvram": "there is no such key",
}


def read(text: str) -> list[Machine]:
    """Read the domains of a document: one, or those of an element around them.

    Raises:
        NotThat: it is no XML, or has no domain.
    """
    # Several may follow each other, as `virsh dumpxml` prints them. Within an element no document type can be declared,
    # so that no entities are either.
    try:
        root = ElementTree.fromstring(f"<all>{_DECLARATION.sub('', text)}</all>")  # noqa: S314
    except ElementTree.ParseError as error:
        raise NotThat(f"it is no XML: {error}") from error
    domains = [one for one in root.iter("domain") if one.find("name") is not None]
    if not domains:
        raise NotThat("it has no element domain with a name, as `virsh dumpxml` prints it")
    return [_domain(one) for one in domains]


def _domain(domain: Element) -> Machine:
    machine = Machine()
    machine.name((domain.findtext("name") or "machine").strip())
    if domain.get("type", "kvm") not in {"kvm", "qemu"}:
        machine.leave(f"domain type {domain.get('type')}", "machines are QEMU's")
    _computer(machine, domain)
    devices = domain.find("devices")
    # The first disk is booted here; there it is the one with the least order, wherever it stands.
    for device in sorted(devices if devices is not None else (), key=_boot_order):
        _device(machine, device)
    if said := (domain.findtext("description") or domain.findtext("title") or "").strip():
        machine.keys["description"] = said
    for element in domain:
        if _plain(element) not in _SILENT:
            machine.leave(_plain(element), _REASONS.get(_plain(element), "there is no such key"))
    return machine


def _computer(machine: Machine, domain: Element) -> None:
    sizes = [_bytes(one) for name in ("memory", "maxMemory") if (one := domain.find(name)) is not None]
    if memory := next(filter(None, sizes), 0):
        machine.keys["ram"] = str(max(1, memory >> 20))
    cpus = (domain.findtext("vcpu") or "1").strip()
    if cpus != "1":
        machine.keys["cpus"] = cpus
    _cpu(machine, domain.find("cpu"))
    _system(machine, domain.find("os"))
    # A guest that powers itself off stays off there; one that crashes does as it says.
    if domain.findtext("on_poweroff", "destroy").strip() == "destroy":
        crash = domain.findtext("on_crash", "destroy").strip()
        machine.keys["restart"] = "on-failure" if crash.startswith(("restart", "coredump-restart")) else "never"
    if (pages := domain.find("memoryBacking/hugepages")) is not None:
        page = pages.find("page")
        machine.keys["hugepages"] = "1G" if page is not None and _bytes(page, "size") == 1 << 30 else "2M"
    if shares := (domain.findtext("cputune/shares") or "").strip():
        machine.keys["cpu_shares"] = shares
    if (limit := domain.find("memtune/hard_limit")) is not None and _bytes(limit):
        machine.keys["memory_limit"] = str(_bytes(limit) >> 20)
    for tune in [*(domain.find("cputune") or ()), *(domain.find("memtune") or ())]:
        if _plain(tune) not in {"shares", "hard_limit"}:
            machine.leave(_plain(tune), "there is no such key; cpu_shares and memory_limit are the limits")


def _cpu(machine: Machine, cpu: Element | None) -> None:
    if cpu is None:
        return
    model = (cpu.findtext("model") or "").strip()
    if cpu.get("mode", "custom") == "custom" and model:
        machine.keys["cpu"] = model
    for part in cpu:
        if _plain(part) == "feature" and cpu.get("mode") != "host-passthrough":
            machine.leave(f"cpu feature {part.get('name')}", "cpu takes it as MODEL,+FLAG")
        elif _plain(part) in {"topology", "numa"}:
            machine.leave(f"cpu {_plain(part)}", "vCPUs are sockets of one core")


def _system(machine: Machine, system: Element | None) -> None:
    if system is None:
        return
    kind = system.find("type")
    if kind is not None:
        if kind.get("arch", "x86_64") != "x86_64":
            machine.leave(f"arch {kind.get('arch')}", "machines are x86_64")
        model = kind.get("machine", "pc")
        if model != "q35":
            machine.keys["machine"] = model
    loader = system.find("loader")
    if system.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash"):
        machine.keys["firmware"] = "uefi"
        machine.leave("nvram", "UEFI variables are made anew; the boot entries of the guest in them are lost")
    for part in ("kernel", "initrd", "cmdline", "dtb", "acpi", "smbios", "bootmenu"):
        if system.find(part) is not None:
            machine.leave(f"os {part}", "extra_flags may have it")


def _device(machine: Machine, device: Element) -> None:
    kind = _plain(device)
    match kind:
        case "disk":
            _disk(machine, device)
        case "interface":
            _nic(machine, device)
        case "graphics":
            _display(machine, device)
        case _ if kind in _SILENT_DEVICES:
            if kind == "channel" and "guest_agent" not in _target(device):
                machine.leave(f"channel {_target(device)}", "extra_flags may have one")
        case "video":
            model = device.find("model")
            if model is not None and model.get("type") != "none":
                machine.leave(f"video {model.get('type')}", _DEVICE_REASONS["video"])
        case _:
            machine.leave(kind, _DEVICE_REASONS.get(kind, "there is no such key"))


def _disk(machine: Machine, disk: Element) -> None:
    target = disk.find("target")
    name = "disk" if target is None else f"disk {target.get('dev')}"
    source, driver = disk.find("source"), disk.find("driver")
    kind = disk.get("device", "disk")
    if kind == "cdrom":
        _medium(machine, name, "" if source is None else source.get("file", source.get("name", "")))
        return
    if kind != "disk":
        machine.leave(f"{name} ({kind})", "there is no such device by a key")
        return
    if target is not None and target.get("bus", "virtio") != "virtio":
        machine.leave(name, "it is a virtio disk here: the guest needs the driver, and sees another name (vda)")
    options = ["ro"] if disk.find("readonly") is not None else []
    options += ["discard"] if driver is not None and driver.get("discard") == "unmap" else []
    iops = (disk.findtext("iotune/total_iops_sec") or "0").strip()
    options += [f"iops={iops}"] if iops != "0" else []
    if disk.find("backingStore/source") is not None:
        machine.leave(name, "it names a backing file; qemu-img convert makes one whole file")
    form = "raw" if driver is None else driver.get("type", "raw")
    if source is None:
        machine.leave(name, "it has no source")
    elif source.get("protocol") == "rbd":
        machine.add_disk(source.get("name", ""), options, name)
        machine.leave(name, "its cluster and user are the host's settings CEPH_CONF and CEPH_ID")
    elif (path := source.get("file") or source.get("dev")) is not None:
        machine.add_file(quote(path), form, options, name)
    elif source.get("volume") is not None:
        volume = f"$(virsh vol-path {quote(source.get('volume', ''))} --pool {quote(source.get('pool', ''))})"
        machine.add_file(volume, form, options, name)
    else:
        machine.leave(name, f"its source ({disk.get('type')}, {source.get('protocol', 'no protocol')}) has no key")


def _medium(machine: Machine, name: str, path: str) -> None:
    if "cdrom" in machine.keys:
        machine.leave(name, "a machine has one CD-ROM drive")
    elif not path:
        machine.keys["cdrom"] = "empty"
    else:
        machine.add_medium(quote(path), path, name)


def _nic(machine: Machine, nic: Element) -> None:
    kind, source, model = nic.get("type", ""), nic.find("source"), nic.find("model")
    address = nic.find("mac")
    mac = None if address is None else address.get("address")
    name = f"interface {mac or kind}"
    bridge = None
    match kind:
        case "bridge":
            bridge = None if source is None else source.get("bridge")
        case "user":
            bridge = ":user"
        case "network":
            network = "" if source is None else source.get("network", "")
            bridge = "virbr0" if network == "default" else None
            machine.leave(f"{name} in network {network}", "write the bridge that this network is on")
        case _:
            machine.leave(f"{name} ({kind})", "it has no bridge; write one")
    machine.add_nic(mac, bridge, name)
    if model is not None and not (model.get("type") or "virtio").startswith("virtio"):
        machine.leave(f"{name} {model.get('type')}", "NICs are virtio here: the guest needs the driver")
    for part in nic:
        if _plain(part) in {"vlan", "filterref", "bandwidth", "virtualport", "portForward", "mtu"}:
            machine.leave(f"{name} {_plain(part)}", "there is no such key")


def _display(machine: Machine, display: Element) -> None:
    kind, port = display.get("type"), display.get("port", "-1")
    if kind != "spice":
        machine.leave(f"graphics {kind}", "write display=std, virtio or qxl, for browsers; spice_port adds a server")
    elif port.isdigit() and port != "0" and display.get("autoport") != "yes":
        machine.keys["spice_port"] = port
    else:
        machine.leave("graphics spice", "its port is chosen at each start there: write spice_port")
    if display.get("passwd"):
        machine.leave(f"graphics {kind} passwd", "write spice_password")


# --- words ----------------------------------------------------------------------------------------------------


def _plain(element: Element) -> str:
    """Its name without a namespace."""
    return str(element.tag).rpartition("}")[2]


def _boot_order(device: Element) -> int:
    """Its place among those that are booted from; behind them all without one."""
    boot = device.find("boot")
    order = "" if boot is None or _plain(device) != "disk" else boot.get("order", "")
    return int(order) if order.isdecimal() else 1 << 16


def _target(channel: Element) -> str:
    target = channel.find("target")
    return "" if target is None else target.get("name", "")


def _bytes(element: Element, attribute: str | None = None) -> int:
    """A size; without a unit it counts KiB."""
    text = (element.text if attribute is None else element.get(attribute)) or "0"
    found = re.match(r"\s*([0-9]+)", text)
    unit = (element.get("unit") or "KiB").lower()
    return 0 if found is None else int(found[1]) * _BYTES.get(unit, 1 << 10)

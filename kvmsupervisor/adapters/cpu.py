"""The processor of this host, as its kernel tells it: make and features. Source: proc_cpuinfo(5)."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor(cpuinfo: Path = CPUINFO) -> tuple[str, tuple[str, ...]]:
    """The vendor and the features of the first processor, sorted; both empty where the kernel does not say."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return "", ()
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found.get("vendor_id", ""), tuple(sorted(set(found.get("flags", "").split())))

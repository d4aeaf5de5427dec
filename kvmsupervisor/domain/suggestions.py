"""Which wish a mistyped, or foreign, name of a key probably means. Pure."""

from __future__ import annotations

from kvmsupervisor.domain.names import FREE_KEY, WISH_KEYS
from kvmsupervisor.domain.values import nearest, plain

_SYNONYMS = {
    "memory": "ram",
    "mem": "ram",
    "disk": "disk/0",
    "drive": "disk/0",
    "iso": "cdrom",
    "cd": "cdrom",
    "dvd": "cdrom",
    "image": "rbd",
    "vcpus": "cpus",
    "smp": "cpus",
    "flags": "extra_flags",
    "args": "extra_flags",
    "spice": "spice_port",
    "vga": "display",
    "video": "display",
    "graphics": "display",
    "vnc": "display",
    "node": "host",
    "nic": "mac",
    "cloud-init": "user-data",
    "userdata": "user-data",
    "network": "bridge",
    "net": "bridge",
    "hostfwd": "forward",
    "port-forward": "forward",
    "ports": "forward",
    "publish": "forward",
    "uefi": "firmware",
}
"""Other names of the wishes, in the form of `values.plain`."""

_SUGGESTIONS = {plain(name): name for name in (*WISH_KEYS, FREE_KEY)} | _SYNONYMS


def suggest_wish(name: str) -> str | None:
    """The wish that an unknown name probably means, or None."""
    return nearest(name, _SUGGESTIONS)

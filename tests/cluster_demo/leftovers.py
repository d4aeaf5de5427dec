"""Whether a world of the demo's has ended: its processes are told by the folder's name, which all inherit."""

from __future__ import annotations

from pathlib import Path

from tests.support.cluster import eventually


def bearing(folder: str) -> list[str]:
    """The command lines of processes that have the folder's name in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                told = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
            except OSError:
                continue  # it has ended meanwhile
            if any(folder.encode() in text for text in told):
                found.append(told[0].replace(b"\0", b" ").decode(errors="replace"))
    return found


def await_end(folder: str) -> None:
    """Wait until no process of it is left; the kernel ends them after the first one."""
    eventually(f"the end of {folder}", lambda: not bearing(folder))


def mounts_of(folder: str) -> list[str]:
    """The file systems that are mounted there, as this process sees it."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if folder in line]

"""Finds the cgroup manager that this host can have, by the setting `KVM_CGROUP`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Literal

from kvmsupervisor.adapters.cgroup.manager import CgroupManager, Impossible, NoCgroups
from kvmsupervisor.adapters.cgroup.place import Place, is_of_the_host, look
from kvmsupervisor.adapters.cgroup.scope import BUS, open_scopes
from kvmsupervisor.adapters.cgroup.tree import open_tree
from kvmsupervisor.domain.frozen import frozen

Wanted = Literal["auto", "systemd", "cgroup", "none"]


@frozen(kw_only=True)
class Chosen:
    """The cgroup manager that was chosen.

    Attributes:
        cgroups: the manager.
        rejected: why each preferred manager could not be had, by its name.
        warning: what people must be told loudly; None when guests outlive the supervisor's container, and its successor
            can adopt them.
    """

    cgroups: CgroupManager
    rejected: Mapping[str, str] = field(default_factory=dict)
    warning: str | None = None


async def choose(wanted: Wanted, *, run_dir: Path | None = None, place: Place | None = None, bus: Path = BUS) -> Chosen:
    """Choose a manager; `auto` takes the first that is possible of systemd, cgroup, none.

    Args:
        wanted: `KVM_CGROUP`.
        run_dir: the run directory, which has to outlive a container, too; None: do not check it.
        place: where this process is; None: find out.
        bus: the socket of the host's D-Bus.

    Raises:
        Impossible: `wanted` names one that cannot be had. The message names it and says why.
    """
    place = look() if place is None else place
    rejected: dict[str, str] = {}
    for name in ("systemd", "cgroup"):
        if wanted not in {"auto", name}:
            continue
        try:
            cgroups: CgroupManager = await open_scopes(place, bus) if name == "systemd" else open_tree(place)
        except Impossible as error:
            if wanted == name:
                raise Impossible(f"KVM_CGROUP is {name}, but {error}; or set KVM_CGROUP=auto") from error
            rejected[name] = str(error)
        else:
            return Chosen(cgroups=cgroups, rejected=rejected, warning=_warning(cgroups, place, rejected, run_dir))
    nowhere = NoCgroups(survives_container=not place.ends_neighbours)
    return Chosen(cgroups=nowhere, rejected=rejected, warning=_warning(nowhere, place, rejected, run_dir))


def _warning(cgroups: CgroupManager, place: Place, rejected: Mapping[str, str], run_dir: Path | None) -> str | None:
    if cgroups.survives_container:
        if place.contained and run_dir is not None and not is_of_the_host(run_dir):
            return (
                f"guests outlive this container, but none after it can adopt them: {run_dir} is the container's own; "
                f"run it with -v {run_dir}:{run_dir}"
            )
        return None
    whose = f"the service {place.service}" if place.service and not place.contained else "this container"
    if place.contained and not place.host_pids:
        return f"guests end with {whose}: it has a PID namespace of its own; run it with --pid=host"
    said = "; ".join(f"{name}: {why}" for name, why in rejected.items())
    return f"guests end with {whose}: QEMU runs in its cgroup" + (f" ({said})" if said else "; set KVM_CGROUP=auto")

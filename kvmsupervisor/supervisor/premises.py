"""What is known of a host before its parts are made."""

from __future__ import annotations

from kvmsupervisor.adapters import cgroup
from kvmsupervisor.adapters.etcd import Store
from kvmsupervisor.adapters.rundir import RunDir
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.identity import HostIdentity, Mismatch
from kvmsupervisor.machine.host import HostFacts
from kvmsupervisor.supervisor.drain import DrainMark
from kvmsupervisor.supervisor.identity import Standing


@frozen(kw_only=True)
class Premises:
    """What is known of a host before its parts are made.

    Attributes:
        run_dir: ours by now.
        boot_id: of this boot.
        standing: what lives on this host, and under which identity.
        identity: as whom the host works.
        mismatch: how that differs from what the settings say; None when it does not.
        store: etcd.
        host_facts: what the host brings.
        cgroups: the cgroup manager, and why it was chosen.
        drain: whether the host stops all its guests.
        most_files: how many files this process may have open.
    """

    run_dir: RunDir
    boot_id: str
    standing: Standing
    identity: HostIdentity
    mismatch: Mismatch | None
    store: Store
    host_facts: HostFacts
    cgroups: cgroup.Chosen
    drain: DrainMark
    most_files: int

"""What `check` says of Ceph itself, where this machine can ask it."""

from __future__ import annotations

import shutil

from kvmsupervisor.cluster.overview import Cluster
from kvmsupervisor.config.settings import Settings

ANSWER_S = 5.0
"""How long a person waits for it at most. Arbitrary: `ceph` takes a second."""


async def remark_on_ceph(settings: Settings, cluster: Cluster) -> str | None:
    """What to say of the cluster's versions. None without disks in Ceph, and where it cannot be asked from here."""
    uses = any(one.wish.spec is not None and one.wish.spec.images for one in cluster.instances.values())
    if not uses or shutil.which("ceph") is None:
        return None
    from kvmsupervisor.adapters.ceph import Ceph, CephError  # noqa: PLC0415 - only here
    from kvmsupervisor.domain.ceph_versions import too_old  # noqa: PLC0415 - likewise
    from kvmsupervisor.machine.host import ceph_access  # noqa: PLC0415 - likewise

    try:
        return too_old(await Ceph(ceph_access(settings), answer_s=ANSWER_S).versions())
    except CephError:
        # A supervisor's own trouble with Ceph stands in the statuses.
        return None

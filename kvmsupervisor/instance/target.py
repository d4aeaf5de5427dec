"""The other host where an instance shall run, as it is seen from here: is somebody there to move to?"""

from __future__ import annotations

from kvmsupervisor.domain.host import resembling
from kvmsupervisor.domain.keys import HostName, InstanceId
from kvmsupervisor.domain.single import is_in_container
from kvmsupervisor.domain.spec import Wish
from kvmsupervisor.domain.view import Target
from kvmsupervisor.instance.context import InstanceContext

HERE = Target()
"""For an instance that shall run here, or nowhere: nobody is looked for."""


def target_of(instance: InstanceId, wish: Wish | None, context: InstanceContext) -> Target:
    """Look at it. Cheap for the many that shall run here; for one that waits it reads the names of all hosts."""
    if wish is None or wish.runs_on is None or not wish.is_elsewhere(context.me):
        return HERE
    host = HostName(wish.runs_on)
    there = context.host_has_session(host)
    if there is not False:
        return Target(there=there, drains=there is True and context.host_drains(host))
    sessions = context.sessions()
    if is_in_container(instance, host, sessions):
        return Target(there=True)
    return Target(there=False, meant=resembling(host, sessions))

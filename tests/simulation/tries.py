"""What supervisors ask etcd and Ceph for again and again, and what they say of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kvmsupervisor.adapters.ceph import CephError
from kvmsupervisor.adapters.etcd import EtcdError, TxnResult, Unavailable
from tests.simulation.ceph import SimCeph
from tests.simulation.etcd import SimEtcd
from tests.simulation.loop import LIFE

if TYPE_CHECKING:
    from tests.support.invariants import Tries

T = TypeVar("T")

ETCD, CEPH, SESSION, STATUSES, HISTORY = "etcd", "Ceph", "its session", "its statuses", "the history"
DRAIN = "its drain"
"""Subjects, beside the ids of instances and the calls themselves."""

_SUBJECTS = (
    (re.compile(r"^(?:keep-alive|grant|ttl|revoke)|/hosts/"), SESSION),
    # Without a key to write it asks whether others have written statuses.
    (re.compile(r"^\w+ (?:\w+:)?/kvmsupervisor/instances/|^txn *$"), STATUSES),
    (re.compile(r"^\w+ (?:\w+:)?/kvmsupervisor/history|^get \S+@\d+"), HISTORY),
    (re.compile(r"/kvmsupervisor/drains/"), DRAIN),
)
_INSTANCE = re.compile(r"/(?:kvm|kvmsupervisor/\w+)/(\w+)")

EVENTS = {"history": HISTORY, "session": SESSION, "publisher": STATUSES, "statuses": STATUSES, "drain": DRAIN}
"""What a line in the log is about, by how its event begins."""


def subject_of(call: str) -> str:
    """What a call to etcd is about."""
    for pattern, subject in _SUBJECTS:
        if pattern.search(call):
            return subject
    found = _INSTANCE.search(call)
    return call if found is None else found[1]


class TriedEtcd(SimEtcd):
    """A client of etcd whose failures are counted. A compare that does not hold is one."""

    def __init__(self, *args: Any, tries: Tries, who: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self._tries = tries
        self._who = who

    async def _call(
        self,
        what: str,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        writes: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        tries, who = self._tries, self._who
        try:
            result = await super()._call(what, work, writes=writes, timeout_s=timeout_s)
        except EtcdError as error:
            subject = ETCD if isinstance(error, Unavailable) else subject_of(what)
            tries.failed(who, subject, at=asyncio.get_running_loop().time())
            raise
        tries.went_well(who, ETCD)
        if subject_of(what) is HISTORY:
            tries.went_well(who, HISTORY)
        if isinstance(result, TxnResult):
            if result.succeeded:
                tries.went_well(who, subject_of(what))
            else:
                tries.failed(who, subject_of(what), at=asyncio.get_running_loop().time())
        return result


class TriedCeph(SimCeph):
    """A way to Ceph whose failures are counted, by image; images have the names of instances here."""

    def __init__(self, *args: Any, tries: Tries, **more: Any) -> None:
        super().__init__(*args, **more)
        self._tries = tries

    async def _execute(
        self, program: str, *args: str, limit_s: float, hear: Callable[[bytes], None] | None = None
    ) -> tuple[bytes, bytes]:
        who = LIFE.get().name
        image = next((word.removeprefix("--image=") for word in args if word.startswith("--image=")), CEPH)
        try:
            result = await super()._execute(program, *args, limit_s=limit_s, hear=hear)
        except CephError:
            self._tries.failed(who, image, at=asyncio.get_running_loop().time())
            raise
        self._tries.went_well(who, image)
        return result


def hear(
    tries: Tries, who: str, event: str, fields: Mapping[str, Any], *, wishes: Mapping[str, Mapping[str, str]]
) -> None:
    """A line in the log is a word about what it names: an instance, and its image."""
    if (instance := fields.get("instance")) is not None:
        tries.told(who, instance)
        tries.told(who, wishes.get(instance, {}).get("rbd", "").rpartition("/")[2])
    if (subject := EVENTS.get(event.partition(".")[0])) is not None:
        tries.told(who, subject)
    if event == "history.not_spoken":
        # The word is written into the session.
        tries.told(who, SESSION)
    text = str(fields)
    if "etcd" in text or event.endswith(".away"):
        tries.told(who, ETCD)
    if CEPH in text:
        tries.told(who, CEPH)
    if "another history" in text:
        tries.told(who, HISTORY)

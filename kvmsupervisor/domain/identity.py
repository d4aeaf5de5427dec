"""The identity of a supervisor: which host it is, and where its keys lie (law 12). Pure.

QEMUs outlive their supervisor, and the next one may have other settings: a host was renamed, or a prefix mistyped for
one run. Living QEMUs go on, untouched, under the identity that they were started under, until a person decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout, default_facts, default_lock
from kvmsupervisor.domain.records import Unfit, lined, parse

VERSION = 1


@frozen(kw_only=True)
class HostIdentity:
    """The settings that identify a supervisor.

    Attributes:
        host: `KVM_HOSTNAME`.
        prefix: `KVM_PREFIX`.
        facts: `KVM_FACTS_PREFIX`.
        lock: `LOCK`.
    """

    host: HostName
    prefix: str
    facts: str
    lock: str

    @classmethod
    def of(cls, host: HostName, layout: Layout) -> HostIdentity:
        """The identity of a host with this layout of keys."""
        return cls(host=host, prefix=layout.prefix, facts=layout.facts, lock=layout.lock)

    @property
    def layout(self) -> Layout:
        """Where its keys lie."""
        return Layout(prefix=self.prefix, facts=self.facts, lock=self.lock)

    def unlike(self, other: HostIdentity) -> str:
        """The settings that differ from those of `other`, as people write them; empty when none does."""
        return ", ".join(
            f"{name}={mine}"
            for (name, mine), (_, theirs) in zip(self._settings(), other._settings(), strict=True)
            if mine != theirs
        )

    def _settings(self) -> Iterator[tuple[str, str]]:
        """What a person has to write: defaults that follow from the prefix are left out."""
        yield "KVM_HOSTNAME", self.host
        yield "KVM_PREFIX", self.prefix
        yield "KVM_FACTS_PREFIX", "" if self.facts == default_facts(self.prefix) else self.facts
        yield "LOCK", "" if self.lock == default_lock(self.prefix) else self.lock


@frozen(kw_only=True)
class Mismatch:
    """QEMUs live here that were started under another identity than the settings say.

    Attributes:
        recorded: the identity that they were started under.
        wanted: the identity in the settings.
        living: the instances whose QEMUs live here under `recorded`.
    """

    recorded: HostIdentity
    wanted: HostIdentity
    living: tuple[InstanceId, ...]

    def __str__(self) -> str:
        """One sentence for people: what was found, and the two ways out of it."""
        was, now = self.recorded.unlike(self.wanted), self.wanted.unlike(self.recorded)
        return (
            f"this supervisor's settings say {now}, but what runs on this host was started under {was}: nothing is "
            f"started or stopped until the settings are as before, or `kvmsupervisor confirm-identity` on this "
            "host accepts the present ones"
        )


def judge(
    wanted: HostIdentity, living: Sequence[tuple[InstanceId, HostIdentity]]
) -> tuple[HostIdentity, Mismatch | None]:
    """The identity that a supervisor works under, and the mismatch when that is not `wanted`.

    Args:
        wanted: the identity in the settings.
        living: each QEMU that lives here, and the identity that it was started under.

    Returns:
        `wanted` where no QEMU lives, or any was started under it. Otherwise the identity of most of them.
    """
    kinds = [identity for _, identity in living]
    if not kinds or wanted in kinds:
        return wanted, None
    recorded = max(dict.fromkeys(kinds), key=kinds.count)
    names = tuple(instance for instance, identity in living if identity == recorded)
    return recorded, Mismatch(recorded=recorded, wanted=wanted, living=names)


@frozen(kw_only=True)
class IdentityNote:
    """`_identity.json`: a mismatch that waits for a person's word, and then that word.

    Attributes:
        boot_id: of the boot that it was written on.
        recorded: the identity that most of the host's QEMUs were started under.
        wanted: the identity in the supervisor's settings.
        confirmed: whether a person said that those QEMUs go on under `wanted`.
    """

    boot_id: str
    recorded: HostIdentity
    wanted: HostIdentity
    confirmed: bool = False
    version: int = VERSION

    def to_json(self) -> bytes:
        """As the file holds it."""
        return lined(self)

    @classmethod
    def from_json(cls, data: bytes) -> IdentityNote | None:
        """Read the file; None when this release cannot, which counts as no note."""
        try:
            note = parse(cls, data)
        except Unfit:
            return None
        return note if note.version == VERSION else None

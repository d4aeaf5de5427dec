"""Under what a supervisor works: which host it is, and where its keys lie (law 12). Pure.

QEMUs outlive their supervisor, and the next one may come with other settings: a host was renamed, a prefix mistyped for
one run. What lives goes on under the identity that it was started under, untouched, until a person has decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, InstanceId, Layout, default_facts, default_lock
from kvmsupervisor.domain.records import Unfit, lined, parse

VERSION = 1


@frozen(kw_only=True)
class HostIdentity:
    """The settings that say who a supervisor is.

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
        """That of a host whose keys lie so."""
        return cls(host=host, prefix=layout.prefix, facts=layout.facts, lock=layout.lock)

    @property
    def layout(self) -> Layout:
        """Where its keys lie."""
        return Layout(prefix=self.prefix, facts=self.facts, lock=self.lock)

    def unlike(self, other: HostIdentity) -> str:
        """The settings by which it differs from `other`, as people write them; empty when it does not differ."""
        return ", ".join(
            f"{name}={mine}"
            for (name, mine), (_, theirs) in zip(self._settings(), other._settings(), strict=True)
            if mine != theirs
        )

    def _settings(self) -> Iterator[tuple[str, str]]:
        """What a person has to write; what follows from the prefix by default is not written."""
        yield "KVM_HOSTNAME", self.host
        yield "KVM_PREFIX", self.prefix
        yield "KVM_FACTS_PREFIX", "" if self.facts == default_facts(self.prefix) else self.facts
        yield "LOCK", "" if self.lock == default_lock(self.prefix) else self.lock


@frozen(kw_only=True)
class Mismatch:
    """What lives here was started under another identity than the settings say.

    Attributes:
        recorded: under what it was started.
        wanted: what the settings say.
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
            f"started or stopped until the settings are so again, or `kvmsupervisor confirm-identity` on this host "
            "says that it goes on under the present ones"
        )


def judge(
    wanted: HostIdentity, living: Sequence[tuple[InstanceId, HostIdentity]]
) -> tuple[HostIdentity, Mismatch | None]:
    """Under which identity a supervisor works whose settings say `wanted`, and whether that is another one.

    Args:
        wanted: what the settings say.
        living: each QEMU that lives here, and what it was started under.

    Returns:
        `wanted` where nothing lives, or any of it was started under that. Otherwise what most of it was started under.
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
        boot_id: of the boot on which that is so.
        recorded: under what most of the host's QEMUs were started.
        wanted: what the settings of its supervisor say.
        confirmed: whether a person has said that those QEMUs go on under `wanted`.
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
        """Read the file; None when this release cannot: nobody has said anything then."""
        try:
            note = parse(cls, data)
        except Unfit:
            return None
        return note if note.version == VERSION else None

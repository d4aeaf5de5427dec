"""Where things lie in etcd: the names of all keys, built and taken apart in one place."""

from __future__ import annotations

import re
from typing import NewType

from kvmsupervisor.domain.frozen import frozen

InstanceId = NewType("InstanceId", str)
HostName = NewType("HostName", str)

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""The form of an instance id. It becomes a folder name and part of a socket path, so it is short."""

ID_RULE = "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 63 characters"

LOCK_PLACEHOLDER = "%i"

IMAGES = ".images"
"""The folder of the image library below the prefix of the wishes: no id begins with a dot."""

HOSTS = ".hosts"
"""The folder of what people want of whole hosts, likewise."""


def default_facts(prefix: str) -> str:
    """`KVM_FACTS_PREFIX` where it is not set."""
    return f"{prefix}supervisor"


def default_lock(prefix: str) -> str:
    """`LOCK` where it is not set."""
    return f"{prefix}/{LOCK_PLACEHOLDER}/lock"


def parse_id(text: str) -> InstanceId | None:
    """Return `text` as an id, or None when it is not one (see `ID_RULE`)."""
    return InstanceId(text) if ID_PATTERN.fullmatch(text) else None


@frozen(kw_only=True)
class Layout:
    """The prefixes in use: `prefix` for wishes, `facts` for what supervisors write, `lock` for locks.

    Attributes:
        prefix: `KVM_PREFIX`, without a slash at its end.
        facts: `KVM_FACTS_PREFIX`, without a slash at its end.
        lock: `LOCK`, a key with `%i` once, in place of the id (the settings ensure that).
    """

    prefix: str = "/kvm"
    facts: str = "/kvmsupervisor"
    lock: str = "/kvm/%i/lock"

    @property
    def wishes_prefix(self) -> str:
        """The prefix that is listed and watched."""
        return f"{self.prefix}/"

    @property
    def images_prefix(self) -> str:
        """The prefix of the image library."""
        return f"{self.prefix}/{IMAGES}/"

    @property
    def host_wishes_prefix(self) -> str:
        """The prefix of what people want of whole hosts."""
        return f"{self.prefix}/{HOSTS}/"

    @property
    def drains_prefix(self) -> str:
        """The prefix of how far hosts have come that empty themselves, or take their instances back."""
        return f"{self.facts}/drains/"

    @property
    def imports_prefix(self) -> str:
        """The prefix of what hosts are importing into Ceph; each key ends when its host no longer renews it."""
        return f"{self.facts}/imports/"

    @property
    def hosts_prefix(self) -> str:
        """The prefix of the hosts' sessions."""
        return f"{self.facts}/hosts/"

    @property
    def statuses_prefix(self) -> str:
        """The prefix of the instances' status keys."""
        return f"{self.facts}/instances/"

    @property
    def events_prefix(self) -> str:
        """The prefix of the instances' last events."""
        return f"{self.facts}/events/"

    @property
    def history_key(self) -> str:
        """Key with the name of the present history of the store."""
        return f"{self.facts}/history"

    @property
    def placements_prefix(self) -> str:
        """The prefix of the placements (law 10)."""
        return f"{self.facts}/placements/"

    @property
    def offers_prefix(self) -> str:
        """The prefix of the offers of live moves' targets; each key ends with its host's session."""
        return f"{self.facts}/incoming/"

    @property
    def confirmations_prefix(self) -> str:
        """The prefix of the keys that confirm held removals."""
        return f"{self.facts}/confirm-removal/"

    def image_key(self, name: str) -> str:
        """Key of an image of the library."""
        return self.images_prefix + name

    def drain_key(self, host: str) -> str:
        """Key by which people have a host empty itself."""
        return f"{self.host_wishes_prefix}{host}/drain"

    def return_key(self, host: str) -> str:
        """Key by which people have a host take back what stands elsewhere for it."""
        return f"{self.host_wishes_prefix}{host}/return"

    def drain_fact_key(self, host: str) -> str:
        """Key in which a host says how far its drain, or return, has come."""
        return self.drains_prefix + host

    def wish_key(self, instance: InstanceId, name: str) -> str:
        """Key of one wish, such as `/kvm/1/ram`."""
        return f"{self.prefix}/{instance}/{name}"

    def instance_prefix(self, instance: InstanceId) -> str:
        """Prefix of all wishes of one instance."""
        return f"{self.prefix}/{instance}/"

    def lock_key(self, instance: InstanceId) -> str:
        """Key of the instance's lock."""
        return self.lock.replace(LOCK_PLACEHOLDER, instance)

    def status_key(self, instance: InstanceId) -> str:
        """Key of the instance's status."""
        return self.statuses_prefix + instance

    def events_key(self, instance: InstanceId) -> str:
        """Key of the instance's last events."""
        return self.events_prefix + instance

    def placement_key(self, instance: InstanceId) -> str:
        """Key of the instance's placement."""
        return self.placements_prefix + instance

    def clients_key(self, instance: InstanceId) -> str:
        """Key that repeats a lock's storage clients where people may write the lock: there only supervisors write."""
        return f"{self.facts}/clients/{instance}"

    def offer_key(self, instance: InstanceId) -> str:
        """Key of the target's offer during a live move of the instance."""
        return self.offers_prefix + instance

    def session_key(self, host: HostName) -> str:
        """Key of a host's session."""
        return self.hosts_prefix + host

    def confirmation_key(self, host: HostName) -> str:
        """Key by which an operator confirms a held mass removal on `host`."""
        return self.confirmations_prefix + host

    def locks_prefix(self) -> str | None:
        """The prefix to watch for the locks; None where the prefix of the wishes covers them."""
        static = self.lock.partition(LOCK_PLACEHOLDER)[0]
        return None if static.startswith(self.wishes_prefix) else static

    @property
    def locks_are_open(self) -> bool:
        """Whether those who write wishes may write locks, too."""
        return self.locks_prefix() is None

    def id_of_lock(self, key: str) -> InstanceId | None:
        """The instance whose lock `key` is, or None."""
        before, _, after = self.lock.partition(LOCK_PLACEHOLDER)
        if not (key.startswith(before) and key.endswith(after) and len(key) > len(before) + len(after)):
            return None
        return parse_id(key[len(before) : len(key) - len(after)])

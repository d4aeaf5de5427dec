"""The adapter for etcd v3: the only package that uses etcd3 and gRPC.

The client, and gRPC with it, is imported when its name is used first: most importers of this package need error classes
only.
"""

from typing import TYPE_CHECKING, Any

from kvmsupervisor.adapters.etcd.api import (
    Ahead,
    Ambiguous,
    Batch,
    Compacted,
    Compare,
    Delete,
    Denied,
    EtcdError,
    Event,
    Get,
    KeysWatch,
    KeyValue,
    LeaseGone,
    Listing,
    NoSpace,
    Op,
    Page,
    Put,
    Reading,
    Rejected,
    Store,
    Target,
    TxnResult,
    Unavailable,
    Watch,
)
from kvmsupervisor.adapters.etcd.config import EtcdConfig

if TYPE_CHECKING:
    from kvmsupervisor.adapters.etcd.client import Etcd

__all__ = [
    "Ahead",
    "Ambiguous",
    "Batch",
    "Compacted",
    "Compare",
    "Delete",
    "Denied",
    "Etcd",
    "EtcdConfig",
    "EtcdError",
    "Event",
    "Get",
    "KeyValue",
    "KeysWatch",
    "LeaseGone",
    "Listing",
    "NoSpace",
    "Op",
    "Page",
    "Put",
    "Reading",
    "Rejected",
    "Store",
    "Target",
    "TxnResult",
    "Unavailable",
    "Watch",
]


def __getattr__(name: str) -> Any:
    """Import the client (PEP 562)."""
    if name == "Etcd":
        from kvmsupervisor.adapters.etcd.client import Etcd  # noqa: PLC0415

        return Etcd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

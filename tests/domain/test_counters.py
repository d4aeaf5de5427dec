"""What QEMU counted: read from its answers, whatever a guest has put into them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.counters import UNKNOWN, DiskCounts, Work, disk_counts, memory_counts

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["node-name", "stats", "rd_bytes", "wr_bytes", "x"]), inner, max_size=4)
    ),
    max_leaves=20,
)


def test_disks() -> None:
    """Law: disks are counted by the name of their node; media, firmware and what has no name are not."""
    answer = [
        {"node-name": "disk0", "stats": {"rd_bytes": 7, "wr_bytes": 9}},
        {"node-name": "medium0", "stats": {"rd_bytes": 1, "wr_bytes": 0}},
        {"device": "", "stats": {"rd_bytes": 1, "wr_bytes": 0}},
        {"node-name": "disk3", "stats": {"rd_bytes": 0, "wr_bytes": 0}},
    ]
    idle = (("read", Work()), ("write", Work()), ("flush", Work()))
    assert disk_counts(answer) == (
        DiskCounts(name="disk0", read_bytes=7, written_bytes=9, work=idle),
        DiskCounts(name="disk3", read_bytes=0, written_bytes=0, work=idle),
    )


def test_what_disks_did() -> None:
    """Law: operations, the time that they took and those that failed, each by its name; what is no number counts 0."""
    stats = {
        "rd_bytes": 1,
        "wr_bytes": 1,
        "rd_operations": 3,
        "rd_total_time_ns": 1_500_000_000,
        "failed_wr_operations": 2,
        "wr_operations": "many",
        "flush_total_time_ns": 10**400,
        "flush_operations": -1,
    }
    (disk,) = disk_counts([{"node-name": "disk0", "stats": stats}])
    assert dict(disk.work) == {"read": Work(done=3, seconds=1.5), "write": Work(failed=2), "flush": Work()}


def test_memory() -> None:
    """Law: the guest's memory is told by kind; figures that its driver has not told are left out."""
    stats = {"stat-total-memory": 100, "stat-free-memory": UNKNOWN, "stat-available-memory": 60, "stat-swap-in": 1}
    assert memory_counts({"stats": stats, "last-update": 5}) == (("total", 100), ("available", 60))
    assert memory_counts({"stats": {}, "last-update": 0}) == ()


@given(_json)
def test_any_answer(answer: object) -> None:
    """Law: an answer of any shape hurts nobody."""
    assert isinstance(disk_counts(answer), tuple)
    assert isinstance(memory_counts(answer), tuple)

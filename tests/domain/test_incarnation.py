"""The records in the run directory: read back as written, left alone when this release cannot read them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.incarnation import VERSION, Ended, Incarnation, InstanceState, Unreadable
from kvmsupervisor.domain.lock import Storage

RECORD = Incarnation(
    instance="1",
    incarnation="x",
    epoch=2,
    boot_id="boot-1",
    argv=("qemu", "-S"),
    spec={"ram_mib": 64, "extra_flags": ["-vga", "none"]},
    storage=Storage.RBD,
    accelerator="tcg",
    restart_request="r1",
    revision=7,
    log_offset=11,
    spawned_at=100.5,
    pid=42,
    starttime=9,
    clients=("10.0.0.1:0/1",),
)
ENDED = Ended(reason="guest-shutdown", clean=True, host_revision=5, power_revision=6, restart_request=None)
SAVED = InstanceState(
    boot_id="boot-1", attempt=3, not_before=12.5, pause_s=2.5, restarts=4, last_exit="crashed (signal 9)", ended=ENDED
)
KINDS: list[tuple[type[Incarnation] | type[InstanceState], Incarnation | InstanceState]] = [
    (Incarnation, RECORD),
    (Incarnation, replace(RECORD, pid=None, starttime=None, clients=())),
    (InstanceState, SAVED),
    (InstanceState, InstanceState(boot_id="boot-1")),
]


@pytest.mark.parametrize(("kind", "record"), KINDS)
def test_a_record_is_read_as_it_was_written(
    kind: type[Incarnation] | type[InstanceState], record: Incarnation | InstanceState
) -> None:
    """Law 8: what a supervisor writes, its successor reads."""
    assert kind.from_json(record.to_json()) == record


@pytest.mark.parametrize(("kind", "record"), KINDS)
def test_a_newer_record_is_left_alone(
    kind: type[Incarnation] | type[InstanceState], record: Incarnation | InstanceState
) -> None:
    """Law: only the release that wrote it can tell what it means; the message says which versions differ."""
    newer = {**json.loads(record.to_json()), "version": VERSION + 1}
    with pytest.raises(Unreadable, match=f"version is {VERSION + 1}, this release reads {VERSION}"):
        kind.from_json(json.dumps(newer).encode())


@pytest.mark.parametrize(("kind", "record"), KINDS)
def test_a_field_of_a_later_patch_is_passed_over(
    kind: type[Incarnation] | type[InstanceState], record: Incarnation | InstanceState
) -> None:
    """Law: a field more, under the same version, changes nothing."""
    assert kind.from_json(json.dumps({**json.loads(record.to_json()), "mood": 1}).encode()) == record


@given(st.binary(max_size=100), st.sampled_from([Incarnation, InstanceState]))
def test_damage_is_told_and_nothing_else(data: bytes, kind: type[Incarnation] | type[InstanceState]) -> None:
    """Law: whatever the file holds, its reader gets a record or a reason."""
    with pytest.raises(Unreadable):
        kind.from_json(data)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_damage_is_told_too(data: bytes) -> None:
    """Law: no content of a file brings its reader down."""
    for kind in (Incarnation, InstanceState):
        with pytest.raises(Unreadable):
            kind.from_json(data)


@pytest.mark.parametrize("name", ["instance", "incarnation", "epoch", "argv", "storage", "spawned_at"])
def test_a_record_without_a_needed_field_is_unreadable(name: str) -> None:
    """Law: half a record adopts nothing."""
    value = json.loads(RECORD.to_json())
    del value[name]
    with pytest.raises(Unreadable, match=f"field {name} is missing"):
        Incarnation.from_json(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("storage", "paper"), ("pid", "42"), ("pid", 1.5), ("starttime", "9"), ("argv", 5),
        ("epoch", None), ("log_offset", "11"), ("spawned_at", "now"), ("clients", [1]), ("instance", 1),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_unreadable(name: str, value: object) -> None:
    """Law: a record that is read can be acted on."""
    with pytest.raises(Unreadable):
        Incarnation.from_json(json.dumps({**json.loads(RECORD.to_json()), name: value}).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [("attempt", "3"), ("not_before", "x"), ("restarts", None), ("ended", {"reason": "x"}), ("ended", 5)],
)
def test_a_memory_of_other_types_is_unreadable(name: str, value: object) -> None:
    """Law: the same for what outlives a process."""
    with pytest.raises(Unreadable):
        InstanceState.from_json(json.dumps({**json.loads(SAVED.to_json()), name: value}).encode())

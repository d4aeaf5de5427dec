"""The laws of sessions, locks and fences (docs/architecture.md), and for each of their sentences a test that holds it.

The table is for people who change something here: what they would break first.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

TABLE = [
    (1, "renewed every TTL/5", "cluster/test_session.py::test_renewals_come_every_fifth_of_the_ttl_and_write_nothing"),
    (1, "keepalive and a transaction", "cluster/test_session.py::test_keepalive_alone_does_not_count"),
    (
        1,
        "dated from before it was sent",
        "cluster/test_session.py::test_a_slow_renewal_is_dated_from_before_it_was_sent",
    ),
    (1, "resumed on the same boot", "cluster/test_session.py::test_a_successor_on_the_same_boot_resumes"),
    (1, "one supervisor per host", "adapters/test_rundir.py::test_a_second_supervisor_is_told_who_is_there"),
    (2, "compared and swapped", "cluster/test_lock.py::test_a_strangers_lock_is_never_overwritten"),
    (2, "my session exists", "cluster/test_lock.py::test_nothing_is_written_without_the_session"),
    (2, "`host` is still me", "cluster/test_lock.py::test_nothing_is_written_once_the_host_key_changed"),
    (2, "the epoch grows by one", "domain/test_lock.py::test_taking_grows_the_epoch_by_one"),
    (2, "no world with two writers", "domain/test_lock_model.py::test_no_reachable_world_has_two_writers"),
    (3, "fence before the start", "instance/test_worker.py::test_an_address_that_cannot_be_fenced_starts_nothing"),
    (3, "its addresses before `cont`", "cluster/test_fencing.py::test_a_paused_qemu_has_one_client"),
    (3, "only then `cont`", "instance/test_worker.py::test_a_host_key_that_changed_meanwhile_stops_the_start"),
    (3, "frozen at any instant", "domain/test_lock_model.py::test_the_search_can_fail"),
    (4, "while it is watched, wait", "instance/test_takeover.py::test_who_has_the_disks_open_is_waited_for"),
    (4, "the holder has no session", "instance/test_takeover.py::test_etcd_itself_is_asked_for_the_session"),
    (
        4,
        "all that was ever recorded",
        "instance/test_takeover.py::test_a_taker_may_die_before_any_write_and_another_follows",
    ),
    (4, "and whom storage names", "instance/test_takeover.py::test_who_is_gone_is_not_waited_for"),
    (4, "verified", "adapters/test_ceph.py::test_a_fence_that_is_not_listed_is_none"),
    (4, "who left it locked", "cluster/test_fencing.py::test_who_left_the_image_locked_is_shut_out_for_good"),
    (4, "no write after a read", "cluster/test_late_osd.py::test_late_writes_land_and_none_after_a_read"),
    (4, "for 30 days and more", "adapters/test_ceph.py::test_an_entry_that_is_there_keeps_its_time_but_for_a_fence"),
    (4, "Ceph away, no start", "instance/test_takeover.py::test_without_storage_nothing_is_taken"),
    (4, "a crash of our own", "instance/test_takeover.py::test_a_crash_is_fenced_and_an_end_in_order_is_not"),
    (4, "a reboot", "instance/test_takeover.py::test_a_reboot_takes_its_own_back_at_once"),
    (4, "what it comes to", "e2e/test_takeover.py::test_a_dead_host"),
    (5, "no exclusive-lock, no start", "cluster/test_fencing.py::test_an_image_without_exclusive_lock_is_refused"),
    (5, "no reads from replicas", "machine/test_images.py::test_an_image_of_which_replicas_are_read_is_refused"),
    (5, "its reason", "cluster/test_late_osd.py::test_a_read_from_a_replica_is_no_barrier"),
    (5, "told, and others go on", "e2e/test_takeover.py::test_what_is_wrong_with_a_disk"),
    (6, "etcd away kills nothing", "instance/test_worker.py::test_etcd_away_for_an_hour_kills_nothing"),
    (6, "reading another epoch does", "instance/test_worker.py::test_reading_another_epoch_kills"),
    (
        6,
        "on Ceph, whatever is cut off",
        "e2e/test_takeover_without_etcd.py::test_outages_of_etcd",
    ),
    (6, "no error is a failed compare", "cluster/test_lock.py::test_an_etcd_that_is_away_changes_nothing"),
    (7, "pinned until a person's word", "instance/test_takeover.py::test_what_cannot_be_fenced_waits_for_a_word"),
    (7, "nothing to protect", "instance/test_worker.py::test_whose_lock_is_taken"),
    (7, "what counts as unfenceable", "domain/test_storage.py::test_anything_else_cannot_be_fenced"),
    (
        7,
        "a guest runs once its guard watches it",
        "instance/test_guarded.py::test_a_guest_runs_once_its_guard_watches_it",
    ),
    (7, "the guard outlives the supervisor", "e2e/test_guard.py::test_a_supervisor_that_is_frozen_or_killed"),
    (7, "without etcd it kills", "e2e/test_guard.py::test_etcd_is_away"),
    (8, "start time and marks", "adapters/test_process.py::test_a_recycled_pid_is_not_it"),
    (8, "same boot", "machine/test_machine.py::test_a_record_of_another_boot_is_of_the_past"),
    (8, "the lock still names it", "instance/test_worker.py::test_a_successor_that_finds_the_lock_lost_kills"),
    (9, "not before it is gone", "instance/test_worker.py::test_a_stop_is_graceful_and_the_lock_goes_last"),
    (9, "nor before it is fenced", "instance/test_takeover.py::test_a_wish_that_ends_while_it_fences"),
    (9, "what it leaves is shut out", "instance/test_takeover.py::test_who_lets_go_shuts_out_its_dead"),
    (10, "no wish is written", "supervisor/test_moves.py::test_failover_writes_no_wish"),
    (10, "by their roles, too", "deploy/test_etcd_roles.py::test_failover_needs_no_more"),
    (10, "where it is placed", "supervisor/test_moves.py::test_it_is_restarted_where_it_is_placed"),
    (10, "and not on its host", "supervisor/test_moves.py::test_the_host_that_is_back_leaves_it_where_it_is"),
    (10, "a placement is compared", "cluster/test_lock.py::test_nothing_is_written_once_a_placement_came_or_went"),
    (10, "a newer `host` ends it", "supervisor/test_moves.py::test_a_newer_host_ends_a_placement"),
    (10, "somebody to move to", "supervisor/test_moves.py::test_a_move_begins_when_somebody_is_there"),
    (11, "proven after each loss", "supervisor/test_history.py::test_a_proof_costs_two_reads"),
    (
        11,
        "before anything is applied",
        "adapters/etcd/test_contract.py::test_a_watch_is_proven_before_it_tells_anything",
    ),
    (11, "at each start", "supervisor/test_history.py::test_a_successor_knows_what_its_predecessor_acted_on"),
    (11, "an older lock is no takeover", "supervisor/test_history.py::test_a_machine_outlives_a_restored_backup"),
    (11, "a missing key is no removal", "supervisor/test_history.py::test_machines_outlive_an_empty_etcd"),
    (11, "a person is asked", "supervisor/test_history.py::test_orders_that_come_with_a_backup_wait_for_a_person"),
    (11, "all have spoken", "supervisor/test_history.py::test_a_machine_that_moved_since_the_backup_runs_once"),
    (
        11,
        "whatever a backup's history is called",
        "supervisor/test_old_backups.py::test_what_moved_between_two_restores_of_one_backup",
    ),
    (
        11,
        "and whose guest lives is not fenced",
        "supervisor/test_doubt.py::test_who_has_the_disks_of_a_host_that_stays_silent_is_not_fenced",
    ),
    (11, "another cluster's", "supervisor/test_history.py::test_another_clusters_etcd_is_not_touched"),
    (12, "that process, whatever its settings", "machine/test_machine.py::test_the_prefix_does_not_tell_who_it_is"),
    (12, "never taken for gone", "machine/test_machine.py::test_a_living_process_is_never_taken_for_gone"),
    (12, "touches nothing", "supervisor/test_identity.py::test_one_run_under_other_settings_touches_nothing"),
    (12, "each setting, in every order", "e2e/test_identity.py::test_each_setting_wrong_for_one_run"),
]


@cache
def docstrings(path: Path) -> dict[str, str]:
    """Of the tests of one file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def laws(text: str) -> set[int]:
    """Which laws a docstring names: `Law 3`, `laws 2, 3 and 9`, `Laws 2 to 4`."""
    found: set[int] = set()
    for told in re.findall(r"\b[Ll]aws? (\d+(?:(?:, and|,| and| to) \d+)*)", text):
        found |= {int(number) for number in re.findall(r"\d+", told)}
        for first, last in re.findall(r"(\d+) to (\d+)", told):
            found |= set(range(int(first), int(last) + 1))
    return found


def test_each_law_has_its_tests() -> None:
    """None of them is without one; what the page says are laws is what is looked for."""
    page = (TESTS.parent / "docs" / "architecture.md").read_text().partition("## The laws")[2].partition("\n## ")[0]
    told = {int(number) for number in re.findall(r"^(\d+)\. \*\*", page, re.MULTILINE)}
    assert told == set(range(1, len(told) + 1))
    assert {law for law, _, _ in TABLE} == told
    assert len(told) >= 10


@pytest.mark.parametrize(("law", "test"), [pytest.param(law, test, id=f"{law}: {what}") for law, what, test in TABLE])
def test_it_names_its_law(law: int, test: str) -> None:
    """Whoever changes the test reads in its docstring which law it holds."""
    path, _, name = test.partition("::")
    found = docstrings(TESTS / path)
    assert name in found, f"there is no {test}"
    assert law in laws(found[name]), f"{test} does not name law {law}: {found[name]}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Law 3: x", {3}),
        ("Laws 2, 3, and 9", {2, 3, 9}),
        ("x (laws 3 and 8)", {3, 8}),
        ("Laws 2 to 4 and 6", {2, 3, 4, 6}),
        ("Laws 9 to 11, and 2", {2, 9, 10, 11}),
        ("no law", set()),
        ("lawyer 5", set()),
    ],
)
def test_laws_are_read_off_a_sentence(text: str, expected: set[int]) -> None:
    """The check above can fail."""
    assert laws(text) == expected

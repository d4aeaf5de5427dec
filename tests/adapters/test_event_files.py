"""Files of events: bounded, torn lines and full disks harmless, kept for a while when an instance goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvmsupervisor.adapters import event_files
from kvmsupervisor.adapters.event_files import HALF_BYTES, KEPT_S, MOST_LEFT, EventFiles, instances_in, read


def done(folder: Path | None, work: Callable[[EventFiles], object], *, now: float = 1e9) -> None:
    """Do that with new files, as a process does in its life."""
    files = EventFiles(folder, now=lambda: now)
    work(files)
    files.close()


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """Those of an earlier process, too; of each instance its own. Only root's group may read them."""
    folder = tmp_path / "state" / "_events"
    done(folder, lambda files: files.append("1", b"a\n"))
    done(folder, lambda files: files.append("1", b"b\n"))
    done(folder, lambda files: files.append("2", b"c\n"))
    assert (read(folder, "1"), read(folder, "2"), read(folder, "3")) == (b"a\nb\n", b"c\n", b"")
    assert instances_in(folder) == ["1", "2"]
    assert (folder / "1.jsonl").stat().st_mode & 0o7777 == 0o640
    assert instances_in(tmp_path / "none") == []


def test_a_day_of_crashes_is_bounded(tmp_path: Path) -> None:
    """Two halves, of whole lines; the newest are there."""
    lines = [b"%06d%s\n" % (n, b"x" * 193) for n in range(3 * HALF_BYTES // 200)]
    files = EventFiles(tmp_path)
    for number, line in enumerate(lines):
        if number % 500 == 499:
            files.close()  # waits for its thread, as the queue is bounded
        files.append("1", line)
    files.close()
    found = read(tmp_path, "1")
    assert len(found) <= 2 * HALF_BYTES
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * HALF_BYTES
    kept = found.splitlines(keepends=True)
    assert kept == lines[-len(kept) :]
    assert len(found) > HALF_BYTES


def test_a_torn_line_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    """A host lost its power in the middle of a write."""
    (tmp_path / "1.jsonl").write_bytes(b"whole\ntor")
    done(tmp_path, lambda files: files.append("1", b"next\n"))
    assert read(tmp_path, "1") == b"whole\ntor\nnext\n"


@pytest.mark.parametrize("obstacle", ["full", "a file", "a link", "a pipe"])
def test_a_disk_that_takes_nothing_is_told_once(tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it goes well again. Nobody waits, and nothing is followed."""
    folder = tmp_path / "_events"
    strange = tmp_path / "strange"
    strange.write_bytes(b"theirs")
    match obstacle:
        case "full":
            written: list[int] = []
            monkeypatch.setattr(os, "write", lambda fd, data: written.append(fd) or 0)  # type: ignore[func-returns-value]
        case "a file":
            folder.write_bytes(b"")
        case "a link":
            folder.mkdir()
            (folder / "1.jsonl").symlink_to(strange)
        case _:
            folder.mkdir()
            os.mkfifo(folder / "1.jsonl")
    files = EventFiles(folder)
    with capture_logs() as told:
        for _ in range(5):
            files.append("1", b"lost\n")
        files.close()
    assert [line["event"] for line in told] == ["events.unwritten"]
    assert strange.read_bytes() == b"theirs"
    monkeypatch.undo()
    if obstacle == "a file":
        folder.unlink()
    elif obstacle != "full":
        (folder / "1.jsonl").unlink()
    with capture_logs() as told:
        files.append("1", b"there\n")
        files.close()
    assert told == []
    assert read(folder, "1") == b"there\n"


def test_a_disk_that_hangs_costs_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into the queue is told once."""
    monkeypatch.setattr(event_files, "MOST_WAITING", 2)
    files = EventFiles(tmp_path)
    monkeypatch.setattr(files, "_run", lambda folder, hurry: None)
    with capture_logs() as told:
        for _ in range(9):
            files.append("1", b"x\n")
        files.close(timeout_s=0.0)
    assert [line["event"] for line in told] == ["events.lost"]


def test_what_happened_to_a_removed_instance_is_kept_for_a_week(tmp_path: Path) -> None:
    """One that comes back has its history again; one that nobody saw go is set aside at the next start."""
    old, new = 1e9, 1e9 + KEPT_S + 1
    for one in (b"1", b"2", b"3"):
        done(tmp_path, partial(EventFiles.append, instance=one.decode(), line=one + b"\n"), now=old)
    done(tmp_path, lambda files: files.set_aside("1"), now=old)
    assert instances_in(tmp_path) == ["2", "3"]
    assert read(tmp_path, "1") == b"1\n"
    done(tmp_path, lambda files: files.append("1", b"again\n"), now=old)
    assert instances_in(tmp_path) == ["1", "2", "3"]
    assert read(tmp_path, "1") == b"1\nagain\n"
    done(tmp_path, lambda files: files.set_aside("1"), now=old)
    done(tmp_path, lambda files: files.begin({"2"}), now=new)
    assert instances_in(tmp_path) == ["2"]
    assert (read(tmp_path, "1"), read(tmp_path, "3")) == (b"", b"3\n")


def test_many_removed_instances_do_not_fill_the_disk(tmp_path: Path) -> None:
    """The last ones are kept."""
    left = tmp_path / event_files.LEFT
    left.mkdir()
    for number in range(2 * MOST_LEFT + 5):
        path = left / f"{number}.jsonl"
        path.touch()
        os.utime(path, (1e9 + number, 1e9 + number))
    done(tmp_path, lambda files: files.begin(()), now=1e9)
    assert len(list(left.iterdir())) == 2 * MOST_LEFT
    assert not (left / "4.jsonl").exists()


def test_ids_that_look_like_files_of_others(tmp_path: Path) -> None:
    """An id may have dots: what is removed, or rotated, is one instance's."""
    names = ["a", "a.jsonl", "a.jsonl.1", "a.jsonl.1.jsonl"]
    for name in names:
        done(tmp_path, lambda files, name=name: files.append(name, name.encode() + b"\n"))  # type: ignore[misc]
    done(tmp_path, lambda files: files.append("a", b"x" * (HALF_BYTES - 1) + b"\n"))
    assert set(instances_in(tmp_path)) == set(names)
    done(tmp_path, lambda files: files.set_aside("a"))
    assert set(instances_in(tmp_path)) == set(names[1:])
    assert [read(tmp_path, name) for name in names[1:]] == [name.encode() + b"\n" for name in names[1:]]
    assert read(tmp_path, "a").startswith(b"a\nxxx")


def test_a_host_that_keeps_none_has_no_thread(tmp_path: Path) -> None:
    """Simulated hosts are hundreds."""
    files = EventFiles(None)
    files.append("1", b"x\n")
    assert files._thread is None
    files.close()

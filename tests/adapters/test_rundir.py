"""The run directory: one supervisor, whole records, logs that stay readable while they are cut."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.rundir import (
    BACKLOG,
    AlreadyRunning,
    InstanceDir,
    OutOfReach,
    RunDir,
    write_whole,
)
from kvmsupervisor.domain.incarnation import Incarnation, InstanceState, Unreadable
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.lock import Storage

ONE = InstanceId("1")
RECORD = Incarnation(
    instance="1", incarnation="x", epoch=1, boot_id="boot-1", argv=("qemu",), spec={"ram_mib": 64},
    storage=Storage.NONE, accelerator="tcg", restart_request=None, revision=7, log_offset=0, spawned_at=1.0,
)  # fmt: skip
SAVED = InstanceState(boot_id="boot-1", attempt=2, restarts=3)


@pytest.fixture
def path() -> Iterator[Path]:
    """A run directory whose path is short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="kvs"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def directory(path: Path) -> InstanceDir:
    made = RunDir(path).instance(ONE)
    made.create()
    return made


# --- one supervisor -------------------------------------------------------------------------------------------


def test_a_second_supervisor_is_told_who_is_there(path: Path) -> None:
    """Law 1: one supervisor per run directory; the second one names the first and says what to do."""
    first, second = RunDir(path), RunDir(path)
    first.acquire()
    with pytest.raises(AlreadyRunning, match=rf"process {os.getpid()}: .*KVM_RUN_DIR"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    second.release()


def test_the_lock_of_a_killed_supervisor_is_free(path: Path) -> None:
    """Law 1: however it ended, the next one gets in, and QEMU does not inherit the lock."""
    hold = "import sys; from pathlib import Path; from kvmsupervisor.adapters.rundir import RunDir\n"
    hold += "import subprocess; d = RunDir(Path(sys.argv[1])); d.acquire()\n"
    hold += "child = subprocess.Popen(['/bin/sleep', '60']); print(child.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(AlreadyRunning, match=f"process {holder.pid}:"):
                RunDir(path).acquire()
            holder.kill()
            holder.wait()
            os.kill(child, 0)
            successor = RunDir(path)
            successor.acquire()
            successor.release()
        finally:
            os.kill(child, 9)


def test_a_lock_file_that_says_nothing_is_named_all_the_same(path: Path) -> None:
    """Law: the message is whole even before the holder has written its pid."""
    holder = RunDir(path)
    holder.acquire()
    (path / "_supervisor.lock").write_bytes(b"")
    with pytest.raises(AlreadyRunning, match="held by process unknown"):
        RunDir(path).acquire()
    holder.release()


def test_a_missing_directory_is_made(path: Path) -> None:
    """Law: a tmpfs is empty after a boot."""
    fresh = RunDir(path / "a" / "b")
    assert list(fresh.instances()) == []
    fresh.acquire()
    assert (path / "a" / "b").is_dir()
    fresh.release()


# --- whose folders --------------------------------------------------------------------------------------------


def test_only_folders_with_an_id_are_instances(path: Path) -> None:
    """Law: our own names begin with an underscore, which no id does; files and other folders are left alone."""
    for name in ("b", "a.1", "A-2_", "_supervisor", ".hidden", "a b", "x" * 64):
        (path / name).mkdir()
    (path / "file").write_text("")
    assert list(RunDir(path).instances()) == ["A-2_", "a.1", "b"]


def test_a_folder_goes_with_all_that_is_in_it(directory: InstanceDir) -> None:
    """Law: what is removed is removed, twice too."""
    directory.create()
    directory.write_incarnation(RECORD)
    directory.listen(directory.qmp_socket).close()
    directory.remove()
    directory.remove()
    assert not directory.path.exists()


# --- records --------------------------------------------------------------------------------------------------


def test_records_are_kept_and_dropped(directory: InstanceDir) -> None:
    """Law 8: what one supervisor writes, the next reads; dropping is idempotent."""
    assert directory.read_incarnation() is None
    assert directory.read_state("boot-1") == InstanceState(boot_id="boot-1")
    directory.write_incarnation(RECORD)
    directory.write_state(SAVED)
    assert directory.read_incarnation() == RECORD
    assert directory.read_state("boot-1") == SAVED
    for _ in range(2):
        directory.drop_incarnation()
        directory.drop_state()
    assert directory.read_incarnation() is None
    assert directory.read_state("boot-1") == InstanceState(boot_id="boot-1")


def test_a_memory_of_another_boot_is_none(directory: InstanceDir) -> None:
    """Law: its instants are on another boot's clock."""
    directory.write_state(SAVED)
    assert directory.read_state("boot-2") == InstanceState(boot_id="boot-2")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"version": 2}', b"[" * 100_000])
def test_what_cannot_be_read_is_named_and_left(directory: InstanceDir, content: bytes) -> None:
    """Law: a damaged or newer record is told by its path, and stays as it is."""
    for name, read in (
        ("incarnation.json", directory.read_incarnation),
        ("memory.json", lambda: directory.read_state("boot-1")),
    ):
        file = directory.path / name
        file.write_bytes(content)
        with pytest.raises(Unreadable, match=f"^{file}: "):
            read()
        assert file.read_bytes() == content


def test_a_record_is_replaced_whole(directory: InstanceDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a supervisor that dies while it writes leaves the old record, never half of a new one."""
    directory.write_state(SAVED)

    def dies(file: str, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            directory.write_state(InstanceState(boot_id="boot-1", attempt=99))
    assert directory.read_state("boot-1") == SAVED
    directory.write_state(InstanceState(boot_id="boot-1", attempt=99))
    assert directory.read_state("boot-1").attempt == 99


def test_a_reader_sees_the_old_or_the_new(path: Path) -> None:
    """Law: the file is another one after the write; whoever has the old one open reads it to its end."""
    file = path / "x.json"
    write_whole(file, b"old" * 1000)
    with file.open("rb") as reader:
        write_whole(file, b"new")
        assert reader.read() == b"old" * 1000
    assert file.read_bytes() == b"new"
    assert [entry.name for entry in path.iterdir()] == ["x.json"]


# --- sockets --------------------------------------------------------------------------------------------------


def test_a_client_may_come_before_its_server(directory: InstanceDir) -> None:
    """Law: the socket listens before QEMU exists, over whatever an earlier one left there."""
    directory.listen(directory.qmp_socket).close()
    with directory.listen(directory.qmp_socket) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(directory.qmp_socket))
        served, _ = listener.accept()
        with served:
            served.sendall(b"hello")
            assert client.recv(5) == b"hello"


def test_a_successor_may_wait_in_line(directory: InstanceDir) -> None:
    """Law: with one client served, others are in line and not refused."""
    with directory.listen(directory.qmp_socket) as listener:
        clients = [socket.socket(socket.AF_UNIX) for _ in range(BACKLOG)]
        for client in clients:
            client.connect(str(directory.qmp_socket))
        for client in clients:
            listener.accept()[0].close()
            client.close()


def test_a_socket_that_cannot_be_bound_leaves_no_descriptor(path: Path) -> None:
    """Law: a path that is too long is an error, and nothing leaks."""
    with pytest.raises(OSError, match="path too long"):
        RunDir(path).instance(ONE).listen(path / ("x" * 200))


# --- logs -----------------------------------------------------------------------------------------------------


def say(directory: InstanceDir, text: bytes) -> None:
    with directory.qemu_log.open("ab") as log:
        log.write(text)


def test_the_tail_begins_behind_the_offset(directory: InstanceDir) -> None:
    """Law: one process's words are not another's."""
    assert (directory.log_size(), directory.log_tail(0)) == (0, [])
    say(directory, b"first\nlast\n")
    offset = directory.log_size()
    assert directory.log_tail(offset) == []
    say(directory, b"own\nwords \xff\n")
    assert directory.log_tail(offset) == ["own", "words \N{REPLACEMENT CHARACTER}"]
    assert directory.log_tail(0)[0] == "first"


def test_only_the_end_of_a_long_log_is_read(directory: InstanceDir) -> None:
    """Law: a machine that wrote gigabytes is not read whole."""
    say(directory, b"x" * 100_000 + b"\nthe end\n")
    tail = directory.log_tail(0, limit=100)
    assert tail[-1] == "the end"
    assert len(tail[0]) < 100


def test_a_rotated_log_is_all_newer_than_the_offset(directory: InstanceDir) -> None:
    """Law: after a rotation the words behind a greater offset are found all the same."""
    say(directory, b"x" * 1000)
    offset = directory.log_size()
    directory.qemu_log.rename(directory.path / "qemu.log.1")
    say(directory, b"why\n")
    assert directory.log_tail(offset) == ["why"]


def test_secrets_of_an_earlier_release_go(directory: InstanceDir) -> None:
    """Law: QEMU gets its secrets in memory; files that an earlier release has left with them are deleted."""
    for name in ("ceph.key", "spice-password", "kept"):
        (directory.path / name).touch()
    directory.drop_secrets()
    directory.drop_secrets()
    assert [entry.name for entry in directory.path.iterdir()] == ["kept"]


# --- a host that drains ---------------------------------------------------------------------------------------


def test_the_mark_is_about_one_boot(tmp_path: Path) -> None:
    """Law: guests are held back in the boot that was asked, and in no other; without a mark in none."""
    run_dir = RunDir(tmp_path / "run")
    assert not run_dir.is_draining("boot-1")
    run_dir.mark_draining("boot-1")
    assert run_dir.is_draining("boot-1")
    assert not run_dir.is_draining("boot-2")
    run_dir.unmark_draining()
    run_dir.unmark_draining()
    assert not run_dir.is_draining("boot-1")


def test_without_a_supervisor_nobody_is_signalled(tmp_path: Path) -> None:
    """Law: a run directory that nobody holds has no supervisor; a pid that was left behind means nothing."""
    run_dir = RunDir(tmp_path)
    assert not run_dir.signal_supervisor()
    (tmp_path / "_supervisor.lock").write_text("1\n")
    assert not run_dir.signal_supervisor()


def test_the_supervisor_that_holds_it_is_signalled(tmp_path: Path) -> None:
    """Law: the signal goes to the process that has the lock."""
    code = (
        "import signal, sys; from pathlib import Path; from kvmsupervisor.adapters.rundir import DRAIN_SIGNAL, RunDir;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [DRAIN_SIGNAL]); RunDir(Path(sys.argv[1])).acquire();"
        "print('held', flush=True); print(signal.sigwait([DRAIN_SIGNAL]) == DRAIN_SIGNAL)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert RunDir(tmp_path).signal_supervisor()
        assert holder.stdout.read() == "True\n"


@pytest.mark.parametrize("pid", ["1", "999999999", "9" * 30, "x", "", "ours"])
def test_a_number_that_is_another_process_is_never_signalled(tmp_path: Path, pid: str) -> None:
    """Law: whoever has that number here and not the file is left alone; the holder is in another PID namespace."""
    holder = RunDir(tmp_path)
    holder.acquire()
    try:
        (tmp_path / "_supervisor.lock").write_text(str(os.getpid()) if pid == "ours" else pid)
        with pytest.raises(OutOfReach, match="--pid=host"):
            RunDir(tmp_path).signal_supervisor()
    finally:
        holder.release()


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_locks_and_records_are_for_their_owner_only(path: Path, umask: int) -> None:
    """Law: whoever may read a file may lock it, so nobody else may read one; an earlier release's is made so."""
    path.mkdir(exist_ok=True)
    (path / "_supervisor.lock").touch()
    (path / "_supervisor.lock").chmod(0o644)
    before = os.umask(umask)
    try:
        run_dir = RunDir(path)
        run_dir.acquire()
        run_dir.mark_draining("boot")
        os.close(run_dir.open_guard_log())
        run_dir.instance(InstanceId("a")).create()
        run_dir.instance(InstanceId("a")).write_state(InstanceState(boot_id="boot"))
        run_dir.release()
    finally:
        os.umask(before)
    found = {file.name: file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()}
    assert found == dict.fromkeys(("_supervisor.lock", "_draining", "_guard.log", "memory.json"), 0o600)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_modes_are_no_umasks(path: Path, umask: int) -> None:
    """Law: folders can be passed through and only written to by their owner, sockets are their owner's alone."""
    before = os.umask(umask)
    try:
        directory = RunDir(path / "above" / "run").instance(ONE)
        directory.create()
        directory.listen(directory.qmp_socket).close()
    finally:
        os.umask(before)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.rglob("*")}
    assert modes == {"above": 0o755, "run": 0o755, ONE: 0o755, "qmp.sock": 0o600}


def test_a_file_in_the_place_of_a_folder_is_told(path: Path) -> None:
    """Law: a folder that cannot be made is an error that names it."""
    (path / "run").touch()
    with pytest.raises(FileExistsError, match="run"):
        RunDir(path / "run").acquire()


def test_what_was_open_to_others_is_closed(path: Path) -> None:
    """Law: who becomes the supervisor takes from others what an earlier release left them, and follows no link."""
    outside = path / "outside"
    outside.touch(mode=0o644)
    run_dir = RunDir(path / "run")
    directory = run_dir.instance(ONE)
    directory.create()
    for name in ("console.lock", "console.log", "ceph.key"):
        (directory.path / name).touch()
        (directory.path / name).chmod(0o644)
    directory.listen(directory.qmp_socket).close()
    directory.qmp_socket.chmod(0o777)
    os.mkfifo(directory.path / "pipe", 0o644)
    (directory.path / "link").symlink_to(outside)
    run_dir.acquire()
    run_dir.release()
    modes = {entry.name: entry.lstat().st_mode & 0o777 for entry in directory.path.iterdir() if not entry.is_symlink()}
    assert modes == {"console.lock": 0o600, "console.log": 0o640, "ceph.key": 0o640, "qmp.sock": 0o770, "pipe": 0o644}
    assert outside.stat().st_mode & 0o777 == 0o644


def test_a_persons_file_keeps_its_mode(path: Path) -> None:
    """Law: a supervisor's start changes what is its own: a guest may need the file that somebody put there."""
    run_dir, disk = RunDir(path), path / "disk"
    path.mkdir(exist_ok=True)
    disk.touch()
    disk.chmod(0o666)
    run_dir.acquire()
    run_dir.release()
    assert disk.stat().st_mode & 0o777 == 0o666


def test_a_record_is_for_its_owner_also_over_what_was_left(path: Path) -> None:
    """Law: half a file of an earlier release, with another mode, changes nothing."""
    (path / "one.new").touch()
    (path / "one.new").chmod(0o644)
    write_whole(path / "one", b"x")
    assert (path / "one").stat().st_mode & 0o777 == 0o600

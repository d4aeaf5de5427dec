"""The guard: kills machines whose disks no storage can fence, once their host's session has run out (law 7).

A process of its own, one per host, started by `guard/client.py` as `python -I -S program.py LINK LOCK SOCKET VERSION`.
It outlives the supervisor, so it must need nothing that may be gone or slow by then. All of its memory is locked, which
is why it imports nothing of ours and little else. It holds each machine by a pidfd that the supervisor gave it, and has
no state in files. Killing a guard harms no machine.

It is first a candidate, on the inherited socket LINK, and kills nothing: it collects machines and the deadline, and
ends when that socket is closed. With `take` it becomes the guard, in this order: it kills the former guard, if there is
one, then locks the file LOCK, then puts SOCKET in place. It watches its machines already then, so there is no gap.

One request is one message of a SOCK_SEQPACKET socket, which arrives whole or not at all, and gets one answer:

    hello                      guard 1 VERSION ERRNO INCARNATION…   ERRNO: of locking the memory, 0 for locked
    until SECONDS              ok      the machines may live until then, on CLOCK_BOOTTIME
    watch INCARNATION NOTE     ok      with the machine's pidfd; NOTE: the file to write when it is killed
    forget INCARNATION         ok      storage can fence all that it may write to from now on
    take                       ok      with the former guard's pidfd, if there is one
    anything else              no WHY
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import math
import os
import select
import signal
import socket
import sys
import time

PROTOCOL = 1
"""Version of the messages on the socket."""

STEP_S = 1.0
"""The longest sleep while a machine is watched. poll(2) counts on CLOCK_MONOTONIC, which stands still while the host is
suspended: a deadline that passes meanwhile is noticed at most this long after the host is back."""

IDLE_S = 3.0
"""How long a guard without any machine waits for the next one. Arbitrary: a restart of a machine fits."""

END_S = 5.0
"""How long the former guard may take to end. It does not hang in the kernel; SIGKILL also ends a frozen one."""

LONGEST = 4096 + 256
"""Bytes of a request: the longest path, and words."""

BURST = 64
"""Requests that are handled before the deadline is checked again. Each connection has one at a time."""

MCL_CURRENT, MCL_FUTURE = 1, 2
"""mlockall(2)."""


class Charge:
    """One machine: its incarnation, its pidfd, the file of the note, and whether it was killed."""

    __slots__ = ("incarnation", "killed", "note", "pidfd")

    def __init__(self, incarnation: str, pidfd: int, note: str) -> None:
        self.incarnation = incarnation
        self.pidfd = pidfd
        self.note = note
        self.killed = False


class Watch:
    """The machines that are watched, and until when they may live. Pure: `now` is CLOCK_BOOTTIME.

    Attributes:
        until: the deadline; None before it was told.
        charges: by incarnation; a killed machine stays until it has ended.
    """

    def __init__(self) -> None:
        self.until: float | None = None
        self.charges: dict[str, Charge] = {}
        self._idle_since = -math.inf

    def add(self, charge: Charge) -> Charge | None:
        """Watch a machine; return the one that was known under that name."""
        former = self.charges.get(charge.incarnation)
        self.charges[charge.incarnation] = charge
        return former

    def ended(self, charge: Charge, now: float) -> None:
        """Forget a machine that has ended, for whatever reason."""
        del self.charges[charge.incarnation]
        self._idle_since = now

    def begin(self, now: float) -> None:
        """From now on it is the guard."""
        self._idle_since = now

    def due(self, now: float) -> list[Charge]:
        """The machines to kill now."""
        if self.until is None or now < self.until:
            return []
        return [charge for charge in self.charges.values() if not charge.killed]

    def is_idle(self, now: float) -> bool:
        """Whether no guard is needed any more."""
        return not self.charges and now >= self._idle_since + IDLE_S

    def wait_s(self, now: float) -> float:
        """How long the process may sleep."""
        if not self.charges:
            return max(0.0, self._idle_since + IDLE_S - now)
        if self.until is None or now >= self.until:
            return STEP_S
        return min(STEP_S, self.until - now)


class Refused(Exception):
    """A request was not done. The message says why."""


class Guard:
    """The process.

    Args:
        link: the socket that the process inherited.
        lock: path of the file with the guard's pid and start time; the process that has it locked is the guard.
        path: of the guard's socket.
        version: of the program, for the greeting.
        errno: of locking its memory; 0 when it is locked.
    """

    def __init__(self, link: socket.socket, lock: str, path: str, version: str, errno: int) -> None:
        self._lock = lock
        self._path = path
        self._greeting = f"guard {PROTOCOL} {version} {errno}"
        self._watch = Watch()
        self._link: socket.socket | None = link
        self._peers: dict[int, socket.socket] = {}
        self._listener: socket.socket | None = None
        self._poll = select.poll()
        self._join(link)

    def run(self) -> None:
        """Watch until no guard is needed; a candidate: until its socket is closed."""
        while True:
            ready = {fd for fd, _ in self._poll.poll(math.ceil(1000 * self._wait_s()))}
            for charge in [charge for charge in self._watch.charges.values() if charge.pidfd in ready]:
                self._drop(charge)
            if self._listener is not None and self._listener.fileno() in ready:
                self._accept(self._listener)
            # A message that came in time counts, also when this process slept: read before checking the deadline.
            for peer in [peer for fd, peer in self._peers.items() if fd in ready]:
                self._hear(peer)
            if self._listener is None:
                if self._link is None:
                    return
                continue
            now = _now()
            self._kill(self._watch.due(now))
            if self._watch.is_idle(now):
                return

    def _wait_s(self) -> float:
        return STEP_S if self._listener is None else self._watch.wait_s(_now())

    # --- machines ---------------------------------------------------------------------------------------------

    def _kill(self, due: list[Charge]) -> None:
        """Kill all of them, then write the notes: no file may delay a kill."""
        for charge in due:
            try:
                signal.pidfd_send_signal(charge.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            except OSError as error:
                _say(f"cannot kill {charge.incarnation}: {error}")
                continue
            charge.killed = True
        for charge in due:
            if charge.killed:
                _write_note(charge)

    def _drop(self, charge: Charge) -> None:
        self._poll.unregister(charge.pidfd)
        os.close(charge.pidfd)
        self._watch.ended(charge, _now())

    # --- connections ------------------------------------------------------------------------------------------

    def _join(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peers[peer.fileno()] = peer
        self._poll.register(peer, select.POLLIN)

    def _leave(self, peer: socket.socket) -> None:
        self._poll.unregister(peer)
        del self._peers[peer.fileno()]
        peer.close()
        if peer is self._link:
            self._link = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except OSError:
            return  # it has gone already
        self._join(peer)

    def _hear(self, peer: socket.socket) -> None:
        for _ in range(BURST):
            try:
                data, descriptors, _, _ = socket.recv_fds(peer, LONGEST, 1)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:
                self._leave(peer)
                return
            try:
                answer = self._do(data.decode(), descriptors)
            except (Refused, OSError, ValueError) as error:
                answer = f"no {error}"
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            try:
                peer.send(answer.encode())
            except OSError:
                self._leave(peer)
                return

    def _do(self, request: str, descriptors: list[int]) -> str:
        """Do one request and return the answer. A descriptor that is kept is removed from `descriptors`."""
        word, _, rest = request.partition(" ")
        match word:
            case "hello":
                return " ".join((self._greeting, *self._watch.charges))
            case "until":
                until = float(rest)
                if not math.isfinite(until):
                    raise Refused("a number of seconds is wanted")
                self._watch.until = until
            case "watch":
                incarnation, _, note = rest.partition(" ")
                if not (incarnation and note and descriptors):
                    raise Refused("an incarnation, a path and a pidfd are wanted")
                charge = Charge(incarnation, descriptors[0], note)
                self._poll.register(charge.pidfd, select.POLLIN)
                descriptors.clear()
                former = self._watch.add(charge)
                if former is not None:
                    self._poll.unregister(former.pidfd)
                    os.close(former.pidfd)
            case "forget":
                gone = self._watch.charges.get(rest)
                if gone is not None:
                    self._drop(gone)
            case "take":
                self._take(descriptors[0] if descriptors else None)
            case _:
                raise Refused(f"there is no request {word!r}")
        return "ok"

    def _take(self, former: int | None) -> None:
        """Become the guard in place of the former one.

        Raises:
            Refused, OSError: this process is still a candidate.
        """
        if self._watch.until is None or self._listener is not None:
            raise Refused("it is the guard already, or was not told until when")
        # All steps that can fail come before the former guard's end.
        aside = f"{self._path}.new"
        listener = _listen(aside)
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # A user that can read a file can lock it, so only we can. The mode is set on a file of an earlier release, too.
        os.fchmod(lock, 0o600)
        if former is not None:
            _end(former)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            listener.close()
            raise Refused("another guard has the lock") from error
        written = os.pwrite(lock, f"{os.getpid()} {_starttime()}\n".encode(), 0)
        os.ftruncate(lock, written)
        # The lock is held as long as the descriptor is open: for ever.
        os.rename(aside, self._path)
        self._listener = listener
        self._poll.register(listener, select.POLLIN)
        self._watch.begin(_now())


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _listen(path: str) -> socket.socket:
    """A listening socket to which only this user can connect."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The mode of the socket, set before bind: no other mode is ever seen (unix_bind in the kernel).
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(path)
    listener.listen(4)
    listener.setblocking(False)
    return listener


def _end(former: int) -> None:
    """Kill the former guard; return once it has ended, so that its lock is free."""
    try:
        signal.pidfd_send_signal(former, signal.SIGKILL)
    except ProcessLookupError:
        return
    ended = select.poll()
    ended.register(former, select.POLLIN)
    if not ended.poll(1000 * END_S):
        raise Refused("the former guard was killed and does not end")


def _write_note(charge: Charge) -> None:
    """Leave a note for the next supervisor: the guard killed this machine, and when."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _say(f"{at} killed {charge.incarnation}: its host's session has run out")
    text = f'{{"version": 1, "incarnation": "{charge.incarnation}", "at": "{at}"}}\n'
    try:
        note = os.open(f"{charge.note}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(note, text.encode())
        finally:
            os.close(note)
        os.rename(f"{charge.note}.new", charge.note)
    except OSError as error:
        _say(f"cannot write {charge.note}: {error}")


def _say(line: str) -> None:
    """Write a line to the log, if possible."""
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        pass


def _starttime() -> int:
    """The start time of this process, clock ticks since boot: field 22 of proc_pid_stat(5)."""
    stat = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(stat, 4096).rpartition(b")")[2].split()[22 - 3])
    finally:
        os.close(stat)


def lock_memory() -> int:
    """Lock all memory of this process, present and future; return 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.mlockall(MCL_CURRENT | MCL_FUTURE) == 0 else ctypes.get_errno()


def main() -> None:
    """Run as the head of this file says."""
    gc.disable()
    link, lock, path, version = sys.argv[1:]
    guard = Guard(socket.socket(fileno=int(link)), lock, path, version, lock_memory())
    guard.run()


if __name__ == "__main__":
    main()

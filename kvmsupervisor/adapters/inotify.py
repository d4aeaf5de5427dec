"""Reports writes to files (inotify(7)). Costs nothing while there are no writes."""

from __future__ import annotations

import ctypes
import os
import struct
import weakref

IN_MODIFY = 0x2
IN_DONT_FOLLOW = 0x02000000
IN_Q_OVERFLOW = 0x4000

_EVENT = struct.Struct("=iIII")
_READ_BYTES = 64 << 10


class Inotify:
    """One queue of events.

    The kernel merges equal events that follow each other, so one busy file does not fill the queue.

    Attributes:
        fd: becomes readable when a watched file was written to.

    Raises:
        OSError: the user has too many queues (fs.inotify.max_user_instances), or no file can be opened.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        # A user has few queues (128 by default), so one that is dropped without `close` is closed, too.
        self._end = weakref.finalize(self, os.close, self.fd)

    def watch(self, path: str, *, follow: bool) -> int:
        """Watch a file, without opening it; return the number of its events.

        Raises:
            OSError: there is no such file, or the user has too many watches (fs.inotify.max_user_watches).
        """
        mask = IN_MODIFY | (0 if follow else IN_DONT_FOLLOW)
        return self._checked(self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask))

    def unwatch(self, number: int) -> None:
        """Stop watching a file. A file that is gone is no error."""
        self._libc.inotify_rm_watch(self.fd, number)

    def written(self) -> set[int] | None:
        """The numbers of the files with writes since the last call; None after an overflow (any file). Never waits."""
        numbers: set[int] = set()
        while True:
            try:
                data = os.read(self.fd, _READ_BYTES)
            except BlockingIOError:
                return numbers
            at = 0
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size + length
                if mask & IN_Q_OVERFLOW:
                    return None
                numbers.add(number)
            if len(data) < _READ_BYTES - 4096:
                return numbers

    def close(self) -> None:
        """Close the queue. Closing twice is no error."""
        self._end()

    def _checked(self, result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

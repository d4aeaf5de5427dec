"""Reading what the chaos guests wrote, while they write: straight from the objects of their images.

A program for each look would take 50 ms of a processor; a client that stays connected takes one. Debian's packages of
Ceph and of QEMU's driver bring librados (https://docs.ceph.com/en/latest/rados/api/librados/); its Python binding would
be built for Debian's own Python alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from kvmsupervisor.domain.lock import Lock
from kvmsupervisor.domain.spec import RbdDisk
from tests.chaos.downtime import Sample
from tests.chaos.records import (
    IMAGE_SIZE,
    REGION,
    SECTOR,
    SLOTS,
    TABLE_SECTOR,
    Head,
    History,
    Journal,
    parse,
    parse_table,
)
from tests.support.ceph import Ceph

OPTIONS = {"rados_osd_op_timeout": "2", "rados_mon_op_timeout": "1", "client_mount_timeout": "20"}
"""Seconds: a cluster that is away is one of the faults, and must not keep the reader waiting for ever."""

PATIENCE_S = 15.0
"""After so long without an answer an `Observer` connects anew. Seen twice with librados 16: after outages of 24 s and
29 s that had ended, its connection got none any more, while a new one, and QEMU's, did."""

LOOK_S = 0.05
"""Between two looks of an `Observer`."""


class Away(Exception):
    """Ceph does not answer; the message says to what."""


class Reader:
    """A client of the cluster. As a context manager it is connected; it may be used by several threads.

    Args:
        ceph: the cluster.
        pool: of the images.
    """

    def __init__(self, ceph: Ceph, pool: str = "rbd") -> None:
        self._conf, self._pool = str(ceph.conf).encode(), pool.encode()
        self._lib = ctypes.CDLL("librados.so.2")
        self._cluster, self._io = ctypes.c_void_p(), ctypes.c_void_p()
        self._prefixes: dict[str, str] = {}

    def __enter__(self) -> Self:
        lib = self._lib
        self._must(
            "rados_create2", lib.rados_create2(ctypes.byref(self._cluster), b"ceph", b"client.admin", ctypes.c_uint64())
        )
        try:
            self._must("rados_conf_read_file", lib.rados_conf_read_file(self._cluster, self._conf))
            for name, value in OPTIONS.items():
                self._must(name, lib.rados_conf_set(self._cluster, name.encode(), value.encode()))
            self._must("rados_connect", lib.rados_connect(self._cluster))
            self._must("its pool", lib.rados_ioctx_create(self._cluster, self._pool, ctypes.byref(self._io)))
        except BaseException:
            lib.rados_shutdown(self._cluster)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.rados_ioctx_destroy(self._io)
        self._lib.rados_shutdown(self._cluster)

    def head(self, image: RbdDisk) -> Head:
        """The table of heads now.

        Raises:
            Away: Ceph does not answer.
        """
        return parse_table(self._read(image, TABLE_SECTOR * SECTOR, SLOTS * SECTOR))

    def journal(self, image: RbdDisk) -> Journal:
        """All records, also while a guest writes.

        Raises:
            Away: Ceph does not answer.
        """
        return parse(lambda offset, length: self._read(image, offset, length))

    def blocklist(self) -> frozenset[str]:
        """The addresses that are shut out now.

        Raises:
            Away: Ceph does not answer.
        """
        answer = self._command({"prefix": "osd blocklist ls", "format": "json"}).decode()
        # Behind it newer releases write a second array, of ranges.
        listed: list[Mapping[str, Any]] = json.JSONDecoder().raw_decode(answer)[0]
        return frozenset(str(entry["addr"]) for entry in listed)

    def _read(self, image: RbdDisk, offset: int, length: int) -> bytes:
        """What lies within one object; not the zeros that were never written."""
        number, offset = divmod(offset, REGION)
        assert number * REGION < IMAGE_SIZE
        return self._object(f"{self._prefix(image)}.{number:016x}", offset, length)

    def _prefix(self, image: RbdDisk) -> str:
        """What the names of an image's objects begin with; an image's id is in an object named after it."""
        if image.image not in self._prefixes:
            found = self._object(f"rbd_id.{image.image}", 0, 256)
            assert found, f"there is no image {image.name}"
            self._prefixes[image.image] = f"rbd_data.{found[4:].decode()}"
        return self._prefixes[image.image]

    def _object(self, name: str, offset: int, length: int) -> bytes:
        buffer = ctypes.create_string_buffer(length)
        done = self._lib.rados_read(self._io, name.encode(), buffer, ctypes.c_size_t(length), ctypes.c_uint64(offset))
        if done == -errno.ENOENT:
            return b""
        self._must(name, done)
        return buffer.raw[:done]

    def _command(self, command: Mapping[str, str]) -> bytes:
        words = (ctypes.c_char_p * 1)(json.dumps(command).encode())
        answer, size = ctypes.c_void_p(), ctypes.c_size_t()
        said, said_size = ctypes.c_void_p(), ctypes.c_size_t()
        result = self._lib.rados_mon_command(
            *(self._cluster, words, ctypes.c_size_t(1), None, ctypes.c_size_t(0)),
            *(ctypes.byref(answer), ctypes.byref(size), ctypes.byref(said), ctypes.byref(said_size)),
        )
        try:
            self._must(command["prefix"], result)
            return ctypes.string_at(answer, size.value) if answer else b""
        finally:
            self._lib.rados_buffer_free(answer)
            self._lib.rados_buffer_free(said)

    @staticmethod
    def _must(what: str, result: int) -> None:
        if result < 0:
            raise Away(f"{what}: {errno.errorcode.get(-result, result)}")


def sample(ceph: Ceph, image: RbdDisk) -> Head:
    """One look, by a client of its own; an `Observer` looks all the time.

    Raises:
        Away: Ceph does not answer.
    """
    with Reader(ceph, image.pool) as reader:
        return reader.head(image)


class Observer:
    """Looks at disks and blocklist all the time while it is entered, in a thread of its own.

    In each round the disks come first and the blocklist last, and all that is new has the instant of the round's
    beginning. So nothing that was fenced in time is seen too late, however slow the round; what was fenced too late by
    less than one round is not seen.

    Args:
        ceph: the cluster.
        images: the disk of each instance, all in one pool.
    """

    def __init__(self, ceph: Ceph, images: Mapping[str, RbdDisk]) -> None:
        self._images = dict(images)
        self._ceph = ceph
        self._reader = Reader(ceph)
        self._former: list[Reader] = []
        self._answered = boottime()
        self._listed: dict[str, float] = {}
        self._written: dict[str, dict[str, float]] = {instance: {} for instance in images}
        self._samples: dict[str, list[Sample]] = {instance: [] for instance in images}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_all_the_time)
        self._failed: BaseException | None = None

    def __enter__(self) -> Self:
        self._reader.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        try:
            if self._failed is None:
                # What was written last, and by whom, is not to be missed.
                self._look()
        finally:
            for reader in (self._reader, *self._former):
                reader.__exit__()
        if self._failed is not None:
            raise self._failed

    def samples(self, instance: str) -> list[Sample]:
        """Every look at the head of its disk until now."""
        return list(self._samples[instance])

    def head(self, instance: str) -> Head:
        """A look of the caller's own, now.

        Raises:
            Away: Ceph does not answer.
        """
        return self._reader.head(self._images[instance])

    def journal(self, instance: str) -> Journal:
        """All records of its disk until now.

        Raises:
            Away: Ceph does not answer.
        """
        return self._reader.journal(self._images[instance])

    def history(
        self, instance: str, locks: Sequence[Lock | None], closed: Mapping[str, float] | None = None
    ) -> History:
        """What `records.check` wants to know besides the records. Take it after the journal, and outside of faults.

        Args:
            instance: whose.
            locks: all values of its lock, None for each deletion (`tests.support.lock_history.lock_values`).
            closed: see `History`.
        """
        return History(
            locks=locks, listed=dict(self._listed), written=dict(self._written[instance]), closed=dict(closed or {})
        )

    def _look_all_the_time(self) -> None:
        try:
            while not self._done.wait(LOOK_S):
                self._look()
        except BaseException as error:  # noqa: BLE001 - it is the test's, which is in another thread
            self._failed = error

    def _look(self) -> None:
        now = boottime()
        try:
            heads = {instance: self._reader.head(image) for instance, image in self._images.items()}
            for instance, head in heads.items():
                self._samples[instance].append(Sample(seen=boottime(), owner=head.owner, sequence=head.sequence))
            listed = self._reader.blocklist()
        except Away:
            # New owners that were seen wait for a round that sees the blocklist, too.
            if boottime() - self._answered > PATIENCE_S:
                self._connect_anew()
            return
        self._answered = boottime()
        for address in listed:
            self._listed.setdefault(address, now)
        for instance, head in heads.items():
            for owner in head.owners:
                self._written[instance].setdefault(owner, now)

    def _connect_anew(self) -> None:
        reader = Reader(self._ceph)
        with contextlib.suppress(Away):
            reader.__enter__()
            # Others may be in the middle of a call of the former one, which is closed at the end.
            self._former.append(self._reader)
            self._reader = reader
        self._answered = boottime()


def boottime() -> float:
    """The clock of all instants here."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)

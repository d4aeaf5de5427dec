"""Ceph through its own tools, `rbd` and `ceph`: images, the clients that use them, and the blocklist.

Each call runs one process with a deadline. The process is killed and reaped when the deadline passes, or when the
caller is cancelled. When the supervisor itself is killed, the kernel kills the tool (setpriv(1), PR_SET_PDEATHSIG in
prctl(2)), because a Ceph client waits for minutes while its cluster is away. Why not the C bindings:
docs/decisions/0014-ceph-by-its-tools.md. `domain/ceph.py` parses what the tools print. Every call may raise `CephAway`,
`CephRefused` or `CephFailed`; docstrings name further errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from kvmsupervisor.adapters.ceph.access import CephAccess, destined, located
from kvmsupervisor.adapters.ceph.errors import (
    CephAway,
    CephError,
    CephFailed,
    CephRefused,
    NoSuchImage,
    _NoAnswerInTime,
)
from kvmsupervisor.aio import all_of, end_tool
from kvmsupervisor.domain.ceph import (
    EXCLUSIVE_LOCK,
    Client,
    HeldLock,
    ImageInfo,
    Trouble,
    client_address,
    keyring_paths,
    last_words,
    parse_added,
    parse_blocklist,
    parse_info,
    parse_keyring,
    parse_locks,
    parse_read_policy,
    parse_watchers,
    trouble,
)
from kvmsupervisor.domain.ceph_versions import Version, parse_versions
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.records import Unfit
from kvmsupervisor.domain.spec import RbdDisk
from kvmsupervisor.domain.words import option

ANSWER_S = 10.0
"""How long one call may take. A healthy cluster answers `rbd` in 0.05 s and `ceph` in 0.3 to 1 s (a change waits for
the monitors' next proposal, `paxos_propose_interval`); one that is electing a monitor needs some seconds."""

LONGEST_ANSWER_S = 40.0
"""The longest time limit of one call. After a call that timed out, the next call gets twice the time. Otherwise `ceph`,
a Python program, would always time out on a host so busy that it needs more than `ANSWER_S` to start."""

MONITORS_S = 3.0
"""How long to wait for the monitors alone, after the OSDs did not answer. The result only makes the message better."""

IMPORT_S = 60.0
"""How long it may take to write a small image, even while the OSDs are busy with recovery."""

FENCE_S = 365 * 86_400.0
"""Expiry of a fence: a year. It must outlast any host that freezes and wakes up; law 4 wants at least 30 days. With
Ceph's own default, an hour, two writers were seen. An entry is one line in the OSD map."""

FENCE_MIN_S = 30 * 86_400.0
"""The shortest expiry that counts as a fence (law 4)."""

REMEMBER_S = 3600.0
"""How long to remember that an entry was added, so that a fence whose second call timed out continues with that call.
Each try checks that the entry is still there. Arbitrary: longer than any series of tries, short beside `FENCE_S`."""

ADDS_AT_ONCE = 4
"""How many entries to add in parallel: the monitors accept them in one proposal. Each tool takes 40 MB."""

HEARD_BYTES = 16_384
"""How much is kept of what a tool says while it works: its complaint is at the end."""

KEPT_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "CEPH_ARGS")
"""The variables that the tools inherit. `ceph` runs in the system's Python; variables meant for our Python would break
it."""

_T = TypeVar("_T")


@frozen(kw_only=True)
class _Added:
    """A blocklist entry that this process has added.

    Attributes:
        at_s: when it was added, by the loop's clock.
        at: when it was added, by the monitors' clock.
        until: when it expires, by the monitors' clock.
    """

    at_s: float
    at: datetime
    until: datetime


class Ceph:
    """The cluster as one client sees it. Keeps no connection."""

    def __init__(self, access: CephAccess, *, answer_s: float = ANSWER_S) -> None:
        self.access = access
        self._answer_s = self._patience_s = answer_s
        self._added: dict[Client, _Added] = {}

    # --- images -----------------------------------------------------------------------------------------------

    async def image_info(self, image: RbdDisk) -> ImageInfo:
        """Size and features of an image.

        Raises:
            NoSuchImage: the image or its pool does not exist.
        """
        return await self.ask(parse_info, "rbd", "info", *located(image), "--format", "json")

    async def read_policy(self, image: RbdDisk) -> str:
        """From which OSDs this client reads the image: from `PRIMARIES` only, or from replicas, too.

        Set in ceph.conf, in the monitors' settings for the client, in the pool and in the image; the last one wins.

        Raises:
            NoSuchImage: the image or its pool does not exist.
        """
        return await self.ask(parse_read_policy, "rbd", "config", "image", "ls", *located(image), "--format", "json")

    async def pool_policy(self, pool: str) -> str:
        """The same for all images of a pool of which nothing is set for the image itself.

        Raises:
            NoSuchImage: the pool does not exist.
        """
        return await self.ask(parse_read_policy, "rbd", "config", "pool", "ls", pool, "--format", "json")

    async def watchers(self, image: RbdDisk) -> frozenset[Client]:
        """The clients that have the image open for writing. Ceph drops a dead client after 30 s, a fenced one at once.

        Raises:
            NoSuchImage: the image or its pool does not exist.
        """
        return await self.ask(parse_watchers, "rbd", "status", *located(image), "--format", "json")

    async def lock_owners(self, image: RbdDisk) -> frozenset[Client]:
        """The holders of the image's exclusive lock, dead or alive: the lock stays when a client dies or is fenced.

        Raises:
            NoSuchImage: the image or its pool does not exist.
        """
        return frozenset(lock.client for lock in await self._locks(image))

    async def break_locks(self, image: RbdDisk, owners: Collection[str]) -> None:
        """Take away the exclusive lock that one of these clients left behind; they are shut out for good already.

        The next client of the image does so by itself where it may shut clients out (`profile rbd`). A guest with a
        client of its own may not: its first write would fail.
        """
        for lock in await self._locks(image):
            if lock.client in owners and lock.is_exclusive:
                await self.run("rbd", "lock", "rm", *located(image), lock.name, lock.locker)

    async def _locks(self, image: RbdDisk) -> tuple[HeldLock, ...]:
        return await self.ask(parse_locks, "rbd", "lock", "ls", *located(image), "--format", "json")

    async def import_image(self, image: RbdDisk, file: Path) -> bool:
        """Create an image from a small file unless the image exists; return False when it does.

        The image appears complete: it is written under another name first. A call that is cut off leaves that one
        behind, and the next call removes it. Not for two callers at once; the holder of the instance's lock is alone.

        Raises:
            NoSuchImage: the pool does not exist.
            CephAway: an image that was left behind counts as open for another 30 s; try again.
        """
        try:
            await self.image_info(image)
        except NoSuchImage:
            pass
        else:
            return False
        aside = image.beside(f"{image.image}.new")
        with contextlib.suppress(NoSuchImage):
            await self.run("rbd", "rm", "--no-progress", *located(aside), limit_s=IMPORT_S)
        features = [word for name in ("layering", EXCLUSIVE_LOCK) for word in ("--image-feature", name)]
        source = option("--path", str(file))
        await self.run("rbd", "import", "--no-progress", *features, source, *destined(aside), limit_s=IMPORT_S)
        await self.run("rbd", "rename", *located(aside), *destined(image))
        return True

    async def versions(self) -> frozenset[Version]:
        """Those of all daemons of the cluster."""
        return await self.ask(parse_versions, "ceph", "versions", "--format", "json")

    # --- shutting out -----------------------------------------------------------------------------------------

    async def blocklist_add(self, clients: Iterable[str], expire_s: float = FENCE_S) -> Mapping[Client, datetime]:
        """Add each client to the blocklist; return when each new entry expires, by the monitors' clock.

        An existing entry keeps its expiry: Ceph prints the new time and does not apply it (seen in 16.2: the map of
        entries is added to, not overwritten). A client that has noticed its entry never writes through that
        connection again, not even after the entry is gone.

        Raises:
            CephFailed: a client is not the address of a single client (an entry for a whole host would hit everything
                on it, OSDs included). Nothing was added then.
        """
        added = await self._add(_exactly(clients), expire_s)
        return {client: one.until for client, one in added.items()}

    async def _add(self, clients: Iterable[Client], expire_s: float) -> Mapping[Client, _Added]:
        slots = asyncio.Semaphore(ADDS_AT_ONCE)
        added: dict[Client, _Added] = {}

        async def add(client: Client) -> None:
            command = ("osd", "blocklist", "add", client, f"{expire_s:.0f}")
            async with slots:
                _, said = await self.run("ceph", *command)
            with _understood("ceph", command):
                until = parse_added(said.decode(errors="replace"))
            at = until - timedelta(seconds=expire_s)
            # Remembered at once: when the next one fails, this one is not added again.
            added[client] = self._added[client] = _Added(at_s=asyncio.get_running_loop().time(), at=at, until=until)

        await all_of([add(client) for client in clients])
        return added

    async def blocklist_ls(self) -> Mapping[Client, datetime]:
        """The clients on the blocklist, with the expiry by the monitors' clock. Leaves entries for whole hosts out."""
        return await self.ask(parse_blocklist, "ceph", "osd", "blocklist", "ls", "--format", "json")

    async def blocklist_rm(self, clients: Iterable[str]) -> None:
        """Delete the entry of each client. Only when its process is proven gone (law 4), or to add it again at once.

        `profile rbd` alone does not allow this; see docs/ceph.md.
        """
        for client in _exactly(clients):
            self._added.pop(client, None)
            await self.run("ceph", "osd", "blocklist", "rm", client)

    async def fence(self, clients: Iterable[str], expire_s: float = FENCE_S) -> None:
        """Fence each client: add it to the blocklist for long, and read the blocklist back (law 4).

        An existing entry with a short expiry is replaced, because a frozen host may wake up after it. (librbd adds an
        entry for an hour when it breaks a lock; so do people by default.) Nothing else runs on the image yet.

        Raises:
            CephFailed: a client is not listed afterwards, or is not the address of a single client.
            CephRefused: an entry has to be replaced, and this client may not do that.
        """
        assert expire_s >= FENCE_MIN_S, expire_s
        wanted = _exactly(clients)
        if not wanted:
            return
        short = await self._add_and_check(wanted, expire_s)
        if short:
            await self.blocklist_rm(short)
            short = await self._add_and_check(short, expire_s)
        if short:
            raise CephFailed(f"the entries of {', '.join(short)} in `ceph osd blocklist ls` end in less than 30 days")

    async def _add_and_check(self, clients: tuple[Client, ...], expire_s: float) -> tuple[Client, ...]:
        """Add the clients that were not added recently; return those whose entries expire too soon for a fence."""
        now_s = asyncio.get_running_loop().time()
        self._added = {client: one for client, one in self._added.items() if now_s - one.at_s < REMEMBER_S}
        added = {client: self._added[client] for client in clients if client in self._added}
        fresh = await self._add([client for client in clients if client not in added], expire_s)
        added |= fresh
        listed = await self.blocklist_ls()
        if missing := [client for client in clients if client not in listed]:
            for client in missing:
                self._added.pop(client, None)
            if not fresh.keys().isdisjoint(missing):
                raise CephFailed(f"`ceph osd blocklist ls` does not name {', '.join(missing)}, which were just added")
            # Somebody has removed them since.
            return await self._add_and_check(clients, expire_s)
        # Both times are by the monitors' clock: this host's may be wrong.
        least = timedelta(seconds=FENCE_MIN_S)
        return tuple(client for client in clients if listed[client] < added[client].at + least)

    # --- the key ----------------------------------------------------------------------------------------------

    def of_guest(self, instance: str) -> Ceph | None:
        """The cluster as the guest of an instance sees it; None where that is the same client."""
        access = self.access.of_guest(instance)
        return None if access is None else Ceph(access, answer_s=self._answer_s)

    async def key(self) -> str:
        """The client's cephx key, base64, from the first keyring in which Ceph would look for it.

        Raises:
            CephRefused: no keyring can be read, or none has the key.
        """
        return (await self.keyring())[1]

    async def keyring(self) -> tuple[str, str]:
        """The path of the keyring with the client's key, and the key.

        Raises:
            CephRefused: see `key`.
        """
        paths = (self.access.keyring,) if self.access.keyring else await self._keyring_paths()
        tried = []
        for path in paths:
            try:
                text = await asyncio.to_thread(Path(path).read_text, encoding="utf-8", errors="replace")
                return path, parse_keyring(text, self.access.entity)
            except OSError as error:
                tried.append(f"{path}: {error.strerror}")
            except Unfit as error:
                tried.append(f"{path}: {error}")
        where = "; ".join(tried) or "no keyring is configured"
        raise CephRefused(f"there is no key for {self.access.entity} ({where}): see `ceph auth get-or-create`")

    async def _keyring_paths(self) -> tuple[str, ...]:
        names = (option("--name", self.access.entity), "--show-config-value", "keyring")
        conf = () if self.access.conf is None else (option("--conf", self.access.conf),)
        answer, _ = await self._execute("ceph-conf", *conf, *names, limit_s=self._answer_s)
        return keyring_paths(answer.decode(errors="replace"))

    # --- running tools ----------------------------------------------------------------------------------------

    async def ask(self, parse: Callable[[bytes], _T], program: str, *args: str) -> _T:
        """Run a tool that changes nothing; what it printed, as `parse` reads it."""
        answer, _ = await self.run(program, *args)
        with _understood(program, args):
            return parse(answer)

    async def run(
        self, program: str, *args: str, limit_s: float = 0.0, hear: Callable[[bytes], None] | None = None
    ) -> tuple[bytes, bytes]:
        """Run a tool as this client, with a time limit of `limit_s` or more; return both of its outputs.

        Args:
            program: which.
            args: its words.
            limit_s: how long it may take, where that is longer than answers may.
            hear: is told what it says while it works; None where that is of no interest.
        """
        access = self.access
        who = [option("--id", access.user)]
        if access.conf is not None:
            who.append(option("--conf", access.conf))
        if access.keyring is not None:
            who.append(option("--keyring", access.keyring))
        try:
            # Not `ceph`: what shuts clients out does not wait behind what asks for images.
            async with access.slots.one() if program == "rbd" else contextlib.nullcontext():
                answer = await self._execute(program, *args, *who, limit_s=max(limit_s, self._patience_s), hear=hear)
        except _NoAnswerInTime as silence:
            access.slots.answered = False
            self._patience_s = min(2 * self._patience_s, max(LONGEST_ANSWER_S, self._answer_s))
            # A client without any capability for OSDs is refused by Ceph 16 and left waiting for ever by Ceph 18.
            if program == "rbd" and await self._monitors_answer(who):
                raise CephAway(
                    f"{silence}, though its monitors do: no OSD does, or {access.entity} has no capability for OSDs; "
                    "see docs/ceph.md"
                ) from silence
            raise
        except CephError as error:
            access.slots.answered = not isinstance(error, CephAway)
            raise
        access.slots.answered = True
        self._patience_s = self._answer_s
        return answer

    async def _monitors_answer(self, who: Iterable[str]) -> bool:
        try:
            await self._execute("ceph", "osd", "stat", *who, limit_s=min(MONITORS_S, self._answer_s))
        except CephError:
            return False
        return True

    async def _execute(
        self, program: str, *args: str, limit_s: float, hear: Callable[[bytes], None] | None = None
    ) -> tuple[bytes, bytes]:
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        shown = _shown(program, args)
        try:
            tool = await asyncio.create_subprocess_exec(
                *(_path_of("setpriv", "util-linux"), "--pdeathsig", "KILL", _path_of(program, "ceph-common")),
                *args,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise CephRefused(f"cannot start {program}: {error.strerror or error}") from error
        try:
            async with asyncio.timeout(limit_s):
                answer, complaints = await (tool.communicate() if hear is None else _heard(tool, hear))
        except TimeoutError:
            raise _NoAnswerInTime(f"Ceph does not answer: `{shown}` took longer than {limit_s:g} s") from None
        finally:
            await end_tool(tool)
        if tool.returncode != 0:
            assert tool.returncode is not None
            raise self._error(shown, tool.returncode, complaints.decode(errors="replace"))
        return answer, complaints

    def _error(self, shown: str, status: int, complaints: str) -> CephError:
        words = last_words(complaints) or f"exit status {status}"
        kind, cause = trouble(status, complaints)
        told = f"`{shown}`: {words}"
        because = f" ({cause})" if cause else ""
        match kind:
            case Trouble.AWAY:
                return CephAway(f"Ceph does not answer{because}: {told}")
            case Trouble.BUSY:
                return CephAway(f"somebody has it open, or had until 30 s ago: {told}")
            case Trouble.REFUSED:
                return CephRefused(f"Ceph cannot be used as {self.access.entity}{because}: {told}; see docs/ceph.md")
            case Trouble.NO_POOL | Trouble.NO_NAMESPACE | Trouble.NO_IMAGE:
                return NoSuchImage(f"{cause}: {told}", kind)
            case Trouble.OLD:
                return CephFailed(f"Ceph 16 or newer is needed{because}: `{shown}`")
            case Trouble.EXISTS | Trouble.OTHER:
                return CephFailed(told, is_there=kind is Trouble.EXISTS)


async def _heard(tool: asyncio.subprocess.Process, hear: Callable[[bytes], None]) -> tuple[bytes, bytes]:
    """Wait for a tool, and pass on what it says meanwhile; the end of that is returned."""
    assert tool.stdout is not None
    assert tool.stderr is not None
    answer, said = asyncio.ensure_future(tool.stdout.read()), b""
    try:
        while data := await tool.stderr.read(4096):
            said = (said + data)[-HEARD_BYTES:]
            hear(data)
        await tool.wait()
        return await answer, said
    finally:
        answer.cancel()


def _path_of(program: str, package: str) -> str:
    """The path of a program.

    Raises:
        CephRefused: the program is not installed.
    """
    path = shutil.which(program)
    if path is None:
        raise CephRefused(f"cannot start {program}: no such program in PATH; it is in {package}")
    return path


def _exactly(clients: Iterable[str]) -> tuple[Client, ...]:
    """Each client once, in the form that is compared.

    Raises:
        CephFailed: a client is not the address of a single client.
    """
    try:
        return tuple(dict.fromkeys(client_address(client) for client in clients))
    except Unfit as error:
        raise CephFailed(f"cannot shut out what is not exactly one client: {error}") from error


@contextlib.contextmanager
def _understood(program: str, args: Iterable[str]) -> Iterator[None]:
    try:
        yield
    except Unfit as error:
        raise CephFailed(f"`{_shown(program, args)}` says what is not understood: {error}") from error


def _shown(program: str, args: Iterable[str]) -> str:
    """A command for messages, as a person would type it."""
    words = [program]
    for word in args:
        if word.partition("=")[0] in {"--id", "--name", "--conf", "--keyring", "--format"}:
            break
        words.append(word)
    return shlex.join(words)

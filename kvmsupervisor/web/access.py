"""Who may come in, by the files that the settings name: read at the start, and again when one of them has changed.

At the start every problem of every file ends the process. Later a file that turned bad leaves what was in force, which
is told: a half-written file must neither lock people out nor let others in.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Never

import structlog

from kvmsupervisor.adapters.clock import Clock
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.web.config_file import ClientAuth, WebConfig, read_web_config
from kvmsupervisor.web.people_file import PeopleFile, read_people
from kvmsupervisor.web.recognition import Known
from kvmsupervisor.web.tls import TlsProblem, context_of

log = structlog.get_logger(__name__)

LOOK_S = 5.0
"""How often it is looked whether a file has changed: some `stat` calls. Arbitrary: a person who takes somebody's role
away looks after it."""

Mark = Mapping[Path, tuple[int, ...] | None]
"""What each file was before it was read."""


class AccessError(Exception):
    """The files cannot be used.

    Args:
        problems: all of them, one line each.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@frozen(kw_only=True)
class Access:
    """What the files say.

    Attributes:
        known: who is known, and by what.
        tls: of connections; None for plain HTTP.
        transport_security: value of Strict-Transport-Security; empty for none.
        without_effect: names in the web configuration that have no meaning here.
        mark: what the files were before they were read.
    """

    known: Known
    tls: ssl.SSLContext | None
    transport_security: str
    without_effect: tuple[str, ...]
    mark: Mark


EVERYBODY = Access(known=Known(), tls=None, transport_security="", without_effect=(), mark={})
"""Nobody is asked who they are."""


def read_access(settings: Settings) -> Access:
    """Read all files.

    Raises:
        AccessError: at least one has a problem.
    """
    config, people, problems = WebConfig(), PeopleFile(), list[str]()
    mark: dict[Path, tuple[int, ...] | None] = {}

    def note(path: Path) -> None:
        mark.setdefault(path, _state(path))

    context = None
    if settings.web_config is not None:
        note(settings.web_config)
        config, found = read_web_config(settings.web_config)
        problems += (f"KVM_WEB_CONFIG: {one}" for one in found)
        if config.tls is not None:
            tls = config.tls
            for path in filter(None, (tls.cert_file, tls.key_file, tls.client_ca_file)):
                note(path)
            if not found:
                try:
                    context = context_of(tls)
                except TlsProblem as problem:
                    problems.append(f"KVM_WEB_CONFIG: {settings.web_config}: {problem}")
    if settings.web_people is not None:
        people, found = read_people(settings.web_people, None if problems else config.users, note)
        problems += (f"KVM_WEB_PEOPLE: {one}" for one in found)
    problems += _unreadable(settings)
    if problems:
        raise AccessError(problems)
    return Access(
        known=Known(
            users=config.users,
            tokens=people.tokens,
            by_certificate=config.tls is not None and config.tls.client_auth is not ClientAuth.NONE,
            sans=frozenset() if config.tls is None else config.tls.client_sans,
            proxies=tuple(map(ip_network, settings.web_trusted_proxy or ())),
            roles=people.roles,
        ),
        tls=context,
        transport_security=config.transport_security,
        without_effect=config.without_effect,
        mark=mark,
    )


def _unreadable(settings: Settings) -> Iterator[str]:
    """What the client of etcd that writes would miss with the first act."""
    for name, path in (
        ("KVM_WEB_ETCD_PASSWORD_FILE", settings.web_etcd_password_file),
        ("KVM_WEB_ETCD_CERT", settings.web_etcd_cert),
        ("KVM_WEB_ETCD_KEY", settings.web_etcd_key),
    ):
        if path is not None and not os.access(path, os.R_OK):
            why = "which this user may not read" if path.exists() else "and there is no such file"
            yield f"{name}: it is {path}, {why}"


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class AccessWatch:
    """Reads the files again when one has changed.

    Args:
        settings: of this host.
        access: as read at the start.
        clock: the machine's.
        on_change: called with what is in force from now on.

    Attributes:
        problems: of the files as they are now; none while these are in force.
    """

    def __init__(self, settings: Settings, access: Access, clock: Clock, on_change: Callable[[Access], None]) -> None:
        self.problems: tuple[str, ...] = ()
        self._settings = settings
        self._clock = clock
        self._on_change = on_change
        self._mark = access.mark

    async def run(self) -> Never:
        """For ever."""
        while True:
            await self._clock.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Read the files again, while one is not as it was when it came in force."""
        if all(_state(path) == state for path, state in self._mark.items()):
            self.problems = ()
            return
        try:
            access = read_access(self._settings)
        except AccessError as error:
            problems = tuple(error.problems)
        else:
            self.problems, self._mark = (), access.mark
            log.info("web.access_changed", users=len(access.known.users), tls=access.tls is not None)
            self._on_change(access)
            return
        if problems != self.problems:
            self.problems = problems
            log.error("web.access_kept", problems=problems, note="what was in force stays in force")

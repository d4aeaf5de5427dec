"""Shared by the commands: their tools, the way to etcd and its errors, types of arguments, options."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import field, replace
from datetime import UTC, datetime
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import click
from click.shell_completion import CompletionItem

from kvmsupervisor.adapters.etcd.api import Ambiguous, Denied, EtcdError, Store, Unavailable
from kvmsupervisor.adapters.neighbours import heard_of
from kvmsupervisor.cli.agent_contact import agent_seen, metrics_of
from kvmsupervisor.cli.checks import SETTLE_S
from kvmsupervisor.cli.errors import EtcdAway, Refused
from kvmsupervisor.cli.output import on_terminal, printable
from kvmsupervisor.cli.value_files import FROM_FILE, Unreadable, completions, value_of
from kvmsupervisor.cluster.acts.mac_auto import AUTO
from kvmsupervisor.cluster.acts.refused import Refused as ActRefused
from kvmsupervisor.cluster.overview import list_all, natural
from kvmsupervisor.config.load import SettingsError, load_settings
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import ID_RULE, InstanceId, parse_id
from kvmsupervisor.domain.names import FREE_KEY, WISH_KEYS
from kvmsupervisor.domain.parse_keys import ALL_NUMBERED_KEYS
from kvmsupervisor.domain.spec import OFF_NOW, Display, Firmware, HugePages, Power, RestartPolicy
from kvmsupervisor.domain.user_network import USER
from kvmsupervisor.domain.values import show, strange

P = ParamSpec("P")
T = TypeVar("T")

Work = Callable[[Store, Settings], Awaitable[T]]
"""The part of a command that needs etcd and the settings."""

COMPLETION_DEADLINE_S = 1.0
"""Seconds that a shell waits for names from etcd. Arbitrary: if it took longer, people would think that it hangs."""

VALUES: Mapping[str, Sequence[str]] = {
    "power": (*Power, OFF_NOW),
    "restart": tuple(RestartPolicy),
    "firmware": tuple(Firmware),
    **dict.fromkeys(("link", *(name for name in ALL_NUMBERED_KEYS if name.endswith("/link"))), ("up", "down")),
    "hugepages": tuple(HugePages),
    "display": tuple(Display),
    "mac": (AUTO,),
    "bridge": (USER,),
}
"""Wishes with few possible values, and some values, for completion."""

WAIT_TIMEOUT_S = 300.0
"""Default of `--timeout`: more than twice the default `shutdown_timeout`, enough for a guest that does not react."""


def connect(settings: Settings) -> Store:
    """A client of the real etcd. It is imported here, because gRPC takes a fifth of a second to import."""
    from kvmsupervisor.adapters.etcd import Etcd  # noqa: PLC0415
    from kvmsupervisor.config.etcd import etcd_config  # noqa: PLC0415

    return Etcd(replace(etcd_config(settings), impatient=True, renewed_every_s=0.0))


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _on_terminal() -> bool:
    """Whether a person can answer."""
    return on_terminal(sys.stdin)


@frozen(kw_only=True)
class Tools:
    """The world as the commands need it; tests give them their own."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    connect: Callable[[Settings], Store] = connect
    now: Callable[[], datetime] = _utc_now
    settle_s: float = SETTLE_S
    agent_seen: Callable[[str, InstanceId], str | None] = agent_seen
    heard_of: Callable[[Collection[str]], Mapping[str, str]] = heard_of
    metrics_of: Callable[[str], str | None] = metrics_of
    can_ask: Callable[[], bool] = _on_terminal

    def settings(self) -> Settings:
        """Load this host's settings.

        Raises:
            Refused: the settings have problems; the message names all of them.
        """
        try:
            return load_settings(self.environ)
        except SettingsError as error:
            lines = (f"  {printable(problem)}" for problem in error.problems)
            raise Refused("\n".join(["the settings have problems:", *lines])) from error


def tools_of(ctx: click.Context) -> Tools:
    """The tools of this call: those of a test, or the real ones."""
    return ctx.find_object(Tools) or Tools()


def pass_tools(command: Callable[Concatenate[Tools, P], T]) -> Callable[P, T]:
    """Give a command its `Tools` as its first argument."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return command(tools_of(click.get_current_context()), *args, **kwargs)

    return wrapper


def with_store(tools: Tools, work: Work[T]) -> T:
    """Connect to etcd, do `work` and close.

    Raises:
        EtcdAway: no endpoint answers, or the reply to a write was lost.
        Refused: etcd refuses the request, or the keys do not allow what was asked for.
    """
    settings = tools.settings()

    async def connected() -> T:
        store = tools.connect(settings)
        try:
            return await work(store, settings)
        finally:
            await store.close()

    try:
        return asyncio.run(connected())
    except ActRefused as refused:
        raise Refused(str(refused)) from refused
    except EtcdError as error:
        _translate(error, settings)


def _translate(error: EtcdError, settings: Settings) -> NoReturn:
    """Raise the command's error for an error of etcd."""
    endpoints = ", ".join(settings.etcd_endpoints)
    match error:
        case Ambiguous():
            raise EtcdAway(
                f"etcd ({endpoints}) did not answer in time: the change may or may not have been made; "
                "look with `show` before you try again"
            ) from error
        case Unavailable():
            raise EtcdAway(f"etcd is unreachable (ETCD_ENDPOINTS): {printable(error)}") from error
        case Denied():
            raise Refused(f"etcd ({endpoints}) does not allow this: {printable(error)}") from error
        case _:
            raise Refused(f"etcd ({endpoints}) refuses this: {printable(error)}") from error


# `ParamType` became generic in click 8.5: with an argument, older ones could not be used.


class InstanceType(click.ParamType):  # type: ignore[type-arg]
    """An instance's id; completion asks etcd."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> InstanceId:
        """Check that it is an id."""
        instance = parse_id(value)
        if instance is None:
            held = strange(str(value))
            said = show(str(value)) + ("" if held is None else f", which holds {held},")
            self.fail(f"{said} is no id: {ID_RULE}", param, ctx)
        return instance

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the instances that have keys and are not on the command line yet."""

        async def work(store: Store, settings: Settings) -> set[str]:
            prefix = settings.layout.wishes_prefix
            keys = (kv.key.decode("utf-8", "replace") for kv in (await list_all(store, prefix)).kvs)
            return {key.removeprefix(prefix).partition("/")[0] for key in keys}

        given = ctx.params.get(param.name or "") or ()
        names = (name for name in complete(ctx, work) if parse_id(name) and name not in given)
        return [CompletionItem(name) for name in sorted(names, key=natural) if name.startswith(incomplete)]


class HostType(click.ParamType):  # type: ignore[type-arg]
    """A host's name; completion reads the sessions."""

    name = "host"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the hosts that have a session."""
        return [CompletionItem(name) for name in host_names(ctx) if name.startswith(incomplete)]


class KeyType(click.ParamType):  # type: ignore[type-arg]
    """The name of a wish."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check that the name can be the end of a key. An unknown name is told later, with the other problems."""
        if not isinstance(value, str) or " " in value or not value.isprintable() or not all(value.split("/")):
            self.fail(
                f"{show(str(value))} cannot be the name of a key; names are like ram, disk/1 or nic/1/mac", param, ctx
            )
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the known keys."""
        return [CompletionItem(name) for name in _key_names(incomplete)]


class AssignmentType(click.ParamType):  # type: ignore[type-arg]
    """`KEY=VALUE`, as a pair."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Split at the first `=`."""
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not equals:
            self.fail(
                f"found {show(value)}, which is no KEY=VALUE; a key and its value are one word, such as ram=2G",
                param,
                ctx,
            )
        if ctx is not None and ctx.resilient_parsing:
            # A shell completes a later word: nothing is read for that, least of all the shell's own input.
            return name, text
        try:
            return KEY_NAME.convert(name, param, ctx), value_of(name, text)
        except Unreadable as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the known keys, each with its `=`; behind the `=` name the values, if there are few."""
        key, equals, _ = incomplete.partition("=")
        if not equals:
            names = [name if name.endswith("/") else f"{name}=" for name in _key_names(incomplete)]
        elif key in {"host", "hosts"}:
            names = [f"{key}={name}" for name in host_names(ctx)]
        elif key in FROM_FILE:
            names = completions(incomplete)
        else:
            names = [f"{key}={value}" for value in VALUES.get(key, ())]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _key_names(incomplete: str) -> list[str]:
    """The known keys that begin so. Numbered keys are many, so they are named only once their kind was typed."""
    numbered = [name for name in ALL_NUMBERED_KEYS if name.startswith(incomplete)]
    if "/" in incomplete:
        return numbered
    kinds = dict.fromkeys(name.partition("/")[0] + "/" for name in numbered)
    return [*(name for name in (*WISH_KEYS, FREE_KEY) if name.startswith(incomplete)), *kinds]


def host_names(ctx: click.Context) -> list[str]:
    """The hosts that have a session, for completion."""

    async def work(store: Store, settings: Settings) -> list[str]:
        prefix = settings.layout.hosts_prefix
        keys = (kv.key.decode("utf-8", "replace") for kv in (await list_all(store, prefix)).kvs)
        # A shell splits words at spaces and expands some characters: a name with those is typed by hand.
        return [key.removeprefix(prefix) for key in keys if parse_id(key.removeprefix(prefix))]

    return sorted(complete(ctx, work))


def complete(ctx: click.Context, work: Work[Any]) -> Any:
    """Ask etcd for names, briefly. On any error: no names, and no message in the shell's line."""

    async def briefly(store: Store, settings: Settings) -> Any:
        async with asyncio.timeout(COMPLETION_DEADLINE_S):
            return await work(store, settings)

    try:
        return with_store(tools_of(ctx), briefly)
    except (click.ClickException, TimeoutError):
        return []


INSTANCE = InstanceType()
HOST = HostType()
KEY_NAME = KeyType()
ASSIGNMENT = AssignmentType()

output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json"]),
    default="table",
    show_default=True,
    help="Format of the output; wide has more columns, json is for programs.",
)


def _some_time(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse `nan`, which is neither below nor above any limit: the wait would never time out."""
    if math.isnan(value):
        raise click.BadParameter("'nan' is no number of seconds.", ctx, param)
    return value


def wait_options(command: Callable[..., T]) -> Callable[..., T]:
    """Add `--wait` and `--timeout` to a command."""
    command = click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=WAIT_TIMEOUT_S,
        show_default=True,
        metavar="SECONDS",
        callback=_some_time,
        help="How long --wait waits at most.",
    )(command)
    return click.option("--wait", is_flag=True, help="Wait until it is done, and show the progress.")(command)

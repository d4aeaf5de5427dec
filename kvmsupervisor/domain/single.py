"""Single mode: names, locks and keys of one QEMU in one container. See docs/decisions/0013-single-mode.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from kvmsupervisor.domain.goal import where_else
from kvmsupervisor.domain.keys import HostName, InstanceId, parse_id
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.placement import NOT_PLACED, Placed
from kvmsupervisor.domain.spec import Power, Problem, RawValue, RestartPolicy, Wish

OVERRIDES: Mapping[str, str] = {
    "VM_RAM": "ram",
    "VM_MAC": "mac",
    "VM_RBD": "rbd",
    "SPICE_PORT": "spice_port",
    "EXTRA_FLAGS": "extra_flags",
}
"""Environment variables of the original image, and the keys that they override."""

REFUSED_OPTIONS: Mapping[str, str] = {
    "daemonize": "the lock is held for as long as the process lives that was started",
    "preconfig": "QEMU is started paused, and continued once it is on record in the lock",
}
"""QEMU options that cannot be used under a lock, and why."""


def name_of(lock_key: str, *, prefix: str) -> str:
    """The name of a container in single mode: the instance whose lock it holds, or else the lock's key.

    Args:
        lock_key: the key, without placeholders.
        prefix: of the wishes, without a slash at its end.
    """
    inner = lock_key.removeprefix(f"{prefix}/")
    instance, _, rest = inner.partition("/")
    if inner != lock_key and rest == "lock" and parse_id(instance) is not None:
        return instance
    return lock_key.strip("/")


def holder_of(host: HostName, name: str, *, pid_namespace: str | None) -> HostName:
    """The holder's name in the lock. It has a slash, so it is no host's name.

    Args:
        host: the host's name.
        name: see `name_of`.
        pid_namespace: number of the PID namespace; None for the kernel's first one. pids are not valid in the next
            namespace, so the next container gets another holder name.
    """
    apart = "" if pid_namespace is None else f"@{pid_namespace}"
    return HostName(f"{host}/{name}{apart}")


def is_same_host(holder: str, host: str | None) -> bool:
    """Whether `holder` is `host` itself, or a container in single mode there."""
    return host is not None and holder.partition("/")[0] == host


def is_in_container(instance: InstanceId, host: str, holders: Collection[str]) -> bool:
    """Whether one of these is a container in single mode on `host` that runs, or wants to run, this instance."""
    mine = f"{host}/{instance}"
    return any(one == mine or one.startswith(f"{mine}@") for one in holders)


def is_single(holder: str) -> bool:
    """Whether this is the name of a container in single mode."""
    return "/" in holder


def overrides_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The keys that the environment overrides, with its values. Unit files write `NAME=` for no value."""
    return {key: environ[name] for name, key in OVERRIDES.items() if environ.get(name, "").strip()}


def single_wish(
    instance: InstanceId,
    keys: Mapping[bytes, RawValue],
    *,
    overrides: Mapping[str, str],
    host: HostName,
    holder: HostName,
    placed: Placed = NOT_PLACED,
) -> Wish:
    """The wish of an instance that runs in single mode.

    The environment overrides keys, nothing restarts by itself, and `holder` stands for `host`. Without any key there is
    no instance, whatever the environment says. The container's own limits apply.
    """
    over = {key.encode(): RawValue(text.encode(errors="surrogateescape"), 0) for key, text in overrides.items()}
    wish = parse_wish(instance, {**keys, **over} if keys else {}, placed)
    spec = None if wish.spec is None else replace(wish.spec, cpu_shares=None, memory_limit_mib=None)
    wish = replace(wish, spec=spec, restart=RestartPolicy.NEVER)
    placement = wish.placed.placement
    if placement is not None and placement.host == host:
        wish = replace(wish, placed=replace(wish.placed, placement=replace(placement, host=holder)))
    return replace(wish, host=holder if wish.host == host else wish.host)


def refusal(wish: Wish, *, holder: HostName, host: HostName, problems: tuple[Problem, ...], prefix: str) -> str | None:
    """Why the instance is not started here, for people; None when it may start.

    Args:
        wish: see `single_wish`.
        holder: see `holder_of`.
        host: this host's name.
        problems: the wish's, and what this host lacks for it.
        prefix: of the wishes.
    """
    where = f"{prefix}/{wish.instance}"
    if wish.keys == 0:
        return f"there is no instance {wish.instance}: no key below {where}/"
    if wish.is_elsewhere(holder):
        said = f"{where}/host is {wish.host}" if wish.placement is None else f"{wish.instance}: {where_else(wish)}"
        return f"{said}, this host is {host}: {wish.instance} is not run here"
    if wish.host is None and not any(problem.key == "host" for problem in problems):
        return f"{where}/host is missing; it names the host that runs {wish.instance}, and this host is {host}"
    if problems:
        return "\n".join([f"the keys of {wish.instance} have problems:", *(f"  {_shown(one)}" for one in problems)])
    if wish.power is Power.OFF:
        return f"{where}/power is off: {wish.instance} is not to run"
    return None


def _shown(problem: Problem) -> str:
    variable = next((name for name, key in OVERRIDES.items() if key == problem.key), None)
    return str(problem) if variable is None else f"{problem} ({variable}, where it is set, wins over the key)"


def unsuitable(options: tuple[str, ...]) -> str | None:
    """Why QEMU cannot be run with these options under a lock; None when it can."""
    for option in options:
        reason = REFUSED_OPTIONS.get(option.removeprefix("-").removeprefix("-")) if option.startswith("-") else None
        if reason is not None:
            return f"{option} cannot be used with LOCK: {reason}"
    return None

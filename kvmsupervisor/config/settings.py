"""Settings: environment over `/etc/kvmsupervisor/kvmsupervisor.toml` over defaults (DESIGN §7).

A word that nobody understands stops the start: a typing error must not turn a safety feature off in silence.
`config/table.py` says which settings there are.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvmsupervisor.config.table import DEFAULT_CONFIG, SETTINGS, Setting
from kvmsupervisor.config.values import Accel, CgroupKind, Listen, LogFormat, LogLevel, Unfenced
from kvmsupervisor.domain import values
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import LOCK_PLACEHOLDER, HostName, Layout, default_facts, default_lock
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.values import Unfit, nearest, plain, show

__all__ = [
    "DEFAULT_CONFIG",
    "Accel",
    "CgroupKind",
    "Listen",
    "LogFormat",
    "LogLevel",
    "Setting",
    "SettingProblem",
    "Settings",
    "SettingsError",
    "Unfenced",
    "describe",
    "load_settings",
]

ETCD_SUGGESTION_CUTOFF = 0.83
"""How alike an `ETCD_` variable must be to one of ours to be taken for a slip.

Container platforms and etcd itself have variables of that kind (`ETCD_PORT`, `ETCD_NAME`, `ETCD_CERT_FILE`):
those are left alone. `ETCD_CA_CERT`, `ETCD_ENDPOINT` and `ETCD_PASSWORD` are slips.
"""


@frozen(kw_only=True)
class Settings:
    """All settings, parsed. Each is explained in `SETTINGS`; times are in seconds and end in `_s`."""

    etcd_endpoints: tuple[str, ...]
    etcd_cacert: Path | None
    etcd_cert: Path | None
    etcd_key: Path | None
    etcd_username: str | None
    etcd_password_file: Path | None
    lock: str
    bridge_if: str | None
    spice_addr: str
    hostname: HostName
    prefix: str
    facts_prefix: str
    run_dir: Path
    listen: Listen | None
    accel: Accel
    qemu: str
    qemu_user: str | None
    cgroup: CgroupKind
    extra_flags: AllowedFlags
    bridge_helper: Path | None
    memory_reserve_mib: int
    state_dir: Path
    ovmf_code: Path | None
    ovmf_vars: Path | None
    media_root: Path | None
    media_cacert: Path | None
    media_inward_redirects: bool
    ceph_conf: Path | None
    ceph_id: str | None
    allow_unfenced: bool
    unfenced: Unfenced
    takeover_wait_s: float
    session_ttl_s: int
    shutdown_timeout_s: float
    start_timeout_s: float
    settle_s: float
    start_parallel: int
    mass_removal_window_s: float
    log_level: LogLevel
    log_format: LogFormat
    log_max_bytes: int
    log_keep: int
    demo_once: bool
    config: Path

    @property
    def layout(self) -> Layout:
        """Where things lie in etcd."""
        return Layout(prefix=self.prefix, facts=self.facts_prefix, lock=self.lock)


@frozen
class SettingProblem:
    """What is wrong with one setting: `where` it stands, what was `found` there, and what would be right."""

    where: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; {self.wanted}"


class SettingsError(Exception):
    """The settings cannot be used: a person has to change them. Its text names every problem, one a line."""

    def __init__(self, problems: tuple[SettingProblem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def describe() -> tuple[Setting, ...]:
    """Every setting, in the order in which they are explained."""
    return SETTINGS


def load_settings(
    environ: Mapping[str, str],
    *,
    default_config: Path = DEFAULT_CONFIG,
    hostname: Callable[[], str] = socket.gethostname,
    cpus: Callable[[], int | None] = os.cpu_count,
) -> Settings:
    """Read the settings from `environ`, the TOML file and the defaults.

    Reads the TOML file and looks whether the files that settings name can be read: call it before the event
    loop runs.

    Args:
        environ: the environment; `KVM_CONFIG` in it names the TOML file.
        default_config: the TOML file without `KVM_CONFIG`; it may be missing.
        hostname: gives the host's name where no setting does.
        cpus: gives the number of the host's CPUs, None when it is unknown.

    Raises:
        SettingsError: with every problem found.
    """
    problems = _unknown_variables(environ)
    named = environ.get("KVM_CONFIG", "").strip()
    path = Path(named) if named else default_config
    table = _read_toml(path, required=bool(named), problems=problems)
    sources = _Sources(environ, path, table, problems)
    # `Any`: as many types as there are settings; a test holds the table against the fields.
    found: dict[str, Any] = {setting.name: sources.read(setting) for setting in SETTINGS}
    found["config"] = path
    found["start_parallel"] = found["start_parallel"] or 2 * (cpus() or 1)
    if found["hostname"] is None and "hostname" not in sources.bad:
        found["hostname"] = _default_hostname(hostname(), sources)
    _check_pairs(found, sources)
    _check_etcd(found, sources)
    if not sources.bad & {"prefix", "facts_prefix", "lock"}:
        _complete_keys(found, sources)
    if problems:
        raise SettingsError(tuple(problems))
    return Settings(**found)


_SEE_LIST = "no setting has this name; docs/settings.md lists them all"


def _read_toml(path: Path, *, required: bool, problems: list[SettingProblem]) -> dict[str, Any]:
    """The table in the TOML file; what is wrong with the file as a whole goes to `problems`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if required:
            problems.append(SettingProblem("KVM_CONFIG", show(str(path)), "it names a file that exists"))
        return {}
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the path.
        problems.append(SettingProblem(show(str(path)), f"no readable file ({error})", "make it readable"))
        return {}
    # Imported here: most hosts have no such file, and every command would pay for the import.
    import tomllib  # noqa: PLC0415

    try:
        table = tomllib.loads(data.decode())
    except ValueError as error:
        problems.append(SettingProblem(str(path), f"no TOML ({error})", "https://toml.io tells what is"))
        return {}
    names = {plain(setting.toml_key): setting.toml_key for setting in SETTINGS if setting.toml_key}
    for key in sorted(table.keys() - set(names.values())):
        near = nearest(plain(key).removeprefix("kvm-"), names)
        wanted = f"did you mean {near}?" if near else _SEE_LIST
        problems.append(SettingProblem(f"{path}: {show(key)[1:-1]}", "an unknown key", wanted))
    return table


def _unknown_variables(environ: Mapping[str, str]) -> list[SettingProblem]:
    """Variables that begin with `KVM_` and mean nothing, and those that look like slips of an `ETCD_` one."""
    names = {plain(setting.env): setting.env for setting in SETTINGS}
    etcd_names = {key: name for key, name in names.items() if name.startswith("ETCD_")}
    with_prefix = {f"kvm-{key}": name for key, name in names.items()}
    problems = []
    for name in sorted(environ.keys() - set(names.values())):
        if name.startswith("KVM_"):
            near = nearest(name, names | with_prefix)
        elif name.startswith("ETCD_") and nearest(name, etcd_names, ETCD_SUGGESTION_CUTOFF):
            near = nearest(name, etcd_names)
        else:
            continue
        wanted = f"did you mean {near}?" if near else _SEE_LIST
        problems.append(SettingProblem(show(name)[1:-1], "an unknown variable", wanted))
    return problems


class _Sources:
    """Where a setting may stand: the environment wins over the file.

    Attributes:
        bad: names of the settings that have a problem.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        path: Path,
        table: Mapping[str, Any],
        problems: list[SettingProblem],
    ) -> None:
        self._environ = environ
        self._path = path
        self._table = table
        self._problems = problems
        self.bad: set[str] = set()

    def read(self, setting: Setting) -> object:
        """Parse one setting; None when it is not set and has no default, and when it is bad."""
        written = self._written(setting)
        text = setting.default
        try:
            if written is not None:
                text = _text(written[1], setting)
            return None if text is None else setting.parse(text)
        except Unfit as unfit:
            self.blame(setting.name, str(unfit))
            return None

    def blame(self, name: str, wanted: str, *, found: str | None = None) -> None:
        """Note a problem with a setting, and where it stands."""
        self.bad.add(name)
        where, held = self._written(_BY_NAME[name]) or (_BY_NAME[name].env, None)
        shown = "nothing" if held is None else show(values.without_userinfo(str(held)))
        self._problems.append(SettingProblem(where, found or shown, wanted))

    def _written(self, setting: Setting) -> tuple[str, object] | None:
        """Where a setting is written, and what stands there; None when it is not written."""
        held = self._environ.get(setting.env)
        # `NAME=` is how unit files leave out a variable that has no default.
        if held is not None and (held.strip() or setting.default is not None or setting.may_be_empty):
            return setting.env, held
        key = setting.toml_key
        if key is not None and key in self._table:
            return f"{self._path}: {key}", self._table[key]
        return None


def _text(value: object, setting: Setting) -> str:
    """What is written, as text without surrounding white space.

    Raises:
        Unfit: it is empty, or a TOML value of a kind that the setting has not.
    """
    is_list = setting.name == "etcd_endpoints"
    match value:
        case str():
            text = value.strip()
        case int() | float() if not isinstance(value, bool):
            text = str(value)
        case list() if is_list and all(isinstance(item, str) for item in value):
            text = ",".join(value)
        case _:
            raise Unfit("it is a list of strings, or a string" if is_list else "it is a string or a number")
    if not text and not setting.may_be_empty:
        raise Unfit("it is not empty: leave it out to have its default")
    return text


_BY_NAME = {setting.name: setting for setting in SETTINGS}


def _default_hostname(name: str, sources: _Sources) -> HostName | None:
    try:
        return HostName(values.host_name(name))
    except Unfit as unfit:
        sources.blame("hostname", f"set it: {unfit}", found=f"nothing, and the host calls itself {show(name)}")
        return None


_PAIRS = (("etcd_cert", "etcd_key"), ("etcd_username", "etcd_password_file"), ("ovmf_code", "ovmf_vars"))


def _check_pairs(found: Mapping[str, Any], sources: _Sources) -> None:
    """What is of no use alone."""
    for given, missing in (*_PAIRS, *(pair[::-1] for pair in _PAIRS)):
        if found[given] is not None and found[missing] is None and missing not in sources.bad:
            sources.blame(missing, f"{_BY_NAME[given].env} is set and needs it")


def _check_etcd(found: Mapping[str, Any], sources: _Sources) -> None:
    """What of the way to etcd hangs together."""
    endpoints = found["etcd_endpoints"]
    if endpoints is not None and not any(url.startswith("https:") for url in endpoints):
        for name in ("etcd_cacert", "etcd_cert", "etcd_key"):
            if found[name] is not None:
                sources.blame(name, "with http endpoints it would do nothing: see ETCD_ENDPOINTS")


def _complete_keys(found: dict[str, Any], sources: _Sources) -> None:
    """Work out where things lie in etcd, and see that nothing lies on something else."""
    prefix = found["prefix"]
    facts = found["facts_prefix"] = found["facts_prefix"] or default_facts(prefix)
    lock = found["lock"] = found["lock"] or default_lock(prefix)
    if f"{facts}/".startswith(f"{prefix}/") or prefix.startswith(f"{facts}/"):
        sources.blame("facts_prefix", f"it lies outside KVM_PREFIX ({prefix}), and KVM_PREFIX outside it")
    if lock in {f"{prefix}/{LOCK_PLACEHOLDER}/{name}" for name in WISH_KEYS}:
        sources.blame("lock", "it is not the key of a wish")
    layout = Layout(prefix=prefix, facts=facts, lock=lock)
    if lock.startswith((layout.hosts_prefix, layout.statuses_prefix, layout.confirmations_prefix)):
        sources.blame("lock", f"it is not among the sessions and statuses below {facts}")

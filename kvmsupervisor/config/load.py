"""Finds the values of the settings: environment over TOML file over default.

An unknown name stops the start: a typing error must not turn a safety feature off in silence.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvmsupervisor.config import values as read
from kvmsupervisor.config.declaration import Setting
from kvmsupervisor.config.settings import DEFAULT_CONFIG, SETTINGS, Settings
from kvmsupervisor.domain import values
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import LOCK_PLACEHOLDER, HostName, Layout, default_facts, default_lock
from kvmsupervisor.domain.names import WISH_KEYS
from kvmsupervisor.domain.values import Unfit, nearest, plain, show

ETCD_SUGGESTION_CUTOFF = 0.83
"""How alike an `ETCD_` variable must be to one of ours to be taken for a slip.

Container platforms and etcd itself have variables of that kind (`ETCD_PORT`, `ETCD_NAME`, `ETCD_CERT_FILE`):
those are left alone. `ETCD_CA_CERT`, `ETCD_ENDPOINT` and `ETCD_PASSWORD` are slips.
"""


@frozen
class SettingProblem:
    """What is wrong with one setting: `where` it stands, what was `found` there, and what would be right."""

    where: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; {self.wanted}"


class SettingsError(Exception):
    """The settings cannot be used: a person has to change them. The text names every problem, one per line."""

    def __init__(self, problems: tuple[SettingProblem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def load_settings(
    environ: Mapping[str, str],
    *,
    default_config: Path = DEFAULT_CONFIG,
    hostname: Callable[[], str] = socket.gethostname,
    cpus: Callable[[], int | None] = os.cpu_count,
) -> Settings:
    """Read the settings from `environ`, the TOML file and the defaults.

    Reads the TOML file and checks that the files named in settings can be read: call this before the event loop runs.

    Args:
        environ: the environment; `KVM_CONFIG` in it names the TOML file.
        default_config: the TOML file without `KVM_CONFIG`; it may be missing.
        hostname: gives the host's name when no setting does.
        cpus: gives the number of the host's CPUs; None when it is unknown.

    Raises:
        SettingsError: with every problem found.
    """
    problems = _unknown_variables(environ)
    sources = _Sources(environ, default_config, problems)
    # `Any`: as many types as there are settings; each declaration holds its own parser against its field.
    found: dict[str, Any] = {setting.name: sources.read(setting) for setting in SETTINGS}
    found["config"] = sources.path
    found["start_parallel"] = found["start_parallel"] or 2 * (cpus() or 1)
    if found["hostname"] is None and "hostname" not in sources.bad:
        found["hostname"] = _default_hostname(hostname(), sources)
    _check_pairs(found, sources)
    _check_etcd(found, sources)
    _check_ceph(found, sources)
    if found["qemu_user"] is not None and found["qemu_uids"] is not None:
        sources.blame("qemu_uids", "KVM_QEMU_USER names one user for all QEMUs: leave one of the two settings out")
    if not sources.bad & {"prefix", "facts_prefix", "lock"}:
        _complete_keys(found, sources)
    if problems:
        raise SettingsError(tuple(problems))
    return Settings(**found)


def origins(environ: Mapping[str, str], *, default_config: Path = DEFAULT_CONFIG) -> Mapping[str, str]:
    """Where each setting of `load_settings` comes from: `environment`, the TOML file's path, or `default`.

    Returns:
        By `Setting.name`. Problems of settings are not looked for.
    """
    sources = _Sources(environ, default_config, [])
    return {setting.name: sources.origin(setting) for setting in SETTINGS}


_SEE_LIST = "no setting has this name; docs/settings.md lists them all"


def _read_toml(path: Path, *, required: bool, problems: list[SettingProblem]) -> dict[str, Any]:
    """The table in the TOML file; problems of the file as a whole go to `problems`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if required:
            problems.append(SettingProblem("KVM_CONFIG", show(str(path)), "it names a file that exists"))
        return {}
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the path.
        problems.append(SettingProblem(show(str(path)), f"no readable file ({error})", "it is a file that can be read"))
        return {}
    # Imported here: most hosts have no such file, and every command would pay for the import.
    import tomllib  # noqa: PLC0415

    try:
        table = tomllib.loads(data.decode())
    except ValueError as error:
        problems.append(SettingProblem(str(path), f"no TOML ({error})", "it is TOML, see https://toml.io"))
        return {}
    names = {plain(setting.toml_key): setting.toml_key for setting in SETTINGS if setting.toml_key}
    for key in sorted(table.keys() - set(names.values())):
        near = nearest(plain(key).removeprefix("kvm-"), names)
        wanted = f"did you mean {near}?" if near else _SEE_LIST
        problems.append(SettingProblem(f"{path}: {show(key)[1:-1]}", "an unknown key", wanted))
    return table


def _unknown_variables(environ: Mapping[str, str]) -> list[SettingProblem]:
    """Variables that begin with `KVM_` and are unknown, and those that look like a slip of an `ETCD_` one."""
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


class _Written(NamedTuple):
    """A written value: its source as in `origins`, its place as in `SettingProblem`, and the value."""

    origin: str
    where: str
    held: object


class _Sources:
    """Where a setting may stand: the environment wins over the file.

    Attributes:
        path: the TOML file.
        bad: names of the settings that have a problem.
    """

    def __init__(self, environ: Mapping[str, str], default_config: Path, problems: list[SettingProblem]) -> None:
        named = environ.get("KVM_CONFIG", "").strip()
        self.path = Path(named) if named else default_config
        self.bad: set[str] = set()
        self._environ = environ
        self._table = _read_toml(self.path, required=bool(named), problems=problems)
        self._problems = problems

    def origin(self, setting: Setting) -> str:
        """`environment`, the TOML file's path, or `default`."""
        written = self._written(setting)
        return "default" if written is None else written.origin

    def read(self, setting: Setting) -> object:
        """Parse one setting; None when it is bad, or not set and without default."""
        written = self._written(setting)
        text = setting.default
        try:
            if written is not None:
                text = _text(written.held, setting)
            return None if text is None else setting.parse(text)
        except Unfit as unfit:
            self.blame(setting.name, str(unfit))
            return None

    def blame(self, name: str, wanted: str, *, found: str | None = None) -> None:
        """Note a problem with a setting, and its place."""
        self.bad.add(name)
        written = self._written(_BY_NAME[name])
        shown = "nothing" if written is None else show(values.without_userinfo(str(written.held)))
        where = _BY_NAME[name].env if written is None else written.where
        self._problems.append(SettingProblem(where, found or shown, wanted))

    def _written(self, setting: Setting) -> _Written | None:
        """The written value of a setting; None when there is none."""
        held = self._environ.get(setting.env)
        # In a unit file, `NAME=` leaves out a variable that has no default.
        if held is not None and (held.strip() or setting.default is not None or setting.may_be_empty):
            return _Written("environment", setting.env, held)
        key = setting.toml_key
        if key is not None and key in self._table:
            return _Written(str(self.path), f"{self.path}: {key}", self._table[key])
        return None


def _text(value: object, setting: Setting) -> str:
    """A written value as text without surrounding white space.

    Raises:
        Unfit: the value is empty, or a TOML value of a kind that the setting does not take.
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
        return read.hostname(name)
    except Unfit as unfit:
        sources.blame("hostname", f"set it: {unfit}", found=f"nothing, and the host calls itself {show(name)}")
        return None


_PAIRS = (
    ("etcd_cert", "etcd_key"),
    ("etcd_username", "etcd_password_file"),
    ("ovmf_code", "ovmf_vars"),
    ("web_etcd_cert", "web_etcd_key"),
    ("web_etcd_username", "web_etcd_password_file"),
)


def _check_pairs(found: Mapping[str, Any], sources: _Sources) -> None:
    """Check the settings that need each other."""
    for given, missing in (*_PAIRS, *(pair[::-1] for pair in _PAIRS)):
        if found[given] is not None and found[missing] is None and missing not in sources.bad:
            sources.blame(missing, f"{_BY_NAME[given].env} is set and needs it")


def _check_ceph(found: Mapping[str, Any], sources: _Sources) -> None:
    """Check that the supervisor has a Ceph user of its own where each guest has one."""
    guests, own = found["ceph_id"], found["supervisor_ceph_id"]
    if own is not None and LOCK_PLACEHOLDER in own:
        sources.blame("supervisor_ceph_id", f"it is one user for all instances, without {LOCK_PLACEHOLDER}")
    elif guests is not None and LOCK_PLACEHOLDER in guests and own is None and "supervisor_ceph_id" not in sources.bad:
        sources.blame(
            "supervisor_ceph_id",
            f"CEPH_ID is {guests}, the users of guests: this names the user of their supervisor, such as kvm",
        )


def _check_etcd(found: Mapping[str, Any], sources: _Sources) -> None:
    """Check that certificates come with https endpoints."""
    endpoints = found["etcd_endpoints"]
    if endpoints is not None and not any(url.startswith("https:") for url in endpoints):
        for name in ("etcd_cacert", "etcd_cert", "etcd_key", "web_etcd_cert", "web_etcd_key"):
            if found[name] is not None:
                sources.blame(name, "with http endpoints it would do nothing: see ETCD_ENDPOINTS")


def _complete_keys(found: dict[str, Any], sources: _Sources) -> None:
    """Work out where things lie in etcd, and check that they do not overlap."""
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

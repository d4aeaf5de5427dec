"""`check-config`: this host's settings, each with where it comes from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from kvmsupervisor.cli.common import Tools, output_option, pass_tools
from kvmsupervisor.cli.config_checks import problems_here
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import NOTHING, Cell, Column, OutputFormat, echo_json, echo_table, printable
from kvmsupervisor.config.settings import DEFAULT_CONFIG, Setting, Settings, describe

COLUMNS = (
    Column(title="SETTING"),
    Column(title="VALUE", long=True),
    Column(title="FROM"),
)

WIDE_COLUMNS = (*COLUMNS, Column(title="DEFAULT"), Column(title="MEANING", long=True))


@click.command("check-config")
@output_option
@pass_tools
def check_config(tools: Tools, output: OutputFormat) -> None:
    """Check this host's settings and print each with its value and where it comes from.

    The environment wins over the TOML file (/etc/kvmsupervisor/kvmsupervisor.toml, or what KVM_CONFIG
    names), which wins over the default. It is also looked whether this host has what they name: programs, users,
    folders, bridges. Every problem is named; then the exit code is 1. `-o wide` explains each setting.
    """
    settings = tools.settings()
    origin = Origin(tools.environ)
    if output == "json":
        echo_json(
            [
                {"setting": setting.env, "value": text_of(settings, setting), "from": origin.of(setting)}
                for setting in describe()
            ]
        )
    else:
        _echo_settings(settings, origin, wide=output == "wide")
    problems = problems_here(settings)
    if problems:
        lines = (f"  {printable(problem)}" for problem in problems)
        raise Refused("\n".join(["the settings name what this host does not have:", *lines]))


def _echo_settings(settings: Settings, origin: Origin, *, wide: bool) -> None:
    rows = []
    for setting in describe():
        value, source = text_of(settings, setting), origin.of(setting)
        row = [
            Cell(setting.env, "bold"),
            Cell(value) if value is not None else Cell(NOTHING, "dim"),
            Cell(source, "dim" if source == "default" else "cyan"),
        ]
        rows.append(row + ([Cell(setting.shown_default), Cell(setting.help)] if wide else []))
    echo_table(WIDE_COLUMNS if wide else COLUMNS, rows)


class Origin:
    """Tells where a setting stands. The settings were just loaded from the same places, without a problem.

    Args:
        environ: the environment; `KVM_CONFIG` in it names the TOML file.
        default_config: the TOML file without `KVM_CONFIG`.
    """

    def __init__(self, environ: Mapping[str, str], default_config: Path = DEFAULT_CONFIG) -> None:
        self._environ = environ
        named = environ.get("KVM_CONFIG", "").strip()
        self._path = Path(named) if named else default_config
        self._table: Mapping[str, Any] = {}
        if self._path.exists():
            self._table = tomllib.loads(self._path.read_text())

    def of(self, setting: Setting) -> str:
        """`environment`, the TOML file's path, or `default`."""
        written = self._environ.get(setting.env)
        # Left empty, a variable without a default counts as not set: see `load_settings`.
        if written is not None and (written.strip() or setting.default is not None):
            return "environment"
        if written is None and setting.toml_key in self._table:
            return str(self._path)
        return "default"


def text_of(settings: Settings, setting: Setting) -> str | None:
    """A setting's value as it could be written; None for none."""
    match getattr(settings, setting.name):
        case None:
            return None
        case bool() as switch:
            return str(int(switch))
        case tuple() as items:
            return ",".join(items)
        case float() as number:
            return f"{number:g}"
        case value:
            return str(value)

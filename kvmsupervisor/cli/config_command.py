"""`check-config`: this host's settings, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

import click

from kvmsupervisor.cli.common import Tools, output_option, pass_tools
from kvmsupervisor.cli.config_checks import problems_here, web_problems
from kvmsupervisor.cli.errors import Refused
from kvmsupervisor.cli.output import NOTHING, Cell, Column, OutputFormat, echo_json, echo_table, printable
from kvmsupervisor.config.declaration import Setting
from kvmsupervisor.config.load import origins
from kvmsupervisor.config.settings import SETTINGS, Settings

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
    """Check this host's settings, and print each with its value and its source.

    The environment wins over the TOML file (/etc/kvmsupervisor/kvmsupervisor.toml, or the file in KVM_CONFIG), and the
    file over the default. The command also looks whether this host has the programs, users, folders and bridges that
    the settings name, and reads the files that say who may use `web`. It names every problem; then the exit code is 1.
    `-o wide` explains each setting.
    """
    settings = tools.settings()
    origin = origins(tools.environ)
    if output == "json":
        echo_json(
            [
                {"setting": setting.env, "value": text_of(settings, setting), "from": origin[setting.name]}
                for setting in SETTINGS
            ]
        )
    else:
        _echo_settings(settings, origin, wide=output == "wide")
    problems = [*map(str, problems_here(settings)), *web_problems(settings)]
    if problems:
        lines = (f"  {printable(problem)}" for problem in problems)
        raise Refused("\n".join(["the settings name things that this host does not have:", *lines]))


def _echo_settings(settings: Settings, origin: Mapping[str, str], *, wide: bool) -> None:
    rows = []
    for setting in SETTINGS:
        value, source = text_of(settings, setting), origin[setting.name]
        row = [
            Cell(setting.env, "bold"),
            Cell(value) if value is not None else Cell(NOTHING, "dim"),
            Cell(source, "dim" if source == "default" else "cyan"),
        ]
        rows.append(row + ([Cell(setting.shown_default), Cell(setting.help)] if wide else []))
    echo_table(WIDE_COLUMNS if wide else COLUMNS, rows)


def text_of(settings: Settings, setting: Setting) -> str | None:
    """A setting's value as a person could write it; None for no value."""
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

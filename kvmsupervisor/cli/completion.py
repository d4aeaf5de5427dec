"""`completion`: the script by which a shell completes this program's commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

COMPLETE_VARIABLE = "_KVMSUPERVISOR_COMPLETE"
"""The environment variable by which the script asks for words; click derives it from the program's name."""

BASH_SCRIPT = """\
_kvmsupervisor_completion() {
    local IFS=$'\\n' word glue= completion type value
    # readline splits words at "=": KEY=VALUE is put together again, and only VALUE is offered behind the "=".
    local -a words=("${COMP_WORDS[0]}")
    for word in "${COMP_WORDS[@]:1:COMP_CWORD}"; do
        if [[ $word == = || -n $glue ]]; then words[-1]+=$word; else words+=("$word"); fi
        if [[ $word == = ]]; then glue=1; elif [[ -n $glue ]]; then glue=; fi
    done
    local current=${words[-1]} prefix=
    [[ $current == *=* && $current != "${COMP_WORDS[COMP_CWORD]}" ]] && prefix=${current%%=*}=
    COMPREPLY=()
    for completion in $(
        COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) _KVMSUPERVISOR_COMPLETE=bash_complete "$1"
    ); do
        IFS=, read -r type value <<<"$completion"
        [[ $type == plain ]] || continue
        COMPREPLY+=("${value#"$prefix"}")
        # The value, or the number, follows at once.
        [[ $value == *[=/] ]] && compopt -o nospace
    done
}
complete -o nosort -F _kvmsupervisor_completion kvmsupervisor
"""
"""For bash ≥ 4.4. It speaks to click as click's own script does: lines of `type,value`."""


HELP = """\
Print the completion script for SHELL.

\b
bash: kvmsupervisor completion bash > /etc/bash_completion.d/kvmsupervisor
zsh:  kvmsupervisor completion zsh > "${fpath[1]}/_kvmsupervisor"
fish: kvmsupervisor completion fish > ~/.config/fish/completions/kvmsupervisor.fish

Completion reads ids and hosts from etcd, with the settings of the shell's environment.
"""
"""click fills no lines behind one that holds a backspace alone (its manual, "Preventing Rewrapping")."""


@click.command(help=HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell."""
    if shell == "bash":
        click.echo(BASH_SCRIPT, nl=False)
        return
    completer = get_completion_class(shell)
    assert completer is not None
    root = click.get_current_context().find_root().command
    click.echo(completer(root, {}, "kvmsupervisor", COMPLETE_VARIABLE).source(), nl=False)

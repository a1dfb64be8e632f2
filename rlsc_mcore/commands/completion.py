"""`rlsc completion`: print a script that completes commands and options in bash or zsh.

The commands come from the table of commands, the options from the `--help` of each command.
"""

import argparse
import contextlib
import io
import re
from collections.abc import Sequence

from rlsc_mcore.commands.table import COMMANDS, Command

_OPTION = re.compile(r"^[\s│|]{1,6}(?:-\w(?: [\w-]+)?, )?(--[a-z][\w.-]*)", re.MULTILINE)

_BASH = """# Completion of rlsc for bash: source this file, or save it in ~/.local/share/bash-completion/completions/rlsc
_rlsc() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} options
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{names}" -- "$word"))
        return
    fi
    if [[ $word != -* ]]; then return; fi # file names, by the option default
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -F _rlsc rlsc
"""

_ZSH = """#compdef rlsc
# Completion of rlsc for zsh: save this file as _rlsc in a folder of $fpath, or source it after compinit.
_rlsc() {{
    local -a commands options
    if ((CURRENT == 2)); then
        commands=(
{commands}
        )
        _describe command commands
        return
    fi
    if [[ $words[CURRENT] != -* ]]; then
        _files
        return
    fi
    case $words[2] in
{cases}
    esac
    compadd -- $options
}}
compdef _rlsc rlsc
"""


def run_completion(arguments: Sequence[str]) -> int:
    """Run `rlsc completion` and return the exit code."""
    parser = argparse.ArgumentParser(
        "rlsc completion",
        description="Print the completion of a shell: rlsc completion bash > ~/.rlsc-completion, and source it.",
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    known = parser.parse_args(arguments)
    print(completion(known.shell), end="")
    return 0


def completion(shell: str) -> str:
    """Return the completion script for `shell`, "bash" or "zsh"."""
    options = {name: command_options(command) for name, command in COMMANDS.items()}
    if shell == "bash":
        cases = "\n".join(
            f'        {name}) options="{" ".join(names)}" ;;' for name, names in options.items()
        )
        return _BASH.format(names=" ".join(COMMANDS), cases=cases)
    cases = "\n".join(f"        {name}) options=({' '.join(names)}) ;;" for name, names in options.items())
    rows = "\n".join(
        f"            '{command.name}:{command.summary.replace(chr(39), '')}'"
        for command in COMMANDS.values()
    )
    return _ZSH.format(commands=rows, cases=cases)


def command_options(command: Command) -> list[str]:
    """Return the long options of a command in the order of its help; those of `rlsc train` last if it takes
    them too."""
    options = _help_options(command)
    if command.takes_train_options:
        options += _help_options(COMMANDS["train"])
    return list(dict.fromkeys(options))


def _help_options(command: Command) -> list[str]:
    printed = io.StringIO()
    # Importing a command may print warnings of libraries.
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        command.load()(["--help"])
    options = _OPTION.findall(printed.getvalue())
    return [*options, "--config", "--resume", "--dry-run"] if command.name == "train" else options

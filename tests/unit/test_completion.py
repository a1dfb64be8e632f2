"""The completion scripts complete commands and options in a real bash and zsh."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rlsc_mcore.commands.completion import command_options, completion
from rlsc_mcore.commands.table import COMMANDS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(completion(shell))
    return folder


def complete(scripts: Path, shell: str, *words: str) -> list[str]:
    """Return what `shell` completes for the last of `words`."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    typed = " ".join(f"'{word}'" for word in ("rlsc", *words))
    if shell == "bash":
        code = f'source {scripts}/bash; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _rlsc; printf "%s\\n" "${{COMPREPLY[@]}}"'
        command = ["bash", "--norc", "-c", code]
    else:  # the functions of zsh's line editor print what they are given
        stubs = (
            "compdef() { :; }; compadd() { shift; print -l -- $@; }; _files() { :; }; "
            "_describe() { print -l -- ${(P)2} | cut -d: -f1; }"
        )
        code = f"{stubs}; words=({typed}); CURRENT={len(words) + 1}; source {scripts}/zsh; _rlsc"
        command = ["zsh", "-f", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    found = done.stdout.split()
    return [word for word in found if word.startswith(words[-1])] if shell == "zsh" else found


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_complete(scripts: Path, shell: str) -> None:
    assert complete(scripts, shell, "") == list(COMMANDS)
    assert complete(scripts, shell, "re") == [name for name in COMMANDS if name.startswith("re")]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_options_complete(scripts: Path, shell: str) -> None:
    assert complete(scripts, shell, "train", "--optimizer.l") == ["--optimizer.lr"]
    assert {"--over", "--seeds", "--algorithm.alpha"} <= set(complete(scripts, shell, "sweep", "--"))
    assert complete(scripts, shell, "status", "--algorithm") == []
    assert complete(scripts, shell, "status", "my_r") == []  # file names are left to the shell


def test_every_command_has_its_options() -> None:
    for command in COMMANDS.values():
        options = command_options(command)
        assert options[0] == "--help" and all(option.startswith("--") for option in options), command.name
    assert "--checkpoint" in command_options(COMMANDS["export"])
    assert "--dry-run" in command_options(COMMANDS["train"])

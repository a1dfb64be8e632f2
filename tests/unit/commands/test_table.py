"""The command table: every row can be run, and usage and error messages list every row."""

import pkgutil

import pytest

import rlsc_mcore.commands
from rlsc_mcore import cli
from rlsc_mcore.commands.table import COMMANDS, find_command, usage
from rlsc_mcore.config import ConfigError

NOT_COMMANDS = {"table", "findings", "machine_checks", "push", "stacks"}


def test_every_module_of_the_package_is_a_row() -> None:
    modules = {module.name for module in pkgutil.iter_modules(rlsc_mcore.commands.__path__)}
    assert modules - NOT_COMMANDS == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        COMMANDS[name].load()(["--help"])
    assert end.value.code in (0, None)
    assert "usage" in capsys.readouterr().out.lower()


def test_usage_and_the_error_list_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = usage().splitlines()
    with pytest.raises(ConfigError) as error:
        find_command("trian")
    for name, command in COMMANDS.items():
        assert f"  {name:<12} {command.summary}" in lines
        assert name in str(error.value)
    assert "did you mean 'train'?" in str(error.value)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert capsys.readouterr().out.rstrip("\n") == usage()

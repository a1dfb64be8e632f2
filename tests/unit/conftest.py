"""Fixtures of the unit tests."""

from collections.abc import Callable

import pytest

from rlsc_mcore import cli


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Run `rlsc ...` in this process: exit code and the lines of stderr."""

    def leave(code: int) -> None:  # the process of the tests must outlive the command
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)

    def run(*arguments: object) -> tuple[int, list[str]]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        return int(exit_.value.code or 0), capfd.readouterr().err.splitlines()

    return run

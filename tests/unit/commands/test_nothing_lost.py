"""Commands that write: what they did not make stays, and what another process owns is refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.folders import EMBEDDED, copy_embedded
from tests.helpers.run_folders import CONFIG, make_metrics, write_run
from tests.unit.test_commands import existing_run

HOLD = """
import sys, time
from pathlib import Path
from rlsc_mcore.run.owner import own
own(Path(sys.argv[1]))
print(flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["letter", "run of the same model", "file"])
def test_quickstart_replaces_nothing_but_a_quickstart(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], kind: str
) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("dear", encoding="utf-8")
    elif kind == "letter":
        target.mkdir()
        (target / "letter.txt").write_text("dear", encoding="utf-8")
    else:
        existing_run(target)  # of the embedded model, but by `rlsc train`
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, lines = run_cli("quickstart", "--run-dir", target)
    assert (code, len(lines)) == (2, 1) and "exists and was not made by a quickstart" in lines[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_export_never_replaces_the_model_that_the_run_began_with(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]]
) -> None:
    run_dir = existing_run(tmp_path / "run")
    model = copy_embedded(tmp_path / "model")
    (model / "NOTES.txt").write_text("dear", encoding="utf-8")
    before = {path: path.read_bytes() for path in model.iterdir()}
    code, lines = run_cli("export", run_dir, "--output", model)
    assert (code, len(lines)) == (2, 1) and "it is left alone" in lines[0]
    assert {path: path.read_bytes() for path in model.iterdir()} == before


OUTPUTS = {
    "report": (["report", "{run}", "--output", "{file}"], "is no report of this program"),
    "svg": (["report", "{run}", "--format", "svg", "--output", "{file}"], "is no report of this program"),
    "eval": (["eval", "--model", EMBEDDED, "--output", "{file}.json"], "is no evaluation of this program"),
    "compare": (
        ["compare", "--config", str(CONFIG), "--output", "{folder}"],
        "comparison.json was not made by this program",
    ),
    "sweep": (
        ["sweep", "--config", str(CONFIG), "--over", "algorithm.alpha=0,1", "--output", "{folder}"],
        "sweep.json was not made by",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_command_replaces_a_foreign_file(
    tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]], name: str
) -> None:
    arguments, said = OUTPUTS[name]
    folder = tmp_path / "output"
    folder.mkdir()
    for file in ("mine", "mine.json", "comparison.json", "sweep.json"):
        (folder / file).write_text('{"precious": 1}', encoding="utf-8")
    run_dir = write_run(tmp_path / "run", metrics=[make_metrics(0)])
    code, lines = run_cli(
        *[text.format(run=run_dir, file=folder / "mine", folder=folder) for text in arguments]
    )
    assert (code, len(lines)) == (2, 1) and said in lines[0], lines
    assert {path.read_text(encoding="utf-8") for path in folder.iterdir()} == {'{"precious": 1}'}


def test_a_report_replaces_its_own(tmp_path: Path, run_cli: Callable[..., tuple[int, list[str]]]) -> None:
    run_dir = write_run(tmp_path / "run", metrics=[make_metrics(0)])
    for kind in ("html", "svg"):
        for _ in range(2):
            assert run_cli("report", run_dir, "--format", kind)[0] == 0


@pytest.mark.parametrize("command", ["train", "resume", "quickstart", "export", "compare", "sweep", "eval"])
def test_a_folder_that_another_process_owns_is_refused(
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    run_dir = existing_run(tmp_path / "run")
    (run_dir / "checkpoints" / "step_000002").mkdir(parents=True)
    (run_dir / "quickstart.txt").touch()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        arguments = {
            "train": ["train", "--config", run_dir / "config.yaml"],
            "resume": ["train", "--resume", run_dir],
            "quickstart": ["quickstart", "--run-dir", run_dir],
            "export": ["export", run_dir],
            "compare": ["compare", "--config", CONFIG, "--output", run_dir],
            "sweep": ["sweep", "--config", CONFIG, "--over", "algorithm.alpha=0,1", "--output", run_dir],
            "eval": ["eval", "--model", EMBEDDED, "--output", run_dir],
        }[command]
        code, lines = run_cli(*arguments)
        assert (code, len(lines)) == (2, 1) and f"is in use by process {other.pid} on " in lines[0], lines
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    finally:
        other.kill()
        other.wait()

"""Nothing is deleted that this program did not make."""

import os
from pathlib import Path

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.run.folder import delete_run_files
from rlsc_mcore.run.made_here import MARKER, check_replaceable, files_made, replacing


def make(folder: Path, text: str = "new") -> None:
    with replacing(folder, "a test") as partial:
        (partial / "config.json").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name != MARKER
    }


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "base model", "NOTES.txt": "mine"},
        {"letter.txt": "dear"},
        {MARKER: "{"},
        {MARKER: "[]"},
    ],
)
def test_a_folder_without_the_marker_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match="was not made by this program"):
        make(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_made_is_replaced_and_what_was_added_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(folder, "first")
    (folder / "NOTES.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "deep.txt").write_text("mine too")
    with replacing(folder, "a test") as partial:
        (partial / "weights").write_text("second")
    assert contents(folder) == {"weights": "second", "NOTES.txt": "mine"}
    assert (folder / "more" / "deep.txt").read_text() == "mine too"
    assert files_made(folder) == ["weights"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(folder, "first")
    with pytest.raises(KeyboardInterrupt), replacing(folder, "a test") as partial:
        (partial / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert contents(folder) == {"config.json": "first"} and [path.name for path in tmp_path.iterdir()] == [
        "out"
    ]


def test_an_empty_folder_a_link_and_foreign_partials(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    foreign = tmp_path / "link.partial"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"config.json": "new"}
    assert contents(foreign) == {"mine.txt": "mine"}


def test_what_is_read_is_never_written(tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    make(model)  # an export of an earlier run, which this one was trained from
    for output in (model, tmp_path / "models", tmp_path / "models" / ".." / "models" / "base"):
        with pytest.raises(ConfigError, match="which is read"):
            check_replaceable(output, field="--output", keep=(model,))
    check_replaceable(model / "inside", field="--output", keep=(model,))


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out", "a test") as partial:
            (partial / "weights").write_text("secret")
            (partial / "weights").chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == 0o640


def test_only_a_run_s_own_files_are_deleted(tmp_path: Path) -> None:
    ours = [
        "config.yaml",
        "metrics.jsonl",
        "status.json",
        "summary.json",
        "checkpoints/step_000002/state.json",
        "checkpoints/latest",
        "rollouts/step_000000.jsonl",
        "evaluation/before.answers.jsonl",
        "tensorboard/events.out.tfevents.1.host",
    ]
    theirs = [
        "notes.md",
        "checkpoints/mine/weights.bin",
        "rollouts/marked.csv",
        "export/model.safetensors",
        "data/questions.jsonl",
    ]
    for name in [*ours, *theirs]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    delete_run_files(tmp_path)
    assert sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    ) == sorted(theirs)
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "tensorboard").exists()

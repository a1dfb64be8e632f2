"""The paper's experiment: its chain of commands, what it says is missing, and its table from evaluations written by hand."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlsc_mcore.config import ConfigError
from rlsc_mcore.evaluation.records import QuestionRecord, write_records
from rlsc_mcore.experiments.table2 import PAPER, SIZES, chain, main, markdown, read_table
from tests.helpers.run_folders import make_answer

SCRIPT = Path(__file__).parents[2] / "launch" / "reproduce_table2.sh"


def test_the_papers_numbers() -> None:
    # The row sums of the published table, added up by hand.
    sums = {size: {row: round(sum(values.values()), 1) for row, values in rows.items()} for size, rows in PAPER.items()}
    assert sums == {"1.5b": {"base": 233.7, "rlsc": 310.3}, "7b": {"base": 293.5, "rlsc": 390.3}}
    assert PAPER["7b"]["rlsc"]["gpqa_diamond"] == 24.1 and PAPER["1.5b"]["base"]["math500"] == 35.6


def test_another_benchmark_changes_no_number_of_the_paper() -> None:
    code = (
        "from rlsc_mcore.evaluation import benchmarks as b; b.BENCHMARKS['ninth'] = b.BENCHMARKS['gsm8k']\n"
        "from rlsc_mcore.experiments.table2 import PAPER; print(len(PAPER['7b']['rlsc']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8"]


def test_the_chain_can_run_in_its_order(tmp_path: Path) -> None:
    tasks = chain([SIZES["1.5b"], SIZES["7b"]], tmp_path, tmp_path / "data", 16, ["--optimizer.lr", "2e-5"])
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) == 2 * (1 + 3 * 2) + 1
    for position, task in enumerate(tasks):
        assert set(task.after) <= set(names[:position])
    by_name = {task.name: task.arguments for task in tasks}
    assert "chat,qwen25-math,evalchemy,none" in by_name["7b.base"] and "qwen25-math" in by_name["7b.paper_10_steps"]
    train = by_name["1.5b.train_paper_20_steps"]
    assert train[train.index("--training.num-steps") + 1] == "20" and str(tmp_path / "data" / "aime24.jsonl") in train
    assert by_name["1.5b.paper_20_steps"][1] == str(tmp_path / "1.5b" / "runs" / "paper_20_steps" / "export")
    assert all(task.arguments[-2:] == ("--optimizer.lr", "2e-5") for task in tasks if task.kind != "table")
    assert set(tasks[-1].after) == {task.name for task in tasks if task.kind == "eval"}


def test_everything_missing_is_named_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"^9 things are missing; nothing was started$"):
        main(["plan", "--sizes", "7b", "--output", str(tmp_path / "out"), "--benchmark-dir", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("missing: ") == 9
    assert "bring olympiad.jsonl" in printed.err and "missing: 7b: model.path: Qwen/Qwen2.5-Math-7B" in printed.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--sizes"):
        main(["plan", "--sizes", "70b"])


def test_the_table_stands_beside_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [QuestionRecord(i, "q", "8", "q") for i in range(10)]

    def write(row: str, name: str, right: int) -> None:
        answers = [make_answer(i, "a", right=i < right, temperature=t) for t in (0.0, 0.5) for i in range(10)]
        write_records(tmp_path / "7b" / row, name, {"scores": {}, "answers": answers, "questions": questions})

    write("base", "aime24.none", 2)
    write("base", "aime24.qwen25-math", 1)
    write("paper_10_steps", "aime24.qwen25-math", 3)
    assert main(["table", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table2.json").read_text(encoding="utf-8"))["7b"]["rows"]
    assert {name: row["aime24"]["greedy"]["mean"] for name, row in rows.items()} == {
        "base, none": 20.0,
        "base, qwen25-math": 10.0,
        "paper_10_steps": 30.0,
    }
    cell = rows["paper_10_steps"]["aime24"]["sampled"]
    assert cell["questions"] == 10 and 0 <= cell["low"] < 30 < cell["high"] <= 100
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert "| paper, rlsc | 26.7 | 72.6 |" in text and "| base, none | 20.0 (0.0 to " in text
    monkeypatch.setitem(SIZES, "7b", replace(SIZES["7b"], trainings=()))
    assert "paper_10_steps" not in markdown(read_table(tmp_path))


def test_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no evaluations there"):
        main(["table", str(tmp_path)])


def run_script(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "PATH": path}
    return subprocess.run(["/bin/bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_the_script_prints_the_chain(tmp_path: Path) -> None:
    done = run_script("--dry-run", "--sizes", "tiny", "--output", str(tmp_path / "out"), "--k", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines][:3] == ["tiny.base", "tiny.train_paper_10_steps", "tiny.paper_10_steps"]
    assert lines[-1].startswith("table (after tiny.base,") and not (tmp_path / "out").exists()


def test_the_script_needs_slurm_or_says_so(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = run_script("--sizes", "tiny", path=str(tmp_path))
    assert done.returncode == 2 and "no sbatch on this machine" in done.stderr
